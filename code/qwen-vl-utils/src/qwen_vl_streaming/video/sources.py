"""Clips in real time from a file or a synthetic scene. streams.py reads webcams and network streams.

The clips of a file are those of frames.py, each with the wall-clock time at which it was complete. Does not depend on
models or text.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..common.clock import now
from ..common.errors import InputError
from .frames import FRAMES_PER_CLIP, SampledVideo, Video


@dataclass(frozen=True)
class Clip:
    """Two sampled frames: one second at 2 fps."""

    index: int
    """Position in the source, from 0."""
    frames: torch.Tensor
    """(2, 3, H, W) uint8, resized."""
    timestamps: np.ndarray
    """(2,) float64: presentation times in seconds from the source's first frame."""
    completed: float
    """Wall-clock time from `clock.now` at which the clip was complete, or was due for a paced source."""
    last: bool = False
    """Whether this is known to be the last clip. A stream may end without a clip that has this set."""
    broken: int = 0
    """Number of frames of the source skipped so far because they are damaged or do not decode."""
    film: bool = False
    """Whether the stream is a recording of known size or length. It is read on demand and can wait for the consumer."""
    seconds: float | None = None
    """Seconds of video in the clip, if the source keeps its own steady rate below the requested one; otherwise None."""


def paced_clips(video: Video | SampledVideo, speed: float = 1.0) -> Iterator[Clip]:
    """Yield the clips of a `video`, each no earlier than it is complete in playback at `speed` times real time.

    A late consumer gets a clip immediately; its `completed` is still the time at which it was due. Raises InputError if
    `speed` is not above 0.
    """
    if not speed > 0:
        raise InputError(f"speed {speed} must be above 0")
    begin, frames = now(), iter(video.frames)
    for index in range(video.clips):
        clip = torch.stack([next(frames) for _ in range(FRAMES_PER_CLIP)])
        rows = slice(index * FRAMES_PER_CLIP, (index + 1) * FRAMES_PER_CLIP)
        due = begin + (rows.stop - 1) / video.fps / speed
        time.sleep(max(0.0, due - now()))
        yield Clip(index, clip, video.timestamps[rows], due, last=index == video.clips - 1)


def synthetic_clips(
    clips: int, *, speed: float = 1.0, fps: float = 2.0, size: tuple[int, int] = (280, 504)
) -> Iterator[Clip]:
    """Yield clips of a white square that crosses a dark background once every ten seconds; `size` is (height, width).
    Needs no file. Raises InputError if `speed` or `fps` is not above 0."""
    if not (speed > 0 and fps > 0):
        raise InputError(f"speed {speed} and fps {fps} must be above 0")
    begin = now()
    for index in range(clips):
        frames, times = synthetic_frames(index, fps, size)
        due = begin + float(times[-1]) / speed
        time.sleep(max(0.0, due - now()))
        yield Clip(index, frames, times, due, last=index == clips - 1)


def synthetic_frames(index: int, fps: float, size: tuple[int, int]) -> tuple[torch.Tensor, np.ndarray]:
    """The frames (2, 3, H, W) uint8 of clip `index` of `synthetic_clips`, and their times (2,) in seconds."""
    height, width = size
    side = height // 4
    times = (index * FRAMES_PER_CLIP + np.arange(FRAMES_PER_CLIP)) / fps
    frames = torch.full((FRAMES_PER_CLIP, 3, height, width), 32, dtype=torch.uint8)
    for frame, moment in zip(frames, times, strict=True):
        left = int(moment % 10 / 10 * (width - side))
        frame[:, side : 2 * side, left : left + side] = 255
    return frames, times
