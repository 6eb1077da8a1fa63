"""Computes the timeliness of a file of captions, writes each event with the time at which it was named beside it, and
puts the result in words. Knows nothing about formulas, models and pages.

`<variant>_timeliness.jsonl` has a row per event: `video_id`, `event` (its text or key words), `time` (seconds), and
`said`, the time of the word that names it, or null, and `early`, whether that was before a frame of it had arrived.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from json_lines import write_rows
from qwen_vl_streaming.common.errors import InputError
from results import POINTS, SCORES, Row, hash_rows, sibling
from text import counted

from metrics.naming import Event
from metrics.references import events_of
from metrics.timeliness import WITHIN, TimesDoNotFit, events_within, measure, summarize

logger = logging.getLogger(__name__)

NAMES = {
    "events": "events",
    "delay_median": "delay",
    "delay_95": "95%",
    **{f"within_{limit}": f"≤ {limit} s" for limit in WITHIN},
    "never": "never",
    "early": "early",
    "TF1": "T-F1",
    "PAUC": "PAUC",
    "words_per_quiet_second": "quiet words/s",
}
"""The values of `summarize` that are shown, and the heads of their columns."""
ABOUT = (
    "A word of slot i counts as said when clip i has arrived. The delay (median and 95th percentile, in seconds) is "
    "from an event to the word that names it, over the events that were named after they began. The shares of events "
    "named within 1, 2 and 3 s, never, and early, only before a frame of them had arrived, are in percent of all "
    "events. T-F1 (SPOT-Bench) and PAUC (ProactiveVideoQA), times 100, follow their definitions with key words in "
    "place of a judge, so they are not comparable with published values. Quiet words/s are written where nothing has "
    "begun for 3 s."
)


def times_of(
    rows: Sequence[Row], captions: Path, times: Mapping[str, list[Event]] | None
) -> Mapping[str, list[Event]] | None:
    """What happens in the videos of `rows`: `times`, or else what their own `segments` say; None without either.

    Raises InputError for invalid segments.
    """
    if times is not None:
        return times
    own = {row["video_id"]: events_of(row, f"{captions}, video {row['video_id']}") for row in rows}
    found = {video_id: events for video_id, events in own.items() if events is not None}
    return found or None


def measure_file(
    rows: Sequence[Row], captions: Path, times: Mapping[str, list[Event]], decode: Callable[[list[int]], str]
) -> dict[str, float | int]:
    """The timeliness of the rows of the file `captions`, as `summarize` returns it, with `without_times`, the number of
    rows without events, `times_do_not_fit`, the number of rows that are skipped since an event begins long after their
    video has ended, `after_the_end`, the number of events that are skipped since their video has just ended, and
    `points`, the hash of the events, which are written beside `captions`. Raises ValueError, with the reason, as
    `measure` and `lag.check` do, and if no row has events that fit."""
    seen: dict[str, list[Event]] = {}
    wrong: list[str] = []
    for row in rows:
        if row["video_id"] in times:
            try:
                seen[row["video_id"]] = events_within(row, times[row["video_id"]])
            except TimesDoNotFit as error:
                wrong.append(str(error))
    timed = [row for row in rows if seen.get(row["video_id"])]
    if not timed:
        but = f" that fits ({wrong[0]})" if wrong else ""
        raise ValueError(f"none of the {len(rows)} videos of {captions.name} has a reference with times{but}")
    if wrong:
        logger.warning(
            "timeliness: skipped, as their times do not fit: %d of %d videos; %s", len(wrong), len(rows), wrong[0]
        )
    found = [measure(row, seen[row["video_id"]], decode) for row in timed]
    points = [
        {
            "video_id": row["video_id"],
            "event": one.event.text,
            "time": one.event.time,
            "said": one.said,
            "early": one.early,
        }
        for row, timing in zip(timed, found, strict=True)
        for one in timing.named
    ]
    write_rows(sibling(captions, POINTS), points)
    after = sum(len(times[video_id]) - len(events) for video_id, events in seen.items())
    counts = {"without_times": len(rows) - len(timed) - len(wrong), "times_do_not_fit": len(wrong)}
    return {**summarize(found), **counts, "after_the_end": after, "points": hash_rows(points)}


def _early(row: Mapping) -> bool:
    """Files of earlier versions do not have the field, and only the time counted."""
    return bool(row.get("early", row["said"] is not None and row["said"] <= row["time"]))


def read_points(captions: Path, expected: str | None = None) -> list[tuple[float, float | None, bool]]:
    """(time, said, early) of the events beside a file of captions; empty if there are none. Raises InputError if they
    cannot be read, or are not those with the hash `expected`, the `points` of `measure_file`."""
    path = sibling(captions, POINTS)
    fields = {"time": (int, float), "said": (int, float, type(None))}
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        if all(isinstance(row[name], kind) for row in rows for name, kind in fields.items()):
            if not rows or expected in (None, hash_rows(rows)):
                return [(row["time"], row["said"], _early(row)) for row in rows]
            reason = f"it is not of the timeliness in {sibling(captions, SCORES).name}"
        else:
            reason = "a row has no time"
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error)
    raise InputError(f"{path} cannot be read ({reason}): measure again with timeliness.py")


def describe(found: Mapping) -> str:
    """The timeliness of one file in a few lines."""
    if "not_computed" in found:
        return f"timeliness was not computed: {found['not_computed']}"
    delays = "no event was named after it began"
    if "delay_median" in found:
        delays = f"delay {found['delay_median']:.1f} s (median), {found['delay_95']:.1f} s (95%)"
    within = ", ".join(f"{found[f'within_{limit}']:.1f}% within {limit} s" for limit in WITHIN)
    events, videos = counted(found["events"], "event"), counted(found["videos"], "video")
    text = (
        f"{events} in {videos}: {delays}; {within}\n"
        f"never named {found['never']:.1f}%, only before they began {found['early']:.1f}%; "
        f"Timeliness-F1 {found['TF1']:.1f}, PAUC {found['PAUC']:.1f}"
    )
    if "words_per_quiet_second" in found:
        text += f"; {found['words_per_quiet_second']:.2f} words a second where nothing happens"
    if skipped := found["after_the_end"]:
        text += f"\nskipped, as they begin after the end of their video: {skipped} more"
    if skipped := found.get("times_do_not_fit"):
        text += f"\nskipped, as an event begins more than 1 s after the end: {counted(skipped, 'video')}"
    return text
