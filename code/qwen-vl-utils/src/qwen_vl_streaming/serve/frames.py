"""Turns the pictures that a client sends into clips: checks, decodes, resizes and pairs them by the clip rule.

Sampling times are k / fps, counted from the first picture. The first picture that is captured from EARLY seconds before
a sampling time on is the one for it; further ones up to the next are dropped. At a sampling time without a picture, the
one before is still on screen and is repeated. For pictures captured at exact sampling times, this gives the clips of
`video/frames.py`. Knows nothing about sockets and models.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.prompts import clip_pixels
from ..sessions.record import clip_hash
from ..video.frames import FRAMES_PER_CLIP, resize_frame

FORMATS = ("jpeg", "png")
EARLY = 0.1
"""Seconds by which a timer may be early at 2 fps. It may be late by up to 0.4 s."""
JUMP_SECONDS = 5.0
"""A capture time that is further from the expected one means that the client's clock has jumped."""
MOST_SCANS = 20
"""Scans of a JPEG. Cameras and browsers write 1, progressive files about 10; each takes time to decode."""


class BadFrame(ValueError):
    """A picture that is refused. `code` is the error code of the protocol."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def decode_picture(data: bytes, form: str, most_pixels: int, size: tuple[int, int]) -> Tensor:
    """Decode a JPEG or PNG to (3, *size) uint8. Its header is checked before any pixel is decoded. Raises BadFrame."""
    try:
        picture = Image.open(io.BytesIO(data), formats=(form,))
    except Image.DecompressionBombError as error:
        raise BadFrame("frame_too_large", f"a frame of too many pixels: at most {most_pixels} are allowed") from error
    except Exception as error:  # Pillow raises many types for damaged files
        raise BadFrame("not_an_image", f"the frame is not a {form.upper()} picture") from error
    width, height = picture.size
    if width * height > most_pixels or not width * height:
        raise BadFrame("frame_too_large", f"a frame of {width} x {height} pixels: at most {most_pixels} are allowed")
    if form == "jpeg" and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadFrame("not_an_image", f"a JPEG of more than {MOST_SCANS} scans is not decoded")
    try:
        image = np.array(picture.convert("RGB"))
    except Exception as error:
        raise BadFrame("not_an_image", f"the {form.upper()} frame is incomplete or damaged") from error
    if image.shape[:2] == size:
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return resize_frame(image, size)


def encode_picture(frame: Tensor) -> bytes:
    """A frame (3, H, W) uint8 as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
    return file.getvalue()


@dataclass(frozen=True)
class PreparedClip:
    """A clip as a model takes it."""

    raw: bytes
    """(patches, pixels of a patch) in the model's dtype."""
    shape: tuple[int, int]
    hash: str
    """`clip_hash` of the same pixels in float32."""


def prepare_clip(processor, frames: Tensor, dtype: torch.dtype) -> PreparedClip:
    """Prepare the frames of one clip, (2, 3, H, W) uint8."""
    pixels = clip_pixels(processor, frames)[0][0]
    raw = pixels.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return PreparedClip(raw, tuple(pixels.shape), clip_hash(pixels))


class ClipBuilder:
    """Pairs pictures to clips."""

    def __init__(self, fps: float, frames: int | None = None):
        """`frames`: how many pictures a recording has, if known; then its last clip is known as such."""
        self.fps, self.frames = fps, frames
        self.next = 0
        """The next sampling time, counted from 0."""
        self.shift: float | None = None
        """Seconds from the client's clock to the stream's."""
        self.waiting: list[Tensor] = []
        self.newest: Tensor | None = None
        self.clips = 0

    @property
    def full(self) -> bool:
        """All pictures of the recording have come."""
        return self.frames is not None and self.next >= self.frames

    def place(self, time: float) -> int | None:
        """How many sampling times passed without a picture before this one, which is expected by `add` next. None if
        the picture is not needed, because its sampling time has one already."""
        if self.full:
            return None
        if self.shift is None:
            self.shift = -time
        target = math.floor((time + self.shift + EARLY) * self.fps)
        if abs(target - self.next) > JUMP_SECONDS * self.fps:
            self.shift = self.next / self.fps - time
            target = self.next
        return target - self.next if target >= self.next else None

    def add(self, picture: Tensor, missed: int = 0) -> list[tuple[Tensor, bool]]:
        """Add a picture after `missed` sampling times without one. Returns the clips that are complete now, each with
        whether it is the last."""
        repeated = [] if self.newest is None else [self.newest] * missed
        self.newest = picture
        return self._extend([*repeated, picture])

    def finish(self) -> list[tuple[Tensor, bool]]:
        """The source has ended. As in a file, the last picture is repeated to fill its clip, which is the last one."""
        self.frames = self.next
        return self._extend([self.newest]) if self.waiting else []

    def _extend(self, pictures: list[Tensor]) -> list[tuple[Tensor, bool]]:
        done = []
        for picture in pictures:
            if self.full and not self.waiting:
                break
            self.waiting.append(picture)
            self.next += 1
            if self.full and len(self.waiting) < FRAMES_PER_CLIP:
                self.waiting.append(picture)
            if len(self.waiting) == FRAMES_PER_CLIP:
                done.append((torch.stack(self.waiting), self.full))
                self.waiting = []
                self.clips += 1
        return done
