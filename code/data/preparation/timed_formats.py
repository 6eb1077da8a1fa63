"""Reads captions with times in the shapes in which they are published. Does not depend on where videos are.

Each reader yields one `Timed` per sample of a file or folder, in order. A sample that cannot be converted has an error;
a file that is not of the format at all raises InputError.
"""

import codecs
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.video_part import Part, video_part

from .subtitles import Cue, read_srt, read_webvtt


@dataclass
class Timed:
    """One sample: a video or a part of it, and its texts with times in seconds from the start of that."""

    where: str
    """The file and the line or key, for messages."""
    name: str = ""
    """Identifies it, if no other sample has the same name."""
    video: str = ""
    """The video's path, or its name without a suffix."""
    part: Part = field(default_factory=Part)
    """The part of the video, in seconds."""
    duration: float | None = None
    """The duration of the video according to the source."""
    seconds: float = 0.0
    """The measured length of the part."""
    segments: list[dict[str, Any]] = field(default_factory=list)
    question: str | None = None
    error: str = ""
    """Why it cannot be converted."""


class _Fault(Exception):
    """A sample cannot be converted; the message is the reason."""


def read_livecc(path: Path) -> Iterator[Timed]:
    """LiveCC's time-coded words (Live-CC-5M, Live-WhisperX-526K): JSON Lines, in each line a conversation of a user's
    message with a `video` and a `text`, and an assistant's with a `text_stream` of [start, end, word].

    Times count from the start of the whole video, also where `video_start` and `video_end` choose a part of it. The
    last line of the published files lists where the others begin, and is skipped.
    """
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        sample = Timed(f"{path}, line {number}")
        try:
            try:
                conversation = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except (ValueError, RecursionError) as error:  # or not UTF-8
                raise _Fault(f"row is not JSON: {error}") from error
            if isinstance(conversation, list) and all(isinstance(each, int) for each in conversation):
                continue
            _fill_livecc(sample, conversation)
        except _Fault as fault:
            sample.error = str(fault)
        yield sample


def _fill_livecc(sample: Timed, conversation: Any) -> None:
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        raise _Fault("row is not a conversation: a list of messages is needed")
    parts = [
        (message.get("role"), part)
        for message in conversation
        for part in (message.get("content") if isinstance(message.get("content"), list) else ())
        if isinstance(part, dict)
    ]
    videos = [part for role, part in parts if role == "user" and "video" in part]
    streams = [part["text_stream"] for role, part in parts if role == "assistant" and "text_stream" in part]
    if len(videos) != 1 or len(streams) != 1:
        raise _Fault(f"row has {len(videos)} videos and {len(streams)} text streams: one of each is needed")
    (video,), (words,) = videos, streams
    texts = [part["text"] for role, part in parts if role == "user" and isinstance(part.get("text"), str)]
    sample.question = next((text.strip() for text in texts if text.strip()), None)
    sample.video = _string(video["video"], "video")
    sample.name = Path(sample.video).stem
    try:
        sample.part = video_part(video)
    except InputError as error:
        raise _Fault(f"part of the video is not valid: {error}") from error
    begin = sample.part.get("start", 0.0)
    if sample.part:
        sample.name += f"_{begin:g}-{sample.part.get('end', math.inf):g}"
    if not isinstance(words, list) or not all(isinstance(word, list) and len(word) == 3 for word in words):
        raise _Fault("text_stream is not valid: a list of [start, end, word] is needed")
    sample.segments = [
        _segment(_time(first, "text_stream") - begin, _time(last, "text_stream") - begin, word)
        for first, last, word in words
        if str(word).strip()
    ]


def read_activitynet(path: Path) -> Iterator[Timed]:
    """Dense captions in ActivityNet Captions' shape: a JSON object {video: {"duration": seconds, "timestamps": [[start,
    end], …], "sentences": [text, …]}}. The video's file has the key as its name."""
    found = _parse_file(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is not in ActivityNet's format: give a JSON object with one entry per video")
    for key, entry in found.items():
        sample = Timed(f"{path}, {key}", key, key)
        try:
            if not isinstance(entry, dict):
                raise _Fault("entry is not an object")
            times, texts = entry.get("timestamps"), entry.get("sentences")
            if not isinstance(times, list) or not isinstance(texts, list) or len(times) != len(texts):
                raise _Fault("timestamps and sentences are not lists of the same length")
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in times):
                raise _Fault("timestamps are not pairs of start and end")
            if entry.get("duration") is not None:
                sample.duration = _time(entry["duration"], "duration")
            pairs = zip(times, texts, strict=True)
            sample.segments = [_segment(_time(a, "time"), _time(b, "time"), text) for (a, b), text in pairs]
        except _Fault as fault:
            sample.error = str(fault)
        yield sample


