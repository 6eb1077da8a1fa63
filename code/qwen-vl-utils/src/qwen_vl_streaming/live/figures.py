"""Statistics of how well a live session kept up, from when clips arrived, slots began and tokens were written.

A slot meets its deadline if, by then, it has begun and written all its tokens. The deadline is when the source's next
clip is complete, or a set time after the slot's own clip is. A greedy slot writes until the next one begins, so that it
only has to have begun. The newest slot has no deadline, because nothing came after it. Knows nothing else.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..video.frames import FRAMES_PER_CLIP


@dataclass(frozen=True)
class Course:
    """What happened. All times are wall-clock times in seconds."""

    completed: Sequence[float]
    """When the last frame of each clip of the source was there."""
    fed: Sequence[int]
    """For each clip that was fed, its index in `completed`."""
    visible: Sequence[float]
    """When each slot began. One more than clips were fed if the last slot has no clip."""
    slots: Sequence[int]
    """The slot that wrote each token, 1…"""
    times: Sequence[float]
    """When each token was written."""
    closed: bool
    """The last slot has begun: it writes the rest."""
    deadline: float | None = None
    """Seconds from a clip to its slot's deadline; None: until the source's next clip is complete."""
    greedy: bool = False
    """Slots write until the next one begins."""
    spoken: Sequence[bool] | None = None
    """Whether each token is text, and not one that ends a slot; None: all are."""


def spoken_flags(tokens: Sequence[int], end_of_slot: int | None) -> list[bool] | None:
    """`Course.spoken` of these `tokens`, for a model with the token `end_of_slot` or none."""
    return None if end_of_slot is None else [token != end_of_slot for token in tokens]


def figures(course: Course) -> dict:
    """The statistics as they are recorded: ages and times in seconds, rates per second, None if undefined."""
    begun = len(course.visible)
    seen = [course.completed[clip] for clip in course.fed[:begun]]
    newest = seen + seen[-1:] * (begun - len(seen))
    ages = [time - newest[slot - 1] for slot, time in zip(course.slots, course.times, strict=True)]
    live = [age for slot, age in zip(course.slots, ages, strict=True) if not course.closed or slot < begun]
    judged, missed = _deadlines(course)
    rate = _rate(course.visible[: len(seen)])
    spoken = course.times if course.spoken is None else list(itertools.compress(course.times, course.spoken))
    return {
        # How old the newest frame that a token could see was when the token was written.
        "age_of_newest_frame": _spread(ages),
        # The same without the last slot, which writes the rest of the answer after the source has ended.
        "age_of_newest_frame_before_last_slot": _spread(live),
        # From the moment the source's first clip was complete.
        "first_token_after_first_clip": course.times[0] - course.completed[0] if course.times else None,
        # Tokens of the text. The other statistics include those that end slots: to decide takes time too.
        "tokens": len(spoken),
        # Rates are measured from the first event to the last.
        "tokens_per_second": _rate(spoken),
        # Slots without text, of those that are over, where the model decides when to speak.
        "silent_slots": None if course.spoken is None else _silent(course),
        # Clips whose slot began, and how fast.
        "clips": len(seen),
        "clips_per_second": rate,
        "frames_per_second": None if rate is None else rate * FRAMES_PER_CLIP,
        # Clips that the source gave, and how fast.
        "source_clips": len(course.completed),
        "source_clips_per_second": _rate(course.completed),
        # The --deadline in seconds, the slots that had one, and how many of these missed it.
        "deadline": course.deadline,
        "deadlines": judged,
        "missed_deadlines": missed,
    }


def _deadlines(course: Course) -> tuple[int, int]:
    """How many slots had a deadline, and how many missed it."""
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


def _silent(course: Course) -> int:
    spoke = set(itertools.compress(course.slots, course.spoken or ()))
    return sum(slot not in spoke for slot in range(1, len(course.visible)))


def _rate(times: Sequence[float]) -> float | None:
    """Events per second, from the first to the last."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    return (len(times) - 1) / (times[-1] - times[0])


def _spread(values: Sequence[float]) -> dict | None:
    if not values:
        return None
    median, high = np.percentile(values, (50, 95))
    return {"median": float(median), "p95": float(high), "worst": float(max(values))}


def table(found: dict) -> str:
    """The statistics of `Watch.figures` for a terminal, one per line. Counts that are 0 and figures that are undefined
    are omitted."""
    rows = {}

    def add(name: str, *parts: str | None) -> None:
        """A line of the `parts` that are not None, if there are any."""
        if shown := [part for part in parts if part]:
            rows[name] = ", ".join(shown)

    def number(key: str, form: str) -> str | None:
        """`form` with the value of `key`, unless that is 0 or undefined."""
        return form.format(found[key]) if found[key] else None

    for name, key in (
        # Age of the newest frame that a token could see when it was written: median, 95th percentile, maximum.
        ("age of the newest frame", "age_of_newest_frame"),
        # The same before the source's last clip: after it, the rest is written and ages grow.
        ("  before the last slot", "age_of_newest_frame_before_last_slot"),
    ):
        if found[key]:
            add(name, "   ".join(f"{title} {found[key][part]:.3f} s" for title, part in SPREAD))
    # Seconds from the first complete clip to the first token.
    add("first token", number("first_token_after_first_clip", "{:.3f} s after the first clip"))
    # Tokens written, and how fast from the first to the last.
    add("tokens", str(found["tokens"]), number("tokens_per_second", "{:.2f}/s"))
    # Slots in which the model had decided to say nothing.
    add("silent slots", number("silent_slots", "{}"))
    # Clips whose slot began and how fast, of the clips that the source gave.
    add(
        "clips",
        str(found["clips"]),
        number("clips_per_second", "{:.2f}/s"),
        number("frames_per_second", "{:.1f} frames/s"),
    )
    add("clips of the source", str(found["source_clips"]), number("source_clips_per_second", "{:.2f}/s"))
    # Slots that had not written all their tokens when the next clip came, or after --deadline seconds.
    due = "when the next clip arrived" if found["deadline"] is None else f"{found['deadline']:g} s after its clip"
    add("missed deadlines", number("missed_deadlines", f"{{}} of {found['deadlines']} slots, each due {due}"))
    # Clips that were never fed because a newer one had come (--behind skip).
    add("clips skipped", number("clips_skipped", "{}"))
    # Clips of a camera or stream that came while the model was being prepared.
    add("clips before the start", number("clips_before_start", "{}"))
    # Clips that had come and whose slot had not begun: the most at once, and when the session ended.
    add("clips waiting", number("most_clips_waiting", "{} at most"), number("clips_waiting_at_end", "{} at the end"))
    # Frames of the source that could not be decoded.
    add("broken frames", number("broken_frames", "{}"))
    return "\n".join(f"{name:<26}{value}" for name, value in rows.items())


SPREAD = (("median", "median"), ("95th percentile", "p95"), ("maximum", "worst"))
