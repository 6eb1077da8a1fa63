"""Opens a source by name: a file, a camera, a network stream or the synthetic scene."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.numbers import check_count, check_number, shown
from ..common.redact import hide_address
from .formats import SCHEMES
from .frames import FRAMES_PER_CLIP, sample_video, sampled_rate
from .index import index_video
from .pixel_budget import SIDE_FACTOR, PixelBudget
from .sources import Clip, paced_clips, synthetic_clips
from .streams import stream_clips

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
SCENE = (280, 504)
"""Height and width of the synthetic scene, before resizing it like the frames of a stream."""


@dataclass(frozen=True)
class Source:
    """A source of clips: a file, a camera, a stream, the synthetic scene, or a function of your own that yields clips.

    Example::

        import time

        import numpy
        from qwen_vl_streaming import Captioner, Clip, Source


        def clips():
            for index, frames in enumerate(batches):  # (2, 3, H, W) uint8, H and W divisible by 28
                yield Clip(index, frames, numpy.array([index, index + 0.5]), time.time())


        for piece in Captioner("MODEL").watch(Source(clips, seconds_per_clip=1.0)):
            print(piece.second, piece.text)
    """

    clips: Callable[[], Iterator[Clip]]
    """Opens the source and yields its clips. The time of the source starts with the first call to `next`."""
    seconds_per_clip: float
    size: tuple[int, int] | None = None
    """(height, width) of its frames, or None if not known before the first frame."""
    about: dict = field(default_factory=dict)
    """What a replay needs to read the same clips again, for the record. Empty for a camera or stream."""
    pace: float | None = None
    """Wall-clock seconds between its clips, or None if not known."""
    count: int | None = None
    """The number of clips, or None if not known."""
    live: bool = False
    """Whether the clips come whether or not they are read, as those of a camera. Clips that come before the model is
    ready are then skipped but for the newest, and an InputError means that the source was lost: the answer is finished
    without raising it. Otherwise no clip is skipped, unless that is asked for."""

    def __post_init__(self):
        check_number("seconds_per_clip", self.seconds_per_clip)
        if self.pace is not None:
            check_number("pace", self.pace)
        if self.count is not None:
            check_count("count", self.count)
        if self.size is not None:
            size = self.size if isinstance(self.size, Sequence) and len(self.size) == 2 else ()
            if not size or any(type(side) is not int or not 0 < side < 10**5 or side % SIDE_FACTOR for side in size):
                raise InputError(
                    f"size {shown(self.size)} must be (height, width), two of type int divisible by {SIDE_FACTOR}"
                )


def open_source(
    name: str,
    budget: PixelBudget,
    *,
    fps: float = 2.0,
    speed: float = 1.0,
    max_clips: int | None = None,
    cut: bool = True,
    reconnect_seconds: float = 10.0,
) -> Source:
    """Prepare the source `name`: a file, /dev/videoN, a URL, or SYNTHETIC. Add new kinds of sources here.

    From then on, messages show no password of its address.

    Raises InputError if `fps`, `speed` or `max_clips` is not above 0, if a file or camera does not exist, for an
    unknown URL scheme, and the errors of `read_video` for a file, up to its first frame. Later frames are decoded when
    their clips are read. A camera or URL is opened only then.

    Args:
        fps: Sampling rate in frames per second.
        speed: Playback speed of a file or the synthetic scene, in multiples of real time.
        max_clips: Maximum number of clips, or None for all. Does not limit a camera or stream.
        cut: Whether to read only the first `max_clips` clips of a file. If False, a file is read in full.
        reconnect_seconds: How long to try to reconnect to a stream, see `stream_clips`.
    """
    hide_address(name)
    check_number("fps", fps)
    check_number("speed", speed)
    check_number("reconnect_seconds", reconnect_seconds, -1e-9)
    if max_clips is not None:
        check_count("max_clips", max_clips)
    if name == SYNTHETIC:
        size = budget.size(*SCENE, frames=0)
        clips = functools.partial(synthetic_clips, max_clips or sys.maxsize, speed=speed, fps=fps, size=size)
        about = {"synthetic": {"fps": fps, "size": list(size)}}
        seconds = FRAMES_PER_CLIP / fps
        return Source(clips, seconds, size, about, seconds / speed, max_clips)
    if name.startswith("/dev/") or "://" in name:
        if not name.startswith("/dev/") and name.partition("://")[0].lower() not in SCHEMES:
            raise InputError(f"source {name} is not a stream: give {', '.join(SCHEMES)}, or the path of a file")
        if speed != 1:
            raise InputError(f"speed {speed:g} has no effect on {name}: remove it, it is for files and {SYNTHETIC}")
        if name.startswith("/dev/") and not Path(name).exists():
            raise InputError(f"source {name} does not exist: check that the camera is connected")
        clips = functools.partial(stream_clips, name, fps=fps, budget=budget, reconnect_seconds=reconnect_seconds)
        return Source(clips, FRAMES_PER_CLIP / fps, live=True)
    index = index_video(name)
    part: dict[str, Any] = {}
    if max_clips and cut:
        end = max_clips * FRAMES_PER_CLIP / sampled_rate(index, fps)
        if index.duration > end:
            logger.warning(
                "%s lasts %.1f s, but only the first %g s are watched: see max_clips", name, index.duration, end
            )
            part = {"end": end}
    video = sample_video(name, fps=fps, budget=budget, index=index, **part)
    height, width = next(iter(video.frames)).shape[1:]
    logger.info("frames of %d x %d pixels: --budget %s", width, height, budget.budget)
    about = {"video": {"path": os.path.abspath(name), "fps": fps, "budget": asdict(budget), **part}}
    clips, seconds = functools.partial(paced_clips, video, speed), video.seconds_per_clip
    return Source(clips, seconds, (height, width), about, seconds / speed, video.clips)