def read_joyai(path: Path) -> Iterator[Timed]:
    """JoyAI-VL-Interaction's annotations: a JSON list of {"video_name", "video_path", "question": [{"content",
    "time"}], "response": [{"content", "time"}]}, or a folder of such files. A time is a number or a string of seconds.

    A stream is asked one question, before the video: entries with several are not converted, and neither are those
    whose response comes before the question.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no .json file: give the file or folder of the annotations")
    for file in files:
        found = _parse_file(file)
        if not isinstance(found, list):
            raise InputError(f"{file} is not in JoyAI's format: give a JSON list of entries")
        for number, entry in enumerate(found, 1):
            sample = Timed(f"{file}, entry {number}")
            try:
                _fill_joyai(sample, entry)
            except _Fault as fault:
                sample.error = str(fault)
            yield sample


def _fill_joyai(sample: Timed, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise _Fault("entry is not an object")
    sample.video = _string(entry.get("video_path") or entry.get("video_name"), "video_name")
    sample.name = Path(sample.video).stem
    asked, said = entry.get("question") or [], entry.get("response")
    for name, items in (("question", asked), ("response", said)):
        if not isinstance(items, list) or not all(isinstance(each, dict) for each in items):
            raise _Fault(f"{name} is not valid: a list of objects with content and time is needed")
    if len(asked) > 1:
        raise _Fault(f"entry has several questions: {len(asked)}, and a stream is asked one")
    items = [(_time(each.get("time"), "time"), each.get("content")) for each in said]
    sample.segments = [_segment(time, time, text) for time, text in sorted(items, key=lambda item: item[0])]
    if asked:
        sample.question = _string(asked[0].get("content"), "question").strip() or None
        if sample.segments and sample.segments[0]["start"] < _time(asked[0].get("time") or 0, "time"):
            raise _Fault("response comes before its question")


def read_subtitles(pattern: str, read: Callable[[Path], list[Cue]]) -> Callable[[Path], Iterator[Timed]]:
    """A reader of subtitle files beside videos of the same name: one file, or all that match `pattern` in a folder and
    below."""

    def read_files(path: Path) -> Iterator[Timed]:
        files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path} has no {pattern} file: give the folder of the subtitles")
        for file in files:
            name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            sample = Timed(str(file), name, str(file.with_suffix("")))
            try:
                sample.segments = [_segment(cue.start, cue.end, cue.text) for cue in read(file)]
            except InputError as error:
                sample.error = f"subtitles are not valid: {error}"
            yield sample

    return read_files


@dataclass(frozen=True)
class Format:
    """A published shape of captions with times."""

    read: Callable[[Path], Iterator[Timed]]
    segment_time: str
    """When the text of a segment may be written, see `data_rows.SEGMENT_TIMES`."""


FORMATS = {
    # LiveCC's own training writes a word when the frame at its end has been seen.
    "livecc": Format(read_livecc, "end"),
    "activitynet": Format(read_activitynet, "end"),
    "joyai": Format(read_joyai, "end"),
    # The words of a subtitle are spoken one after the other.
    "srt": Format(read_subtitles("*.srt", read_srt), "spread"),
    "webvtt": Format(read_subtitles("*.vtt", read_webvtt), "spread"),
}
"""Add a format here."""


def _segment(start: float, end: float, text: Any) -> dict[str, Any]:
    return {"start": round(start, 3), "end": round(end, 3), "text": " ".join(_string(text, "text").split())}


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Fault(f"{name} is not text: {str(value)[:40]!r}")
    return value


def _time(value: Any, name: str) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _Fault(f"{name} is not a number of seconds: {str(value)[:40]!r}")
    return seconds


def _read_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a file of JSON Lines") from error


def _parse_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): correct it, or give another --format") from error
