"""Captions with times: which tokens each slot writes when every part of the text has a time.

A row's `segments` are a list of `{"start": seconds, "end": seconds, "text": string}`. They may overlap; to be written,
they are in order of the time that counts: `end`, or `start` for the segment times "start" and "spread".
Knows nothing about tokenizers, tensors and files.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..common.errors import InputError

TOLERANCE = 1.0
"""Seconds by which the last segment may end after the video, since published durations are rounded."""
SLACK = 1e-6
"""Seconds by which times may differ from rounding."""
WITHOUT_SPACES = "[\u2e80-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
"""Matches a character of a script that writes no spaces: Chinese and Japanese, with their punctuation."""
WORD = rf"{WITHOUT_SPACES}|(?:(?!{WITHOUT_SPACES})\S)+"
"""Matches a word. In Chinese and Japanese, each character is one."""

Token = TypeVar("Token")


@dataclass(frozen=True)
class TimedText:
    """The text of an answer in pieces, each with its time."""

    text: str
    ends: tuple[int, ...]
    """The index in `text` of the character after each piece."""
    times: tuple[float, ...]
    """When each piece may be written, in seconds; never less than that of the piece before."""


def join_segments(segments: Sequence[Mapping[str, Any]], when: str = "end") -> TimedText:
    """The texts of `segments`, stripped and joined by one space, and the time of each piece. `when` is one of
    `common.data_rows.SEGMENT_TIMES`.

    No space is added between two characters of which one is of a script without spaces. With "spread", a segment that
    overlaps the next is written before that starts.
    """
    text, ends, times = "", [], []
    nexts = [segment["start"] if when == "spread" else math.inf for segment in segments[1:]]
    for segment, following in zip(segments, [*nexts, math.inf], strict=False):
        start, end, own = segment["start"], min(segment["end"], following), " ".join(segment["text"].split())
        if text and own and not re.match(WITHOUT_SPACES, text[-1]) and not re.match(WITHOUT_SPACES, own[0]):
            text += " "
        words = [match.end() for match in re.finditer(WORD, own)] if when == "spread" else [len(own)]
        for stop in words:
            ends.append(len(text) + stop)
            times.append(start if when == "start" else start + (end - start) * stop / max(1, len(own)))
        text += own
    return TimedText(text, tuple(ends), tuple(times))


def row_caption(row: Mapping[str, Any]) -> str:
    """The caption of a data row: its `human_caption`, else the joined text of its `segments`."""
    caption = row.get("human_caption")
    return join_segments(row["segments"]).text if caption is None else caption


def check_segments(segments: Sequence[Mapping[str, Any]], seconds: float = math.inf, when: str | None = "end") -> None:
    """Raises InputError if `segments` cannot be trained on or scored: empty, before 0, more than TOLERANCE after the
    end of a video of `seconds`, or not in the order in which `when` writes their texts. With `when` None, for what is
    not written, any order will do. Numbers are counted from 1."""
    fix = "correct or remove the row"
    if not segments:
        raise InputError(f"it has no segments: {fix}")
    key = _order(when)
    before = -math.inf
    for number, segment in enumerate(segments, 1):
        start, end = segment["start"], segment["end"]
        name = f"segment {number} ({start:g} to {end:g} s)"
        if not (math.isfinite(start) and math.isfinite(end)):
            raise InputError(f"{name} has a time that is not a finite number: {fix}")
        if start < 0:
            raise InputError(f"{name} starts before 0: {fix}")
        if end < start:
            raise InputError(f"{name} ends before it starts: {fix}")
        if when is not None and segment[key] < before - SLACK:
            raise InputError(
                f"{name} {key}s before segment {number - 1} {key}s, at {before:g} s: sort the segments by {key}"
            )
        if end > seconds + TOLERANCE:
            raise InputError(f"{name} ends after the video, at {seconds:g} s: {fix}")
        if not segment["text"].strip():
            raise InputError(f"{name} has no text: {fix}")
        before = segment[key]


def in_order(segments: Sequence[dict[str, Any]], when: str) -> list[dict[str, Any]]:
    """`segments`, with their times as they are, in the order in which `when` writes their texts."""
    key = _order(when)
    return sorted(segments, key=lambda segment: (segment[key], segment["end"]))


def _order(when: str | None) -> str:
    """The field that gives the order of segments."""
    return "start" if when in ("start", "spread") else "end"


def token_times(timed: TimedText, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """When each token of `timed.text` may be written: the time of the piece with its last character, so that a token
    across two pieces has the later time. `offsets` are the characters (first, one past the last) of each token."""
    times, piece = [], 0
    for _, stop in offsets:
        while piece < len(timed.ends) - 1 and timed.ends[piece] < stop:
            piece += 1
        times.append(timed.times[piece])
    return times


def words_late(
    timed: TimedText, offsets: Sequence[tuple[int, int]], arrivals: Sequence[float], most: int
) -> list[float]:
    """How many seconds late `slot_tokens` writes each word of `timed.text`, whose tokens have these `offsets`: the
    arrival of the clip whose slot writes its last token, minus that of the first clip after its time. 0 unless earlier
    text has filled the slots."""
    times = token_times(timed, offsets)
    slots = slot_tokens(range(len(times)), times, arrivals, most, -1)
    slot_of = [number for number, slot in enumerate(slots) for token in slot if token >= 0]
    late, token = [], 0
    for word in re.finditer(WORD, timed.text):
        while offsets[token][1] < word.end() and token < len(offsets) - 1:
            token += 1
        due = next((arrival for arrival in arrivals if arrival + SLACK >= times[token]), arrivals[-1])
        late.append(arrivals[slot_of[token]] - due)
    return late


def arrival_times(clips: int, seconds_per_clip: float) -> list[float]:
    """When clips 1 … N have arrived, in seconds: each at its end."""
    return [number * seconds_per_clip for number in range(1, clips + 1)]


def slot_tokens(
    tokens: Sequence[Token],
    times: Sequence[float],
    arrivals: Sequence[float],
    most: int,
    end: Token,
    end_of_slot: Token | None = None,
) -> list[list[Token]]:
    """The tokens that each slot writes, one list for each of the N `arrivals`; their lengths are k_1 … k_N.

    `tokens` are the answer without its `end` token, with the `times` from which each may be written, in order. A slot,
    from its clip's arrival on, writes the tokens whose time has come, at most `most`. What does not fit runs on into
    the next slot, and a slot may be empty. The last slot writes the rest and `end`, and has no bound. With
    `end_of_slot`, every slot but the last ends with that token, which counts as one of its `most` tokens, unless the
    slot is full without it.
    """
    if not arrivals or most < 1 or len(times) != len(tokens):
        raise ValueError(f"{len(arrivals)} clips, at most {most} tokens, {len(tokens)} tokens with {len(times)} times")
    slots, done = [], 0
    for arrival in arrivals[:-1]:
        stop = done
        while stop < len(tokens) and stop - done < most and times[stop] <= arrival + SLACK:
            stop += 1
        slot = list(tokens[done:stop])
        if end_of_slot is not None and len(slot) < most:
            slot.append(end_of_slot)
        slots.append(slot)
        done = stop
    return [*slots, [*tokens[done:], end]]
