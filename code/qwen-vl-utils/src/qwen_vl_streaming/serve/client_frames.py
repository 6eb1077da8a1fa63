"""Makes clips of the frames that a client sends: checks what is announced, and decodes and prepares in threads."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..common.numbers import is_number
from ..model.frame_patches import join_frames
from .connection import Refused
from .frames import FORMATS, BadFrame, BuiltClip, ClipBuilder, Picture, PreparedClip, decode_picture
from .options import Limits
from .request import integer
from .server import Server

Feed = Callable[[PreparedClip, BuiltClip], None]


def read_frame(event: dict, data: bytes, limits: Limits) -> tuple[str, float]:
    """The format and the capture time of the frame in `data`, which `event` announced. Raises Refused or BadFrame."""
    size, form, moment = integer(event, "bytes", 1, 2**31), event.get("format"), event.get("time")
    if size != len(data):
        raise Refused("invalid_event", f"{size} bytes were announced, but {len(data)} came")
    if len(data) > limits.frame_bytes:
        raise BadFrame("frame_too_large", f"{len(data)} bytes: at most {limits.frame_bytes} are allowed")
    if form not in FORMATS:
        raise Refused("invalid_event", f"format must be one of {', '.join(FORMATS)}")
    if not is_number(moment) or not abs(moment) < 1e9:
        raise Refused("invalid_event", "time must be the capture time in seconds")
    return form, moment


class ClientFrames:
    """The frames of one session."""

    def __init__(self, server: Server, builder: ClipBuilder, size: tuple[int, int], keep: Callable[[BuiltClip], None]):
        """`size` is (height, width) of the frames. `keep` is called in a thread with each clip."""
        self.server, self.builder, self.size, self.keep = server, builder, size, keep

    async def add(self, data: bytes, form: str, moment: float, feed: Feed) -> bool:
        """Calls `feed` in a thread with each clip that the frame completes. Returns False if the frame is not needed.
        Raises BadFrame."""
        if (missed := self.builder.place(moment)) is None:
            return False

        def take() -> None:
            frame = decode_picture(data, form, self.server.settings.limits.pixels, self.size)
            patches = self.server.patches(frame)
            if not self.builder.waiting:  # the first of a clip: now is the time to bring it in order
                patches = np.ascontiguousarray(patches)
            self._feed(self.builder.add(Picture(frame, moment, patches), missed), feed)

        await self.server.in_thread(take)
        return True

    async def finish(self, feed: Feed) -> None:
        """Calls `feed` in a thread with the last clip, if frames of it have come."""
        await self.server.in_thread(lambda: self._feed(self.builder.finish(), feed))

    def _feed(self, clips: list[BuiltClip], feed: Feed) -> None:
        for clip in clips:
            self.keep(clip)
            halves = [picture.patches for picture in clip.pictures]
            feed(PreparedClip(halves, functools.partial(self._pixels, clip)), clip)

    def _pixels(self, clip: BuiltClip) -> Tensor:
        halves = [self.server.exact_patches(picture.frame) for picture in clip.pictures]
        return torch.from_numpy(join_frames(halves)).view(torch.float32)
