"""Makes clips of the frames that a client sends: checks what is announced, and decodes and prepares in threads."""

from collections.abc import Callable

from torch import Tensor

from ..common.numbers import is_number
from .connection import Refused
from .frames import FORMATS, BadFrame, BuiltClip, ClipBuilder, Picture, PreparedClip, decode_picture, prepare_clip
from .options import Limits
from .request import integer
from .server import Server

Clips = list[tuple[PreparedClip, BuiltClip]]


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

    def __init__(self, server: Server, builder: ClipBuilder, size: tuple[int, int], keep: Callable[[Tensor], None]):
        """`size` is (height, width) of the frames. `keep` is called in a thread with the frames of each clip."""
        self.server, self.builder, self.size, self.keep = server, builder, size, keep

    async def add(self, data: bytes, form: str, moment: float) -> Clips | None:
        """Returns the clips that the frame completes, or None if it is not needed. Raises BadFrame."""
        if (missed := self.builder.place(moment)) is None:
            return None

        def take() -> Clips:
            pixels = decode_picture(data, form, self.server.settings.limits.pixels, self.size)
            return self._prepare(self.builder.add(Picture(pixels, moment), missed))

        return await self.server.in_thread(take)

    async def finish(self) -> Clips:
        """Returns the last clip, if frames of it have come."""
        return await self.server.in_thread(lambda: self._prepare(self.builder.finish()))

    def _prepare(self, clips: list[BuiltClip]) -> Clips:
        processor, dtype = self.server.processor, self.server.settings.dtype
        for clip in clips:
            self.keep(clip.frames)
        return [(prepare_clip(processor, clip.frames, dtype), clip) for clip in clips]
