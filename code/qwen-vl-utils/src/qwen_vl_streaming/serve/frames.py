"""Turns the pictures that a client sends into clips: checks, decodes, resizes and pairs them by the clip rule.

Sampling times are k / fps, counted from the first picture. The first picture that is captured from EARLY seconds before
a sampling time on is the one for it; further ones up to the next are dropped. At a sampling time without a picture, the
one before is still on screen and is repeated. For pictures captured at exact sampling times, this gives the clips of
`video/frames.py`. Knows nothing about sockets and models.
"""

import io
import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ..sessions.record import clip_hash
from ..video.frames import FRAMES_PER_CLIP, resize_frame

FORMATS = ("jpeg", "png")
EARLY = 0.1
"""Seconds by which a timer may be early at 2 fps. It may be late by up to 0.4 s."""
JUMP_SECONDS = 5.0
"""A capture time that is further from the expected one means that the client's clock has jumped."""
MOST_SCANS = 20
"""Scans of a JPEG. Cameras and browsers write 1, progressive files about 10; each takes time to decode."""
MOST_PARTS = 50
"""Segments before a JPEG's first scan, and chunks of a PNG beside its pixels: all are read in Python."""
MOST_PIXEL_CHUNKS = 10_000
METADATA, TABLES, FRAME = (
    {bytes([0xFF, kind]) for kind in kinds}
    for kinds in (
        (*range(0xE1, 0xEE), 0xEF, 0xFE),
        (0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE),
        (0xC0, 0xC1, 0xC2, 0xC9, 0xCA),
    )
)
"""Markers of a JPEG's segments: application data and comments; what is needed to decode, JFIF's and Adobe's included,
which say what the colours mean; and the one that has the size. Others are refused: some have no length."""
MODES = {1: ("L", "L"), 3: ("RGB", "RGB"), 4: ("CMYK", "CMYK;I")}
"""Pillow's modes of a picture and of its JPEG, by the number of channels."""
Header = tuple[tuple[int, int], Callable[[], Image.Image]]
"""Width and height of a picture, and what decodes it."""
MOST_TAGS = 100
"""EXIF tags that are read; orientation is among the first."""
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
), 2))  # fmt: skip
"""By EXIF's orientation."""
Image.MAX_IMAGE_PIXELS = None  # Pillow would print a warning; `decode_picture` has a limit of its own


class BadFrame(ValueError):
    """A picture that is refused. `code` is the error code of the protocol."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def decode_picture(data: bytes, form: str, most_pixels: int, size: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG or PNG to (3, *size) uint8, a JPEG upright as its EXIF says. The header is checked before any pixel
    is decoded. Raises BadFrame."""
    found = jpeg_header(data) if form == "jpeg" else png_header(data)
    if found is None:
        raise BadFrame("not_an_image", f"the frame is not a {form.upper()} picture, or has too many parts")
    (width, height), decode = found
    if width * height > most_pixels or not width * height:
        raise BadFrame("frame_too_large", f"a frame of {width} x {height} pixels: at most {most_pixels} are allowed")
    if form == "jpeg" and data.count(b"\xff\xda") > MOST_SCANS:
        raise BadFrame("not_an_image", f"a JPEG of more than {MOST_SCANS} scans is not decoded")
    try:
        picture = decode()
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        if picture.size == size[::-1]:
            return np.frombuffer(b"".join([picture.tobytes("raw", band) for band in "RGB"]), np.uint8).reshape(3, *size)
        image = np.array(picture)
    except Exception as error:  # Pillow raises many types for damaged files
        raise BadFrame("not_an_image", f"the {form.upper()} frame is incomplete or damaged") from error
    return resize_frame(image, size).numpy()


def jpeg_header(data: bytes) -> Header | None:
    """None if `data` is not a JPEG whose first scan follows after at most MOST_PARTS segments, all of which are known.
    `Image.open` would read them in Python, EXIF, profiles and comments included, which takes as long as decoding a
    small picture after a pause. libjpeg reads the size from the same segment: there is exactly one that has it."""
    position, kept, turn, frame = 2, [data[:2]], None, b""
    for _ in range(MOST_PARTS):
        marker, size = data[position : position + 2], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == b"\xff\xda":
            break
        if marker == b"\xff\xff":  # padding
            position += 1
            continue
        segment, position = data[position : position + 2 + size], position + 2 + size
        if size < 2 or not (marker in METADATA or marker in TABLES or (marker in FRAME and not frame)):
            return None
        if marker not in METADATA:
            kept.append(segment)
            frame = segment if marker in FRAME else frame
        elif turn is None:
            turn = orientation(segment[4:])
    else:
        return None
    if not data.startswith(b"\xff\xd8") or len(frame) < 10 or frame[4] != 8 or frame[9] not in MODES:
        return None
    mode, raw = MODES[frame[9]]
    height, width = struct.unpack(">HH", frame[5:9])
    if not width * height:  # the height may follow the first scan, which Pillow cannot decode
        return None

    def decode() -> Image.Image:
        picture = Image.frombytes(mode, (width, height), b"".join([*kept, data[position:]]), "jpeg", raw, "")
        return picture if turn is None else picture.transpose(turn)

    return (width, height), decode


