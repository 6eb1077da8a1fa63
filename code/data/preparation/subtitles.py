"""Reads the cues of SRT and WebVTT files. Does not depend on videos and rows.

SRT has no standard; what players accept is accepted: counters, hours and milliseconds may be missing, the decimal sign
is a comma or a point, and a text may have blank lines. WebVTT is read as its specification
(https://www.w3.org/TR/webvtt1) says. Of the markup, only times inside a cue are used: they start pieces of their own.
"""

import codecs
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError

SECONDS = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})"
TIME, SRT_TIME = rf"{SECONDS}[.,](\d{{1,3}})", rf"{SECONDS}(?:[.,](\d{{1,3}}))?"
TIMING, SRT_TIMING = (re.compile(rf"\s*{time}\s*-->\s*{time}(?:\s.*)?") for time in (TIME, SRT_TIME))
INNER_TIME = re.compile(rf"<{TIME}>")
SRT_TAG = re.compile(r"</?(?:b|i|u|s|font|c)\b[^>]*>|\{\\[^}]*\}", re.IGNORECASE)
VTT_TAG = re.compile(r"<[^>]*>")
ARROW = "-->"
PAUSE = 0.05
"""Seconds between two cues from which on the second is not a roll-up of the first."""


@dataclass(frozen=True)
class Cue:
    """A text on screen from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


def read_srt(path: Path) -> list[Cue]:
    """The cues of an SRT file with text, in the order of the file. Raises InputError, with the line, if it has none or
    a time is not valid."""
    lines = _read_lines(path)
    timings = [number for number, line in enumerate(lines) if re.match(rf"[\s\d:.,;-]*{ARROW}", line)]
    cues = []
    for number, following in zip(timings, [*timings, len(lines)][1:], strict=True):
        text = lines[number + 1 : following]
        while text and not text[-1].strip():
            text.pop()
        # What precedes the next times is its counter.
        if following < len(lines) and text and text[-1].strip().isdecimal() and lines[following - 1].strip():
            text.pop()
        start, end = _parse_timing(path, number, lines[number], SRT_TIMING)
        cues.append(Cue(start, end, _plain(" ".join(text), SRT_TAG)))
    return _with_text(path, cues)


def read_webvtt(path: Path) -> list[Cue]:
    """The cues of a WebVTT file with text, in the order of the file. Raises InputError, with the line, if it has none,
    is not WebVTT, or a time is not valid.

    A cue with times inside its text becomes one cue per piece. A line that repeats the last line of the cue before,
    without a pause, is dropped: such captions roll up, and it has been read.
    """
    lines = _read_lines(path)
    if not re.fullmatch(r"WEBVTT(?:[ \t].*)?", lines[0] if lines else ""):
        raise InputError(f"{path}, line 1: is not WebVTT, which begins with WEBVTT: correct or remove the file")
    cues: list[Cue] = []
    shown, shown_until = "", -1.0
    for number, block in _blocks(lines):
        at = next((index for index, line in enumerate(block[:2]) if ARROW in line), None)
        if at is None:  # NOTE, STYLE, REGION or the header
            continue
        start, end = _parse_timing(path, number + at, block[at], TIMING)
        text = [line for line in block[at + 1 :] if _plain(line, VTT_TAG)]
        if text and start - shown_until < PAUSE and _plain(text[0], VTT_TAG) == shown:
            text.pop(0)
        shown, shown_until = _plain(text[-1], VTT_TAG) if text else shown, end
        cues += _pieces(start, end, " ".join(text))
    return _with_text(path, cues)


def _pieces(start: float, end: float, text: str) -> Iterator[Cue]:
    """The parts of a cue between the times inside its text."""
    marks = [match for match in INNER_TIME.finditer(text) if start <= _seconds(match.groups()) <= end]
    times = [start, *(_seconds(match.groups()) for match in marks), end]
    edges = [0, *(match.start() for match in marks), len(text)]
    for index in range(len(edges) - 1):
        yield Cue(times[index], times[index + 1], _plain(text[edges[index] : edges[index + 1]], VTT_TAG))


def _with_text(path: Path, cues: list[Cue]) -> list[Cue]:
    if not any(cue.text for cue in cues):
        raise InputError(f"{path} has no cues with text: remove the file")
    return [cue for cue in cues if cue.text]


def _plain(text: str, tag: re.Pattern) -> str:
    return " ".join(html.unescape(tag.sub("", text)).split())


def _parse_timing(path: Path, number: int, line: str, timing: re.Pattern) -> tuple[float, float]:
    match = timing.fullmatch(line)
    if not match:
        raise InputError(f"{path}, line {number + 1}: {line.strip()[:60]!r} are not the times of a cue: correct them")
    start, end = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
    if end < start:
        raise InputError(f"{path}, line {number + 1}: the cue ends at {end:g} s, before it starts: correct its times")
    return start, end


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    return (
        3600 * int(hours or 0) + 60 * int(minutes or 0) + int(seconds or 0) + int((fraction or "").ljust(3, "0")) / 1000
    )


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """The runs of lines that are not empty, each with the index of its first line."""
    first = 0
    for number, line in enumerate([*lines, ""]):
        if not line:
            if number > first:
                yield first, lines[first:number]
            first = number + 1


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 with a byte order mark. Raises InputError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the file") from error
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: is not UTF-8: save the file as UTF-8") from error
    return re.split(r"\r\n|\r|\n", text.replace("\0", "\ufffd"))
