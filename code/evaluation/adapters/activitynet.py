"""Dense captions in the layout of ActivityNet Captions (Krishna et al., ICCV 2017).

A file of predictions is {"version", "results": {video: [{"sentence", "timestamp": [start, end]}]}, "external_data"},
and one of references {video: {"duration", "timestamps": [[start, end]], "sentences": []}}; times are in seconds.

A result file becomes predictions as follows. A sentence reaches from one sentence end to the next. Its span is that of
the clips from the slot of its first token to the slot of its last: slot i is written while clip i, which shows the
seconds i - 1 to i, is the newest that has been seen. So a sentence of the slots 3 to 5 has the span from 2 s to 5 s.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.naming import SENTENCE_END
from metrics.soda import Caption
from qwen_vl_streaming.common.errors import InputError
from reading import get_seconds, read_json

VERSION = "VERSION 1.0"


def split_sentences(pieces: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(sentence, first slot, last slot) of each sentence in the text that slots 1 … N = len(pieces) have written.

    `pieces` are what each slot added. Text without a letter or digit is dropped.
    """
    text = "".join(pieces)
    slots = [slot for slot, piece in enumerate(pieces, 1) for _ in piece]
    begin = 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[begin:end]
        if any(map(str.isalnum, sentence)):
            first = begin + len(sentence) - len(sentence.lstrip())
            stripped = sentence.strip()
            yield " ".join(stripped.split()), slots[first], slots[first + len(stripped) - 1]
        begin = end


def time_sentences(
    pieces: Sequence[str], start: float = 0.0, length: float | None = None, seconds_per_clip: float = 1.0
) -> list[dict[str, Any]]:
    """The predictions for one video. The part that was watched begins at `start` and lasts `length`, which cuts its
    last clip; all in seconds."""
    found = []
    for sentence, first, last in split_sentences(pieces):
        end = last * seconds_per_clip if length is None else min(last * seconds_per_clip, length)
        span = start + min((first - 1) * seconds_per_clip, end), start + end
        found.append({"sentence": sentence, "timestamp": [round(time, 3) for time in span]})
    return found


def make_predictions(results: Mapping[str, list[dict[str, Any]]], details: str) -> dict[str, Any]:
    """The file's contents. `details` say which data besides ActivityNet Captions the model was trained on."""
    return {"version": VERSION, "results": dict(results), "external_data": {"used": True, "details": details}}


def read_predictions(path: Path) -> dict[str, list[Caption]]:
    """The predictions in a file by video. Raises InputError, naming the video."""
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise InputError(f"{path} has no object 'results': give predictions in the layout of ActivityNet Captions")
    found = {}
    for video, captions in results.items():
        if not isinstance(captions, list) or not all(isinstance(caption, dict) for caption in captions):
            raise InputError(f"{path}, video {video}: not a list of sentences with a timestamp: correct it")
        places = [f"{path}, video {video}, sentence {number}" for number in range(1, len(captions) + 1)]
        found[video] = [
            _caption(place, caption.get("sentence"), caption.get("timestamp"), ordered=True)
            for place, caption in zip(places, captions, strict=True)
        ]
    if not found:
        raise InputError(f"{path} has no predictions: evaluate some videos first")
    return found


def read_references(path: Path) -> tuple[dict[str, list[Caption]], int]:
    """One annotator's references by video, and how many of them end before they start, as some published ones do; these
    match nothing. Raises InputError, naming the video."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} has no videos: give references in the layout of ActivityNet Captions, as val_1.json")
    found, backward = {}, 0
    for video, entry in content.items():
        sides = [entry.get(name) if isinstance(entry, dict) else None for name in ("timestamps", "sentences")]
        if not all(isinstance(side, list) and side for side in sides) or len(sides[0]) != len(sides[1]):
            raise InputError(f"{path}, video {video}: has no timestamps and sentences of the same number: correct it")
        found[video] = [
            _caption(f"{path}, video {video}, sentence {number}", sentence, span, ordered=False)
            for number, (span, sentence) in enumerate(zip(*sides, strict=True), 1)
        ]
        backward += sum(caption.span[1] < caption.span[0] for caption in found[video])
    return found, backward


def _caption(place: str, sentence: Any, span: Any, ordered: bool) -> Caption:
    if not isinstance(sentence, str):
        raise InputError(f"{place}: its sentence is {str(sentence)[:40]!r}, not a string: correct or delete it")
    if not isinstance(span, list) or len(span) != 2:
        raise InputError(f"{place}: its timestamp is {str(span)[:40]!r}, not [start, end]: correct or delete it")
    start, end = (get_seconds(place, time, "its timestamp") for time in span)
    if ordered and end < start:
        raise InputError(f"{place}: ends at {end:g} s, before its start at {start:g} s: correct or delete it")
    return Caption(sentence, (start, end))