def png_header(data: bytes) -> Header | None:
    """None if `data` is not a PNG of few parts. Raises BadFrame."""
    if not png_has_few_parts(data):
        return None
    try:
        picture = Image.open(io.BytesIO(data), formats=("png",))
    except Exception:  # Pillow raises many types for damaged files
        return None
    if picture.mode.startswith("I"):  # Pillow would show all bright parts as white
        raise BadFrame("not_an_image", "a PNG of 16 bits without colour is not decoded: send 8 bits")
    return picture.size, lambda: picture


def orientation(exif: bytes) -> Image.Transpose | None:
    """How to turn a picture upright, by a segment of metadata that may be EXIF: a TIFF header and a list of tags."""
    order = {b"Exif\0\0II": "<", b"Exif\0\0MM": ">"}.get(exif[:8])
    try:
        if order is None:
            return None
        tiff = exif[6:]
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(min(count, MOST_TAGS)):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == ExifTags.Base.Orientation:
                return TURNS.get(value)
    except struct.error:  # damaged: the picture is shown as it is
        pass
    return None


def png_has_few_parts(data: bytes) -> bool:
    """`data` is a PNG of at most MOST_PIXEL_CHUNKS chunks of pixels and MOST_PARTS others. Its end may be missing."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    position, pixels, others = 8, 0, 0
    while position < len(data) and pixels <= MOST_PIXEL_CHUNKS and others <= MOST_PARTS:
        is_pixels = data[position + 4 : position + 8] == b"IDAT"
        pixels, others = pixels + is_pixels, others + (not is_pixels)
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return pixels <= MOST_PIXEL_CHUNKS and others <= MOST_PARTS


def encode_picture(frame: Tensor) -> bytes:
    """A frame (3, H, W) uint8 as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
    return file.getvalue()


@dataclass(frozen=True)
class Picture:
    frame: np.ndarray
    """(3, H, W) uint8."""
    time: float
    """When it was captured, by the client's clock."""
    patches: np.ndarray
    """Its half of a clip in the models' dtype, made before the clip is complete."""


@dataclass(frozen=True)
class BuiltClip:
    """A clip as it was sent."""

    pictures: list[Picture]
    last: bool

    @property
    def time(self) -> float:
        """When its newest picture was captured; a repeated picture keeps its time."""
        return self.pictures[-1].time

    @property
    def frames(self) -> Tensor:
        """(2, 3, H, W) uint8."""
        return torch.from_numpy(np.stack([picture.frame for picture in self.pictures]))


class PreparedClip:
    """A clip on its way to the models."""

    def __init__(self, halves: Sequence[np.ndarray], pixels: Callable[[], Tensor]):
        """`halves` are those of its frames in the models' dtype, for `join_frames`. `pixels` makes the clip, (patches,
        pixels of a patch) in float32."""
        self.halves, self._pixels = halves, pixels
        self._hash: str | None = None
        self._lock = threading.Lock()

    @property
    def hash(self) -> str:
        """`clip_hash` of the clip in float32, computed once. It takes longer than decoding a frame: read it once the
        models have the clip."""
        with self._lock:  # of this clip alone: each model has a thread that hashes
            if self._hash is None:
                self._hash = clip_hash(self._pixels())
            return self._hash


class ClipBuilder:
    """Pairs pictures to clips."""

    def __init__(self, fps: float, frames: int | None = None):
        """`frames`: how many pictures a recording has, if known; then its last clip is known as such."""
        self.fps, self.frames = fps, frames
        self.next = 0
        """The next sampling time, counted from 0."""
        self.shift: float | None = None
        """Seconds from the client's clock to the stream's."""
        self.waiting: list[Picture] = []
        self.newest: Picture | None = None
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

    def add(self, picture: Picture, missed: int = 0) -> list[BuiltClip]:
        """Add a picture after `missed` sampling times without one. Returns the clips that are complete now."""
        repeated = [] if self.newest is None else [self.newest] * missed
        self.newest = picture
        return self._extend([*repeated, picture])

    def finish(self) -> list[BuiltClip]:
        """The source has ended. As in a file, the last picture is repeated to fill its clip, which is the last one."""
        self.frames = self.next
        return self._extend(self.waiting[-1:])

    def _extend(self, pictures: list[Picture]) -> list[BuiltClip]:
        done = []
        for picture in pictures:
            if self.full and not self.waiting:
                break
            self.waiting.append(picture)
            self.next += 1
            if self.full and len(self.waiting) < FRAMES_PER_CLIP:
                self.waiting.append(picture)
            if len(self.waiting) == FRAMES_PER_CLIP:
                done.append(BuiltClip(self.waiting, self.full))
                self.waiting = []
                self.clips += 1
        return done
