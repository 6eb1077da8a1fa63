"""Dense captions in the layout of ActivityNet Captions (Krishna et al., ICCV 2017).

A file of predictions is {"version", "results": {video: [{"sentence", "timestamp": [start, end]}]}, "external_data"},
and one of references {video: {"duration", "timestamps": [[start, end]], "sentences": []}}; times are in seconds.

A result file becomes predictions as follows. A sentence reaches from one sentence end to the next. Its span is that of
the clips from the slot of its first token to the slot of its last: slot i is written while clip i, which shows the
seconds i - 1 to i, is the newest that has been seen. So a sentence of the slots 3 to 5 has the span from 2 s to 5 s.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from checked_results import load_checked, source_rows
from identity import describe_model
from metrics import lag
from metrics.naming import SENTENCE_END
from metrics.scorecard import find_decoder
from metrics.scoring import NotComputed, check_java
from metrics.soda import BEST, MERGED, Caption, soda_c, without_words
from metrics.timeliness import clip_seconds
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.common.video_part import part_seconds, video_part
from reading import get_seconds, read_json
from results import check_output
from settings import ROOT
from tasks import video_seconds
from text import counted

logger = logging.getLogger(__name__)

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


def add_commands(add) -> None:
    """Add the commands with `add`, as `cli.make_parser` defines it."""
    text = "Put the sentences of a result file and their times into the layout of ActivityNet Captions."
    dense = add("activitynet-predictions", run_predictions, text, "JSON of predictions")
    dense.add_argument("file", help="a result file, <variant>_infer.json")
    dense.add_argument("--external-data", default="", help="which data besides ActivityNet Captions trained the model")

    soda = add("activitynet-soda", run_soda, "Compute SODA_c of predictions.", "JSON of scores", required=False)
    soda.add_argument("predictions", help="predictions in the layout of ActivityNet Captions")
    soda.add_argument("--references", nargs="+", required=True, help="a file per annotator, such as val_1.json")
    soda.add_argument(
        "--annotators", choices=(MERGED, BEST), default=MERGED,
        help="merged: the references of all annotators in one list; best: the best annotator of each video [merged]",
    )  # fmt: skip


def run_predictions(arguments: argparse.Namespace) -> None:
    path = find_path(arguments.file, ROOT, "the result file")
    check_output(arguments.output, path)
    made, rows = load_checked(path)
    asked, decode = source_rows(path, made, rows), find_decoder(path)
    results = {}
    for video, row in Progress(rows.items(), "sentences", unit="video"):
        try:
            pieces, seconds = lag.slot_texts(row, decode), clip_seconds(row)
        except ValueError as error:
            raise InputError(f"{path}: {error}: run eval.sh again") from error
        results[video] = time_sentences(pieces, *watched(asked[video]), seconds)
    details = arguments.external_data or f"{Path(describe_model(made['model'])).name}: Qwen2.5-VL and its training data"
    write_file(arguments.output, json.dumps(make_predictions(results, details), indent=1) + "\n")
    sentences = counted(sum(map(len, results.values())), "sentence")
    print(f"{sentences} of {counted(len(results), 'video')}: {arguments.output}")


def watched(row: Mapping[str, Any]) -> tuple[float, float | None]:
    """Where the part of the video that a row is about begins, and its length if that is known, in seconds."""
    part, duration = video_part(row), video_seconds(row)
    start = part.get("start", 0.0)
    if duration:
        return start, part_seconds(row["video_path"], part, duration)
    return start, part["end"] - start if "end" in part else None


def run_soda(arguments: argparse.Namespace) -> None:
    path = find_path(arguments.predictions, ROOT, "the predictions")
    sources = [find_path(name, ROOT, "the references") for name in arguments.references]
    if arguments.output:
        check_output(arguments.output, path, *sources)
    check_java()
    predictions = read_predictions(path)
    annotations = []
    for source in sources:
        references, backward = read_references(source)
        annotations.append(references)
        if backward:
            logger.warning("%s: references that end before they start, and so match nothing: %d", source, backward)
    for where, captions in zip((path, *sources), (predictions, *annotations), strict=True):
        if wordless := without_words(chain.from_iterable(captions.values())):
            logger.warning("%s: sentences without a word in ASCII, which METEOR scores 0: %d", where, wordless)
    try:
        scores = soda_c(predictions, annotations, arguments.annotators)
    except NotComputed as error:
        raise InputError(f"{path}: SODA_c was not computed: {error}") from error
    for name in ("SODA_c", "precision", "recall"):
        print(f"{name:<10}{scores[name]:>8.2f}")
    print(
        f"{counted(scores['predictions'], 'sentence')} and {counted(scores['references'], 'reference')} of "
        f"{counted(scores['videos'], 'video')}, annotators {scores['annotators']}"
    )
    if scores["missing"]:
        logger.warning("not counted, without predictions: %s", counted(scores["missing"], "video"))
    if scores["extra"]:
        logger.warning("not counted, without references: %s", counted(scores["extra"], "video"))
    if arguments.output:
        write_file(arguments.output, json.dumps(scores, indent=2) + "\n")
        print(f"scores: {arguments.output}")
