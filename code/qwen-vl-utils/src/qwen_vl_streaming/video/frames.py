"""Samples a video file, at 2 fps by default, and keeps the timestamps of the frames. Does not depend on tokenizers,
captions or variants.

All readers use the same sampling rule. At each target time start, start + 1/fps, … it picks the frame on screen: the
newest one whose timestamp is not later. The rule handles variable frame rates, never picks a future frame, and gives
the same frames with PyAV and decord. streams.py follows the same rule. Times are in seconds from the video's first
frame.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from ..common.errors import InputError
from ..common.video_part import Part, part_seconds
from .index import FrameIndex, index_video
from .pixel_budget import PixelBudget
from .readers import READERS, ReaderError

logger = logging.getLogger(__name__)
_announced: set[str] = set()  # readers already logged at INFO; one line per file would hide other messages

FRAMES_PER_CLIP = 2
MOST_FRAMES = 10**7  # 58 days at 2 fps; more means a broken timestamp
SLACK = 2e-3  # seconds of tolerance: containers round timestamps and durations


@dataclass(frozen=True)
class Video:
    """Sampled frames of one video. F is even: if an odd number is sampled, the last frame is repeated to fill its
    clip."""

    frames: torch.Tensor
    """(F, 3, H, W) uint8, resized."""
    timestamps: np.ndarray
    """(F,) float64: presentation times in seconds from the video's first frame."""
    fps: float
    """Effective sampling rate in frames per second; may be lower than requested."""
    path: str

    @property
    def clips(self) -> int:
        return len(self.frames) // FRAMES_PER_CLIP

    @property
    def seconds_per_clip(self) -> float:
        return FRAMES_PER_CLIP / self.fps


