"""How well a live session kept up, from what arrived when, was seen when and was written when. Knows nothing else.

A slot is over when the next one begins. It has met its deadline if by then, which is when the next clip of the source
was complete, or a set time after its own clip was, it had begun and all its words were written; a greedy one writes
until the next one begins, and need only have begun. The newest slot is not judged: nothing came after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..video.frames import FRAMES_PER_CLIP


@dataclass(frozen=True)
class Course:
    """What happened. All times are wall-clock times in seconds."""

    completed: Sequence[float]
    """Of each clip that the source gave: when its last frame was there."""
    fed: Sequence[int]
    """Of each clip that was fed, which of these it was."""
    visible: Sequence[float]
    """When each slot began. One more than clips were fed where the end of the source was a slot's only news."""
    slots: Sequence[int]
    """Of each token, the slot that wrote it, 1…"""
    times: Sequence[float]
    """When each token was written."""
    closed: bool
    """The last clip was seen, so that the newest slot writes the rest."""
    deadline: float | None = None
    """Seconds after its clip that a slot has; None: until the source's next clip is there."""
    greedy: bool = False
    """Slots write until the next one begins."""


def figures(course: Course) -> dict:
    """Ages and times in seconds, rates a second; None where there is nothing to say."""
    begun = len(course.visible)
    seen = [course.completed[clip] for clip in course.fed[:begun]]
    newest = seen + seen[-1:] * (begun - len(seen))
    ages = [time - newest[slot - 1] for slot, time in zip(course.slots, course.times, strict=True)]
    live = [age for slot, age in zip(course.slots, ages, strict=True) if not course.closed or slot < begun]
    judged, missed = _deadlines(course)
    rate = _rate(course.visible[: len(seen)])
    return {
        "age_of_newest_frame": _spread(ages),
        "age_of_newest_frame_before_last_slot": _spread(live),
        "first_token_after_first_clip": course.times[0] - course.completed[0] if course.times else None,
        "tokens": len(course.times),
        "tokens_per_second": _rate(course.times),
        "clips": len(seen),
        "clips_per_second": rate,
        "frames_per_second": None if rate is None else rate * FRAMES_PER_CLIP,
        "source_clips": len(course.completed),
        "source_clips_per_second": _rate(course.completed),
        "deadline": course.deadline,
        "deadlines": judged,
        "missed_deadlines": missed,
    }


def _deadlines(course: Course) -> tuple[int, int]:
    judged = missed = 0
    finished = list(course.visible)
    if not course.greedy:
        for slot, time in zip(course.slots, course.times, strict=True):
            finished[slot - 1] = time
    for clip, end in zip(course.fed, finished[:-1], strict=False):
        if course.deadline is not None:
            by = course.completed[clip] + course.deadline
        elif clip + 1 < len(course.completed):
            by = course.completed[clip + 1]
        else:
            continue
        judged, missed = judged + 1, missed + (end > by)
    return judged, missed


def _rate(times: Sequence[float]) -> float | None:
    """Events a second from the first to the last."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return (len(times) - 1) / (times[-1] - times[0])


def _spread(values: Sequence[float]) -> dict | None:
    if not values:
        return None
    median, high = np.percentile(values, (50, 95))
    return {"median": float(median), "p95": float(high), "worst": float(max(values))}


def table(found: dict) -> str:
    """`figures`, and what was counted beside them, for people."""

    def number(value: float | None, unit: str, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}{unit}"

    def spread(ages: dict | None) -> str:
        if ages is None:
            return "-"
        return "   ".join(f"{name} {number(ages[key], ' s', 3)}" for name, key in SPREAD)

    deadline = "when the next clip came" if found["deadline"] is None else f"{found['deadline']:g} s after its clip"
    rows = {
        "age of the newest frame": spread(found["age_of_newest_frame"]),
        "  before the last slot": spread(found["age_of_newest_frame_before_last_slot"]),
        "first token": f"{number(found['first_token_after_first_clip'], ' s', 3)} after the first clip",
        "tokens": f"{found['tokens']}, {number(found['tokens_per_second'], '/s')}",
        "clips taken in": f"{found['clips']}, {number(found['clips_per_second'], '/s')} "
        f"({number(found['frames_per_second'], ' frames/s', 1)}), "
        f"of {found['source_clips']} that came at {number(found['source_clips_per_second'], '/s')}",
        "missed deadlines": f"{found['missed_deadlines']} of {found['deadlines']} slots, which were due {deadline}",
        "clips skipped": f"{found['clips_skipped']}, and {found['clips_before_start']} that came before the start",
        "clips waiting": f"{found['most_clips_waiting']} at most, {found['clips_waiting_at_end']} at the end",
        "broken frames": f"{found['broken_frames']}",
    }
    return "\n".join(f"{name:<26}{value}" for name, value in rows.items())


SPREAD = (("median", "median"), ("95th", "p95"), ("worst", "worst"))
