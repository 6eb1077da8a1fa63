"""Clips as they happen: a file at real time, a webcam, or a synthetic scene; streams.py has RTSP and HTTP streams.

The same clips as frames.py's, by the same rule, each with the wall-clock time at which it was complete. Knows nothing
about models or text.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..common.clock import now
from ..common.errors import InputError
from .frames import FRAMES_PER_CLIP, Video, read_video


@dataclass(frozen=True)
class Clip:
    """Two sampled frames, which is one second at 2 fps."""

    index: int
    """Counts from 0."""
    frames: torch.Tensor
    """(2, 3, H, W) uint8, resized."""
    timestamps: np.ndarray
    """(2,) float64 seconds from the source's first frame: when each frame is first shown."""
    completed: float
    """Wall-clock time, as of `clock.now`, at which its last frame was there."""
    last: bool = False
    """No clip comes after it. A stream seldom knows that of a clip: it may end without having said so."""
    broken: int = 0
    """Frames of the source so far that could not be decoded, or are damaged, and are skipped."""
    film: bool = False
    """Of a stream that is a film, whose size or length is known: it comes as it is asked for, and can wait."""
    seconds: float | None = None
    """Of video that it holds, where that is not what was asked for: a film of a steady slow rate keeps its own."""


def file_clips(path: str | Path, *, speed: float = 1.0, **options) -> Iterator[Clip]:
    """The clips of `path`, each no earlier than a viewer at `speed` times real time would have seen it.

    `options` are those of read_video. A consumer that is late gets a clip at once, with the time at which it was due.
    Raises InputError.
    """
    yield from paced_clips(read_video(path, **options), speed)


def paced_clips(video: Video, speed: float = 1.0) -> Iterator[Clip]:
    """As `file_clips`, of a video that was read before."""
    if not speed > 0:
        raise InputError(f"speed {speed} must be above 0")
    begin = now()
    for index in range(video.clips):
        rows = slice(index * FRAMES_PER_CLIP, (index + 1) * FRAMES_PER_CLIP)
        due = begin + (rows.stop - 1) / video.fps / speed
        time.sleep(max(0.0, due - now()))
        yield Clip(index, video.frames[rows], video.timestamps[rows], due, last=index == video.clips - 1)


def synthetic_clips(
    clips: int, *, speed: float = 1.0, fps: float = 2.0, size: tuple[int, int] = (280, 504)
) -> Iterator[Clip]:
    """A white square that crosses a dark ground once in ten seconds, without any file; `size` is (height, width)."""
    if not (speed > 0 and fps > 0):
        raise InputError(f"speed {speed} and fps {fps} must be above 0")
    height, width = size
    side = height // 4
    begin = now()
    for index in range(clips):
        times = (index * FRAMES_PER_CLIP + np.arange(FRAMES_PER_CLIP)) / fps
        frames = torch.full((FRAMES_PER_CLIP, 3, height, width), 32, dtype=torch.uint8)
        for frame, moment in zip(frames, times, strict=True):
            left = int(moment % 10 / 10 * (width - side))
            frame[:, side : 2 * side, left : left + side] = 255
        due = begin + float(times[-1]) / speed
        time.sleep(max(0.0, due - now()))
        yield Clip(index, frames, times, due, last=index == clips - 1)
