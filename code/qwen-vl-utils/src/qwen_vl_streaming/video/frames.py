"""A video file as frames at 2 fps with their real timestamps. Knows nothing about tokenizers, captions or variants.

One rule picks the frames, whatever decodes them: at each target time start, start + 1/fps, … the frame that a viewer
would see at that moment, which is the newest one whose timestamp is not later. So variable frame rates come out right,
no frame is taken from the future, and PyAV and decord give the same frames. streams.py follows the same rule.
Times are in seconds from the video's first frame.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from qwen_vl_utils.vision_process import smart_resize
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from ..common.errors import InputError
from .index import FrameIndex, index_video
from .readers import READERS, ReaderError

logger = logging.getLogger(__name__)
_announced: set[str] = set()  # readers that a log line has named: one line a file would drown the others

FRAMES_PER_CLIP = 2
LONGEST = 60  # frames of the longest videos of PE-Video that are kept: 30 s at 2 fps
BUDGETS = ("video", "stream")
SIDE_FACTOR = 28  # a merged visual token covers 28 × 28 pixels
MOST_FRAMES = 10**7  # 58 days at 2 fps: more is a time stamp that is broken
MOST_RATIO = 200  # of a frame's sides, which Qwen2.5-VL takes
SLACK = 2e-3  # seconds by which containers round a timestamp or a duration


@dataclass(frozen=True)
class PixelBudget:
    """How large frames may be; the defaults are the published ones."""

    min_pixels_per_frame: int = 78_400
    """No frame has fewer, whatever the other two say."""
    max_pixels_per_frame: int = 602_112
    """No frame has more."""
    max_pixels_per_video: int = 2_408_448
    """Shared equally by all sampled frames of a video."""
    budget: str = "video"
    """Which frames share it. `video`: those that the video has, as in the paper, so that the size of the first frame
    tells how long the video will be. `stream`: always LONGEST frames, so that nothing depends on what is to come."""

    def __post_init__(self):
        if not SIDE_FACTOR**2 <= self.min_pixels_per_frame <= self.max_pixels_per_frame:
            raise InputError(
                f"min_pixels_per_frame {self.min_pixels_per_frame} must lie between {SIDE_FACTOR**2} and "
                f"max_pixels_per_frame {self.max_pixels_per_frame}"
            )
        if self.budget not in BUDGETS:
            raise InputError(f"--budget {self.budget}: choose {' or '.join(BUDGETS)}")
        if self.max_pixels_per_video < self.min_pixels_per_frame:
            raise InputError(
                f"max_pixels_per_video {self.max_pixels_per_video} must be at least min_pixels_per_frame "
                f"{self.min_pixels_per_frame}"
            )

    @classmethod
    def trained(cls, config, asked=None) -> "PixelBudget":
        """The one that a checkpoint was trained with, as its `config` says, or the published one; but what is not None
        of the attributes of `asked` that bear the names of these fields. Raises InputError."""
        given = {field.name: getattr(asked, field.name, None) for field in fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(**{**getattr(config, "pixel_budget", {}), **given})

    def size(self, height: int, width: int, frames: int, name: str = "the source") -> tuple[int, int]:
        """(height, width) to which each of `frames` frames is resized; both are divisible by 28. 0 `frames`: it is not
        known yet how many there will be.

        Raises InputError, with the `name` of the video, for a picture more than MOST_RATIO times as long as wide.
        """
        if max(height, width) > MOST_RATIO * min(height, width):
            raise InputError(
                f"{name} has frames of {width} x {height} pixels, more than {MOST_RATIO} times as long as wide: crop "
                "it, or leave it out"
            )
        share = self.max_pixels_per_video // (LONGEST if self.budget == "stream" or not frames else frames)
        most = max(self.min_pixels_per_frame, min(self.max_pixels_per_frame, share))
        height, width = smart_resize(height, width, SIDE_FACTOR, self.min_pixels_per_frame, most)
        if height * width < self.min_pixels_per_frame:
            # Once it has met the maximum, smart_resize rounds down, a narrow side even to 0.
            height, width = max(height, SIDE_FACTOR), max(width, SIDE_FACTOR)
            height, width = smart_resize(height, width, SIDE_FACTOR, self.min_pixels_per_frame, 2 * most + 2**20)
        return height, width


@dataclass(frozen=True)
class Video:
    """Sampled frames of one video. F is even: where it came out odd, the last frame is repeated to fill its clip."""

    frames: torch.Tensor
    """(F, 3, H, W) uint8, resized."""
    timestamps: np.ndarray
    """(F,) float64 seconds: when each frame is first shown."""
    fps: float
    """Frames sampled per second, as it really came out."""
    path: str

    @property
    def clips(self) -> int:
        return len(self.frames) // FRAMES_PER_CLIP

    @property
    def seconds_per_clip(self) -> float:
        return FRAMES_PER_CLIP / self.fps


def choose_reader(environ: Mapping[str, str]) -> str | None:
    """The reader that FORCE_QWENVL_VIDEO_READER asks for in `environ`, or None for the default.

    For programs, which pass their environment in; the library reads none. Raises InputError for an unknown name.
    """
    name = environ.get("FORCE_QWENVL_VIDEO_READER", "").strip().lower()
    return check_reader(name) if name else None


def check_reader(name: str) -> str:
    """`name` if it is one of READERS; raises InputError if it is not."""
    if name not in READERS:
        raise InputError(f"FORCE_QWENVL_VIDEO_READER {name!r} is not a video reader: use {' or '.join(READERS)}")
    return name


def read_video(
    path: str | Path,
    *,
    fps: float = 2.0,
    start: float | None = None,
    end: float | None = None,
    budget: PixelBudget | None = None,
    reader: str | None = None,
    max_clips: int | None = None,
    index: FrameIndex | None = None,
) -> Video:
    """Sample `path` at `fps` frames per second between `start` and `end` (seconds; default: all of it).

    A video of a steady rate below `fps` is sampled at its own rate. `reader` is "pyav", which is the default, or
    "decord". Only the picked frames are kept in memory, one at a time at full size. Raises InputError, naming the file
    and the fix, for a file that is missing, empty, cut short, damaged before its last picked frame, cannot be decoded,
    is shorter than one clip or, before any frame is decoded, has more than `max_clips`. `index` is the file's, where it
    is known already.
    """
    if reader is not None:
        check_reader(reader)
    if not fps > 0:
        raise InputError(f"fps {fps} must be above 0")
    index = index or index_video(path)
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
            f"video {path} has {count // FRAMES_PER_CLIP} clips, more than the {max_clips} that the model has room "
            "for: cut it, or leave it out"
        )
    frames = _decode(path, index, picked, count, budget or PixelBudget(), reader)
    picked = np.append(picked, picked[-1:]) if count > len(picked) else picked
    return Video(frames=frames, timestamps=index.times[picked], fps=rate, path=str(path))


def too_short(name: str, duration: float, rate: float, asked: str = "") -> str:
    """What is wrong with a video of `duration` seconds that has less than one clip at `rate` frames per second."""
    length = f"{FRAMES_PER_CLIP / rate:.2f} s"
    return f"{name} lasts {duration:.2f} s, which leaves less than one clip of {length}{asked}: use a longer one"


def sampled_rate(index: FrameIndex, fps: float) -> float:
    """Frames per second that sampling at `fps` really yields: no more than the video has itself, if these come at a
    steady rate. A video whose rate varies is sampled at `fps`, by what is on the screen."""
    if index.fps == 0 or index.fps >= 0.99 * fps or not index.even:  # within 1 %, only rounding separates the two
        return fps
    return float(index.fps)


def pick_frames(
    times: np.ndarray, duration: float, rate: float, start: float | None, end: float | None
) -> np.ndarray | None:
    """Indices into `times` of the frame on screen at start, start + 1/rate, … before `end` and `duration`.

    None where that is less than one clip. Raises InputError for a `start` or `end` that cannot be, and for more than
    MOST_FRAMES.
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
            f"{(end - start) * rate:.3g} frames of {end - start:.3g} s are more than {MOST_FRAMES}: give a smaller "
            "end, or rewrite the video, whose time stamps may be broken"
        )
    targets = start + np.arange(int(np.ceil((end - start - SLACK) * rate))) / rate
    return np.maximum(np.searchsorted(times, targets + SLACK, side="right") - 1, 0)


