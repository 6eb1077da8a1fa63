"""Reads references with times: what happens in each video, and when.

A file with times has JSON Lines. Each row has a `video_id` and one of

- `segments`: [{"start": seconds, "end": seconds, "text": "…"}, …], as data rows with times have them. An event begins
  at `start`, and the content words of its text name it. `end` may be missing.
- `events`: [{"time": seconds, "words": ["red", "ring", "appears"]}, …], where all of the words together name the event,
  or with `text` in place of `words`. `end` may be given. The events of the demo's `truth.jsonl` are read as they are.

Other fields are ignored. An event without a content word, such as the text "It is.", cannot be found in a caption and
is left out.
"""

from collections.abc import Mapping
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from reading import get_id, get_seconds, read_records

from metrics.naming import Event

KINDS = ("segments", "events")
FIX = "fix or delete it"


def read_times(path: Path) -> dict[str, list[Event]]:
    """The events of each video in the file, by video id. Raises InputError, naming file and line."""
    videos: dict[str, list[Event]] = {}
    for where, row in read_records(path):
        video_id = get_id(where, row, "video_id")
        if (found := events_of(row, where)) is None:
            raise InputError(f"{where}: the row has neither segments nor events: {FIX}")
        if video_id in videos:
            raise InputError(f"{where}: is the second row of video {video_id}: delete one of them")
        videos[video_id] = found
    return videos


def events_of(row: Mapping, where: str) -> list[Event] | None:
    """The events of a row in order of time, or None if it has neither `segments` nor `events`. Raises InputError, with
    `where` the row is, for invalid ones."""
    kind = next((kind for kind in KINDS if row.get(kind) is not None), None)
    if kind is None:
        return None
    if not isinstance(row[kind], list):
        raise InputError(f"{where}: {kind} is not a list: {FIX}")
    found = [make_event(item, f"{where}, {kind[:-1]} {number}") for number, item in enumerate(row[kind], 1)]
    return sorted(filter(None, found), key=lambda event: event.time)


def make_event(item: object, where: str) -> Event | None:
    """An event from an item of `segments` or `events`, or None if it has no content word. Raises InputError."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: not an object: {FIX}")
    name = next((name for name in ("start", "time", "second") if name in item), "time")
    time = get_seconds(where, item.get(name), name)
    end = get_seconds(where, item["end"], "end") if item.get("end") is not None else None
    if end is not None and end < time:
        raise InputError(f"{where}: ends at {end:g} s, before it begins at {time:g} s: {FIX}")
    words, text = demo_words(item) or item.get("words"), item.get("text")
    if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
        return Event.from_keys(time, end, words)
    if words is None and isinstance(text, str):
        return Event.from_text(time, end, text)
    raise InputError(f"{where}: neither a text nor a list of words: {FIX}")


def demo_words(item: Mapping) -> list[str] | None:
    """The key words of an event of the demo: of a shape that appears its colour and kind, of another what it does, as
    in `turns red`; captions say "It" for a shape that was just named. None for other events."""
    if not all(isinstance(item.get(name), str) for name in ("shape", "colour", "event")):
        return None
    words = item["event"].split()
    if words != ["appears"]:
        return words
    return [item["colour"], item["shape"], *(words if item.get("second") else [])]
