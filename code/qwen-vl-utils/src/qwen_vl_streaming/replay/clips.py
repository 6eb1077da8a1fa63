"""Finds the clips that a recorded session was fed, in the video that the record names or in a file of kept frames."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import InputError
from ..common.numbers import check_count, check_number
from ..common.paths import PROJECT, find_video
from ..model.prompts import clip_pixels
from ..sessions.record import Record, clip_hash
from ..video.clip_recorder import read_clips
from ..video.frames import read_video
from ..video.pixel_budget import SIDE_FACTOR, PixelBudget
from ..video.sources import synthetic_frames

MOST_PIXELS = 10**8
"""Pixels of a frame of the synthetic scene, at most."""


def check_clips(record: Record, clips: Sequence[Tensor]) -> None:
    """Raises InputError if `clips` are not those that were fed."""
    if len(clips) < len(record.hashes):
        raise InputError(f"the record is of {len(record.hashes)} clips, but only {len(clips)} were given")
    for number, (clip, known) in enumerate(zip(clips, record.hashes, strict=False), 1):
        if clip_hash(clip) != known:
            raise InputError(
                f"clip {number} differs from the recorded one: give the same video with the same sampling and sizes"
            )


def video_clips(
    record: Record,
    processor,
    path: str | Path | None = None,
    kept: str | Path | None = None,
    video_root: Path | None = None,
) -> list[Tensor]:
    """The clips that the recorded session was fed.

    Args:
        path: A video file; default: the one that the record names, looked up by `find_video`.
        kept: A file that `live --keep` has written, instead of a video.

    Raises InputError if neither is available, or if the record does not describe its source.
    """
    if kept is not None:
        return list(clip_pixels(processor, read_clips(kept))[0])
    try:
        return _named_clips(record.about, processor, path, video_root)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(
            f"the record does not describe its source as a session does ({error}): give --clips"
        ) from error


def _named_clips(about: dict, processor, path: str | Path | None, video_root: Path | None) -> list[Tensor]:
    """The clips of the video in `path`, or of the source that the record names."""
    video = dict(about.get("video") or {})
    named = video.pop("path", None)
    chosen = named if path is None else path
    if chosen is None and "synthetic" in about:
        return _synthetic_clips(about["clips"], processor, **about["synthetic"])
    if chosen is None:
        raise InputError(
            "the record does not name a video file: give --video, or --clips with a file written by live --keep"
        )
    budget = PixelBudget(**video.pop("budget")) if "budget" in video else None
    frames = read_video(find_video(chosen, PROJECT, video_root), budget=budget, **video).frames
    clips = list(clip_pixels(processor, frames)[0])
    fed = about.get("clips", range(len(clips)))
    if min(fed, default=0) < 0 or max(fed, default=0) >= len(clips):
        raise InputError(f"the record is of clip {max(fed) + 1} of a video, but the video has {len(clips)} clips")
    return [clips[index] for index in fed]


def _synthetic_clips(fed: Sequence[int], processor, fps: float, size: Sequence[int]) -> list[Tensor]:
    """The clips of the synthetic scene whose indices are in `fed`, and no others: the source may have run for long."""
    height, width = size
    check_number("fps", fps)
    for side in (height, width):
        check_count("size", side)
        if side % SIDE_FACTOR or height * width > MOST_PIXELS:
            raise ValueError(f"frames of {height} x {width} pixels")
    if min(fed, default=0) < 0:
        raise ValueError(f"clip {min(fed)}")
    frames = [synthetic_frames(index, fps, (height, width))[0] for index in fed]
    return list(clip_pixels(processor, torch.cat(frames))[0]) if frames else []
