"""The part of its video that a row is about: `video_start` and `video_end`, in seconds. Does not read videos."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from .errors import InputError
from .numbers import is_number

FIELDS = {"video_start": "start", "video_end": "end"}
"""The fields of a row, and the arguments of `read_video`."""
TOLERANCE = 1.0
"""Seconds by which a video may end before the part that a row names: published times are rounded."""


class Part(TypedDict, total=False):
    """In seconds from the video's first frame. Empty: the whole video."""

    start: float
    end: float


def video_part(row: Mapping[str, Any]) -> Part:
    """The part of its video that `row` is about. Each of the two fields may be absent or null.

    Raises InputError, without the row's place, unless they are numbers with 0 <= `video_start` < `video_end`.
    """
    part: Part = {}
    for name, argument in FIELDS.items():
        value = row.get(name)
        if value is None:
            continue
        if not is_number(value) or value < 0:
            raise InputError(f"has the {name} {value!r:.40}, which is not a time in seconds: correct or delete it")
        part[argument] = float(value)
    start, end = part.get("start", 0.0), part.get("end", math.inf)
    if not start < end:
        raise InputError(f"has the video_end {end:g}, which is not after the start at {start:g} s: correct them")
    return part


def part_seconds(name: str | Path, part: Part, duration: float) -> float:
    """The length in seconds of a `part` of the video `name`, which lasts `duration` seconds.

    Raises InputError if the video ends before the part begins, or more than TOLERANCE before the part ends.
    """
    if not part:
        return duration
    start, end = part.get("start", 0.0), part.get("end", duration)
    if start >= duration or end > duration + TOLERANCE:
        asked = f"from {start:g} s" + (f" to {end:g} s" if "end" in part else "")
        raise InputError(
            f"video {name} lasts {duration:.2f} s, but its row names the part {asked}: correct video_start and "
            "video_end, or use the complete video"
        )
    return min(end, duration) - start
