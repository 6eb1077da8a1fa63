"""The commands of ActivityNet Captions: predictions in its layout, and SODA_c of predictions."""

import argparse
import json
import logging
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from identity import describe_model
from made import data_rows, load_made
from metrics import lag
from metrics.scorecard import find_decoder
from metrics.scoring import NotComputed, check_java
from metrics.soda import BEST, MERGED, soda_c, without_words
from metrics.timeliness import clip_seconds
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.common.video_part import part_seconds, video_part
from settings import ROOT

from adapters import activitynet
from adapters.files import check_output, count

logger = logging.getLogger(__name__)


def add_commands(add) -> None:
    """Add the commands with `add`, as `cli.make_parser` defines it."""
    text = "Put the sentences of a result file and their times into the layout of ActivityNet Captions."
    dense = add("activitynet-predictions", activitynet_predictions, text, "JSON of predictions")
    dense.add_argument("file", help="a result file, <variant>_infer.json")
    dense.add_argument("--external-data", default="", help="which data besides ActivityNet Captions trained the model")

    soda = add("activitynet-soda", activitynet_soda, "Compute SODA_c of predictions.", "JSON of scores", required=False)
    soda.add_argument("predictions", help="predictions in the layout of ActivityNet Captions")
    soda.add_argument("--references", nargs="+", required=True, help="a file per annotator, such as val_1.json")
    soda.add_argument(
        "--annotators", choices=(MERGED, BEST), default=MERGED,
        help="merged: the references of all annotators in one list; best: the best annotator of each video [merged]",
    )  # fmt: skip


def activitynet_predictions(arguments: argparse.Namespace) -> None:
    path = find_path(arguments.file, ROOT, "the result file")
    check_output(arguments.output, path)
    made, rows = load_made(path)
    asked, decode = data_rows(path, made, rows), find_decoder(path)
    results = {}
    try:
        for video, row in Progress(rows.items(), "sentences", unit="video"):
            pieces = lag.slot_texts(row, decode)
            results[video] = activitynet.time_sentences(pieces, *watched(asked[video]), clip_seconds(row))
    except ValueError as error:
        raise InputError(f"{path}: {error}: run eval.sh again") from error
    details = arguments.external_data or f"{Path(describe_model(made['model'])).name}: Qwen2.5-VL and its training data"
    write_file(arguments.output, json.dumps(activitynet.make_predictions(results, details), indent=1) + "\n")
    sentences = count(sum(map(len, results.values())), "sentence")
    print(f"{sentences} of {count(len(results), 'video')}: {arguments.output}")


def watched(row: Mapping[str, Any]) -> tuple[float, float | None]:
    """Where the part of the video that a row is about begins, and its length if that is known, in seconds."""
    part, duration = video_part(row), row.get("video_duration_in_s")
    start = part.get("start", 0.0)
    if isinstance(duration, int | float) and not isinstance(duration, bool) and 0 < duration < math.inf:
        return start, part_seconds(row["video_path"], part, float(duration))
    return start, part["end"] - start if "end" in part else None


def activitynet_soda(arguments: argparse.Namespace) -> None:
    path = find_path(arguments.predictions, ROOT, "the predictions")
    sources = [find_path(name, ROOT, "the references") for name in arguments.references]
    if arguments.output:
        check_output(arguments.output, path, *sources)
    check_java()
    predictions = activitynet.read_predictions(path)
    annotations = []
    for source in sources:
        references, backward = activitynet.read_references(source)
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
        f"{count(scores['predictions'], 'sentence')} and {count(scores['references'], 'reference')} of "
        f"{count(scores['videos'], 'video')}, annotators {scores['annotators']}"
    )
    if scores["missing"]:
        logger.warning("not counted, without predictions: %s", count(scores["missing"], "video"))
    if scores["extra"]:
        logger.warning("not counted, without references: %s", count(scores["extra"], "video"))
    if arguments.output:
        write_file(arguments.output, json.dumps(scores, indent=2) + "\n")
        print(f"scores: {arguments.output}")
