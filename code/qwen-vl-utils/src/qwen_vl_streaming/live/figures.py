"""Statistics of how well a live session kept up, from when clips arrived, slots began and tokens were written.

A slot meets its deadline if, by then, it has begun and written all its tokens. The deadline is when the source's next
clip is complete, or a set time after the slot's own clip is. A greedy slot writes until the next one begins, so that it
only has to have begun. The newest slot has no deadline, because nothing came after it. Knows only the record.
"""

from collections.abc import Sequence

import numpy as np

from ..sessions import GREEDY
from ..sessions.record import Record
from ..video.frames import FRAMES_PER_CLIP


def figures(record: Record, completed: Sequence[float], fed: Sequence[int], deadline: float | None = None) -> dict:
    """The statistics as they are recorded: ages and times in seconds, rates per second, None if undefined.

    Args:
        completed: When the last frame of each clip of the source was there, by the wall clock, as in `record`.
        fed: For each clip that was fed, its index in `completed`. The last slot may have no clip.
        deadline: Seconds from a clip to its slot's deadline. Default: until the source's next clip is complete.
    """
    begun, slots, times = len(record.visible), record.slots, record.times
    seen = [completed[clip] for clip in fed[:begun]]
    newest = seen + seen[-1:] * (begun - len(seen))
    ages = [time - newest[slot - 1] for slot, time in zip(slots, times, strict=True)]
    live = [age for slot, age in zip(slots, ages, strict=True) if not record.complete or slot < begun]
    judged, missed = _deadlines(record, completed, fed, deadline)
    rate = _rate(record.visible[: len(seen)])
    end_of_slot = record.template.end_of_slot
    spoken = [
        (slot, time) for slot, time, token in zip(slots, times, record.tokens, strict=True) if token != end_of_slot
    ]
    silent = {*range(1, begun)} - {slot for slot, _ in spoken}
    return {
        # How old the newest frame that a token could see was when the token was written.
        "age_of_newest_frame": _spread(ages),
        # The same without the last slot, which writes the rest of the answer after the source has ended.
        "age_of_newest_frame_before_last_slot": _spread(live),
        # From the moment the source's first clip was complete.
        "first_token_after_first_clip": times[0] - completed[0] if times else None,
        # Tokens of the text. The other statistics include those that end slots: to decide takes time too.
        "tokens": len(spoken),
        # Rates are measured from the first event to the last.
        "tokens_per_second": _rate([time for _, time in spoken]),
        # Slots without text, of those that are over, where the model decides when to speak.
        "silent_slots": None if end_of_slot is None else len(silent),
        # Clips whose slot began, and how fast.
        "clips": len(seen),
        "clips_per_second": rate,
        "frames_per_second": None if rate is None else rate * FRAMES_PER_CLIP,
        # Clips that the source gave, and how fast.
        "source_clips": len(completed),
        "source_clips_per_second": _rate(completed),
        # The --deadline in seconds, the slots that had one, and how many of these missed it.
        "deadline": deadline,
        "deadlines": judged,
        "missed_deadlines": missed,
    }


def _deadlines(
    record: Record, completed: Sequence[float], fed: Sequence[int], deadline: float | None
) -> tuple[int, int]:
    """How many slots had a deadline, and how many missed it."""
    judged = missed = 0
    finished = list(record.visible)
    if record.schedule != GREEDY:
        for slot, time in zip(record.slots, record.times, strict=True):
            finished[slot - 1] = time
    for clip, end in zip(fed, finished[:-1], strict=False):
        if deadline is not None:
            by = completed[clip] + deadline
        elif clip + 1 < len(completed):
            by = completed[clip + 1]
        else:
            continue
        judged, missed = judged + 1, missed + (end > by)
    return judged, missed


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
        ("age of the newest frame", "age_of_newest_frame"),
        ("  before the last slot", "age_of_newest_frame_before_last_slot"),
    ):
        if found[key]:
            parts = (("median", "median"), ("95th percentile", "p95"), ("maximum", "worst"))
            add(name, "   ".join(f"{title} {found[key][part]:.3f} s" for title, part in parts))
    add("first token", number("first_token_after_first_clip", "{:.3f} s after the first clip"))
    add("tokens", str(found["tokens"]), number("tokens_per_second", "{:.2f}/s"))
    add("silent slots", number("silent_slots", "{}"))
    add(
        "clips",
        str(found["clips"]),
        number("clips_per_second", "{:.2f}/s"),
        number("frames_per_second", "{:.1f} frames/s"),
    )
    add("clips of the source", str(found["source_clips"]), number("source_clips_per_second", "{:.2f}/s"))
    due = "when the next clip arrived" if found["deadline"] is None else f"{found['deadline']:g} s after its clip"
    add("missed deadlines", number("missed_deadlines", f"{{}} of {found['deadlines']} slots, each due {due}"))
    add("clips skipped", number("clips_skipped", "{}"))
    add("clips before the start", number("clips_before_start", "{}"))
    add("clips waiting", number("most_clips_waiting", "{} at most"), number("clips_waiting_at_end", "{} at the end"))
    add("broken frames", number("broken_frames", "{}"))
    return "\n".join(f"{name:<26}{value}" for name, value in rows.items())