@dataclass(frozen=True)
class SampledFrames:
    """The resized frames of a video, decoded each time they are read: (3, H, W) uint8 each."""

    path: str | Path
    index: FrameIndex
    picked: np.ndarray
    """Indices into `index.times` of the frames."""
    count: int
    """How many to yield: the last one is repeated."""
    budget: PixelBudget
    reader: str | None

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Raises InputError if the video cannot be decoded up to a frame."""
        path, picked, name = self.path, self.picked, self.reader or "pyav"
        frame, size, filled = torch.empty(0), None, 0
        try:
            with contextlib.closing(READERS[name](path, self.index, picked)) as images:
                for image in images:
                    height, width = image.shape[:2]
                    size = size or self.budget.size(height, width, self.count, f"video {path}")
                    frame = resize_frame(image, size)
                    repeats = int(np.count_nonzero(picked == picked[filled]))
                    yield from [frame] * repeats
                    filled += repeats
            yield from [frame] * (self.count - filled)
        except ReaderError as error:
            other = "" if name == "pyav" else ", or set FORCE_QWENVL_VIDEO_READER=pyav"
            raise InputError(
                f"video {path} cannot be decoded ({error}): download it again or skip it{other}"
            ) from error
        logger.log(logging.DEBUG if name in _announced else logging.INFO, "%s: read with %s", path, name)
        _announced.add(name)


@dataclass(frozen=True)
class SampledVideo:
    """A `Video` whose frames are decoded when they are read."""

    frames: SampledFrames
    timestamps: np.ndarray
    fps: float
    path: str

    @property
    def clips(self) -> int:
        return self.frames.count // FRAMES_PER_CLIP

    @property
    def seconds_per_clip(self) -> float:
        return FRAMES_PER_CLIP / self.fps


def choose_reader(environ: Mapping[str, str]) -> str | None:
    """The reader that FORCE_QWENVL_VIDEO_READER selects in `environ`, or None for the default.

    Programs call this with their environment; `read_video` does not read environment variables. Raises InputError for
    an unknown name.
    """
    name = environ.get("FORCE_QWENVL_VIDEO_READER", "").strip().lower()
    return check_reader(name) if name else None


def check_reader(name: str) -> str:
    """Return `name` if it is in READERS. Raises InputError otherwise."""
    if name not in READERS:
        raise InputError(f"FORCE_QWENVL_VIDEO_READER {name!r} is not a video reader: use {' or '.join(READERS)}")
    return name


def read_video(path: str | Path, **options: Any) -> Video:
    """Sample a video as `sample_video` does, with its `options`, and decode all sampled frames.

    Memory holds the resized sampled frames and one frame at full size. Raises InputError as `sample_video` and its
    frames do.
    """
    video = sample_video(path, **options)
    frames = torch.empty(0, dtype=torch.uint8)
    for place, frame in enumerate(video.frames):
        if not place:
            frames = torch.empty(len(video.timestamps), *frame.shape, dtype=torch.uint8)
        frames[place] = frame
    return Video(frames, video.timestamps, video.fps, video.path)


def sample_video(
    path: str | Path,
    *,
    fps: float = 2.0,
    start: float | None = None,
    end: float | None = None,
    part: Part | None = None,
    budget: PixelBudget | None = None,
    reader: str | None = None,
    max_clips: int | None = None,
    index: FrameIndex | None = None,
) -> SampledVideo:
    """Sample `path` at `fps` frames per second between `start` and `end` (seconds; default: the whole video).
    Frames are decoded when they are read.

    `part` is that of a data row, in place of `start` and `end`: for models, captions and metrics it is a video of its
    own. A video with a steady rate below `fps` is sampled at its own rate. `reader` is "pyav" (default) or "decord".
    Pass `index` if the file is indexed already.

    Raises InputError, naming the file and the fix, if the file is missing, empty, truncated, or shorter than one clip;
    if it has more than `max_clips` clips; and, as `part_seconds` does, if the video does not have the `part`. Reading
    the frames raises it if the file is damaged before the last of them, or cannot be decoded.
    """
    if reader is not None:
        check_reader(reader)
    if not fps > 0:
        raise InputError(f"fps {fps} must be above 0")
    index = index or index_video(path)
    if part:
        part_seconds(path, part, index.duration)
        start, end = part.get("start"), part.get("end")
    rate = sampled_rate(index, fps)
    try:
        picked = pick_frames(index.times, index.duration, rate, start, end)
    except InputError as error:
        raise InputError(f"video {path}: {error}") from error
    if picked is None:
        asked = "" if start is None and end is None else f" between {start or 0:g} s and {end or index.duration:g} s"
        raise InputError(too_short(f"video {path}", index.duration, rate, asked))
    count = len(picked) + len(picked) % FRAMES_PER_CLIP
    if max_clips is not None and count > max_clips * FRAMES_PER_CLIP:
        raise InputError(
            f"video {path} has {count // FRAMES_PER_CLIP} clips, more than the {max_clips} that the model "
            "supports: cut or skip it"
        )
    frames = SampledFrames(path, index, picked, count, budget or PixelBudget(), reader)
    picked = np.append(picked, picked[-1:]) if count > len(picked) else picked
    return SampledVideo(frames, index.times[picked], rate, str(path))


def too_short(name: str, duration: float, rate: float, asked: str = "") -> str:
    """Error message for a video of `duration` seconds that is shorter than one clip at `rate` frames per second."""
    length = f"{FRAMES_PER_CLIP / rate:.2f} s"
    return f"{name} lasts {duration:.2f} s, less than one clip of {length}{asked}: use a longer video"


def sampled_rate(index: FrameIndex, fps: float) -> float:
    """Effective rate when sampling at `fps`: the video's own rate if it is steady and below `fps`, otherwise `fps`. In
    a video with a variable rate, the frame on screen is sampled at each target time."""
    if index.fps == 0 or index.fps >= 0.99 * fps or not index.even:  # a difference within 1 % is rounding
        return fps
    return float(index.fps)


def pick_frames(
    times: np.ndarray, duration: float, rate: float, start: float | None, end: float | None
) -> np.ndarray | None:
    """Indices into `times` of the frame on screen at start, start + 1/rate, … before `end` and `duration`.

    Returns None if this range is shorter than one clip. Raises InputError for an invalid `start` or `end`, and for more
    than MOST_FRAMES frames.
    """
    start = 0.0 if start is None else start
    if not start >= 0:
        raise InputError(f"start {start} must be 0 s or later")
    if end is not None and not end > start:
        raise InputError(f"end {end} s must be after start {start} s")
    end = duration if end is None else min(end, duration)
    if end - start + SLACK < FRAMES_PER_CLIP / rate:
        return None
    if (end - start) * rate > MOST_FRAMES:
        raise InputError(
            f"{end - start:.3g} s have {(end - start) * rate:.3g} frames, more than {MOST_FRAMES}: give a smaller end, "
            "or rewrite the video, because its timestamps may be wrong"
        )
    targets = start + np.arange(int(np.ceil((end - start - SLACK) * rate))) / rate
    return np.maximum(np.searchsorted(times, targets + SLACK, side="right") - 1, 0)


def resize_frame(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Resize (H, W, 3) uint8 to (3, *size) uint8, bicubic with antialiasing, as Qwen's processor does."""
    picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return resize(picture, list(size), InterpolationMode.BICUBIC, antialias=True)