def _decode(
    path: str | Path, index: FrameIndex, picked: np.ndarray, count: int, budget: PixelBudget, reader: str | None
) -> torch.Tensor:
    """The `picked` frames, resized, and the last one repeated up to `count`: (count, 3, H, W) uint8."""
    name = reader or "pyav"
    try:
        frames = _resized(READERS[name](path, index, picked), picked, count, budget, f"video {path}")
    except ReaderError as error:
        other = "" if name == "pyav" else ", or read it with FORCE_QWENVL_VIDEO_READER=pyav"
        raise InputError(
            f"video {path} cannot be decoded ({error}): download it again or leave it out{other}"
        ) from error
    logger.log(logging.DEBUG if name in _announced else logging.INFO, "%s: read with %s", path, name)
    _announced.add(name)
    return frames


def _resized(
    images: Iterator[np.ndarray], picked: np.ndarray, count: int, budget: PixelBudget, name: str
) -> torch.Tensor:
    frames = None
    filled = 0
    with contextlib.closing(images):
        for image in images:
            if frames is None:
                height, width = image.shape[:2]
                size = budget.size(height, width, count, name)
                frames = torch.empty(count, 3, *size, dtype=torch.uint8)
            repeats = int(np.count_nonzero(picked == picked[filled]))
            frames[filled : filled + repeats] = resize_frame(image, size)
            filled += repeats
    frames[filled:] = frames[filled - 1]
    return frames


def resize_frame(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, 3) uint8 to (3, *size) uint8, bicubic with antialiasing as Qwen's processor does it."""
    picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return resize(picture, list(size), InterpolationMode.BICUBIC, antialias=True)
