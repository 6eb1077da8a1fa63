"""Benchmarks from outside: makes rows of their data, puts captions of eval.sh into their layout, and scores them.

    python code/evaluation/external.py livesports-rows LiveSports-3K-CC.json --output livesports.jsonl
    python code/evaluation/external.py livesports-predictions group_infer.json --benchmark LiveSports-3K-CC.json \\
        --output group.jsonl
    python code/evaluation/external.py livesports-judge group.jsonl --baseline GPT-4o.jsonl \\
        --benchmark LiveSports-3K-CC.json --judge-url http://host:8000/v1 --judge-model NAME --output judged.jsonl
    python code/evaluation/external.py activitynet-predictions group_infer.json --output group_dense.json
    python code/evaluation/external.py activitynet-soda group_dense.json --references val_1.json val_2.json

Each command has its own --help.
"""

import argparse
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from identity import ARGUMENTS, describe_model, read_arguments
from metrics.judge import KEY, Judge
from metrics.preference import OPTIONS, PROMPT, TIE, check_prompt, compare, question, win_rate
from metrics.scoring import NotComputed, check_java
from metrics.soda import BEST, MERGED, soda_c, without_words
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.paths import find_data, find_model, find_path
from qwen_vl_streaming.common.progress import Progress, quiet_libraries
from qwen_vl_streaming.common.video_part import part_seconds, video_part
from qwen_vl_streaming.model.prompts import load_processor
from results import CAPTION_FIELDS, check_row, check_writable, load_finished
from settings import ROOT

from adapters import activitynet, livesports

logger = logging.getLogger(__name__)


def find(path: str, what: str) -> Path:
    return find_path(path, ROOT, what)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def check_output(output: Path, *inputs: Path) -> None:
    """Raise InputError if `output` cannot be written or is one of `inputs`."""
    check_writable(output)
    for path in inputs:
        if output.exists() and output.samefile(path):
            raise InputError(f"--output {output} would overwrite what is read: give another name")


def livesports_rows(arguments: argparse.Namespace) -> None:
    source = find(arguments.benchmark, "the benchmark")
    check_output(arguments.output, source)
    rows = list(livesports.make_rows(livesports.read_events(source).values(), arguments.question))
    write_lines(arguments.output, rows)
    videos = len({row["video_path"] for row in rows})
    print(f"{count(len(rows), 'event')} of {count(videos, 'video')}: {arguments.output}")
    if untimed := [row["video_id"] for row in rows if "segments" not in row]:
        why = "event_asr is missing, or not in order, or not within the event"
        print(f"{count(len(untimed), 'event')} without segments, since {why}; the first is {untimed[0]}")


def livesports_predictions(arguments: argparse.Namespace) -> None:
    source, path = find(arguments.benchmark, "the benchmark"), find(arguments.file, "the result file")
    check_output(arguments.output, source, path)
    events = livesports.read_events(source)
    captions = {key: str(row["result"]) for key, row in load_finished(path, CAPTION_FIELDS, whole=True).items()}
    predictions = list(livesports.make_predictions(captions, events, path))
    write_lines(arguments.output, predictions)
    print(f"predictions for {len(predictions)} of {count(len(events), 'event')}: {arguments.output}")


def make_judge(arguments: argparse.Namespace, prompt: str) -> Judge:
    """The judge of the flags, after a test. Raises InputError."""
    try:
        options = json.loads(arguments.judge_options)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise InputError(f"--judge-options {arguments.judge_options!r}: give a JSON object")
    if not 1 <= arguments.judge_workers <= 1000:
        raise InputError(f"--judge-workers {arguments.judge_workers}: give a number from 1 to 1000")
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY} contains a line break or an invalid character: set it to the key alone")
    judge = Judge(
        arguments.judge_url, arguments.judge_model, key, options, arguments.judge_workers, question=question(prompt)
    )
    judge.check()
    return judge


def read_prompt(path: str) -> str:
    if not path:
        return PROMPT
    found = find(path, "the prompt")
    try:
        prompt = found.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{found} cannot be read as UTF-8 text ({error}): give another --prompt") from error
    check_prompt(prompt, f"the prompt {found}")
    return prompt


def livesports_judge(arguments: argparse.Namespace) -> None:
    source = find(arguments.benchmark, "the benchmark")
    mine, other = find(arguments.predictions, "the predictions"), find(arguments.baseline, "the baseline's predictions")
    answers = arguments.output.with_name(f"{arguments.output.stem}.answers.jsonl")
    for path in (arguments.output, answers):
        check_output(path, source, mine, other)
    prompt = read_prompt(arguments.prompt)
    events = livesports.read_events(source)
    both = [(path, livesports.read_predictions(path)) for path in (mine, other)]
    pairs = livesports.pair_up(both[0], both[1], events, arguments.allow_missing)
    judge = make_judge(arguments, prompt)
    try:
        outcomes = compare(judge, pairs, answers, prompt)
    except NotComputed as error:
        raise InputError(str(error)) from error
    names = {True: mine.stem, False: other.stem, None: TIE}
    write_lines(
        arguments.output,
        [
            {"video_event_id": key, "ab_winner": names[outcome.as_a], "ba_winner": names[outcome.as_b]}
            for key, outcome in outcomes.items()
        ],
    )
    ties = [outcome for outcome in outcomes.values() if outcome.reason]
    if ties:
        logger.warning("%s with a tie, which is not a win: %s", count(len(ties), "event"), ties[0].reason)
    missing = sum(key in both[1][1] for key in events) - len(pairs)
    without = f"; not counted, without a prediction: {missing}" if missing else ""
    print(f"{mine.stem} wins {win_rate(outcomes.values()):.2f}% against {other.stem}, judged by {judge.model}")
    print(f"{count(len(outcomes), 'event')} in both orders{without}\nwinners: {arguments.output}")


def make_pieces(path: Path, rows: Mapping[str, dict], model: str) -> dict[str, list[str]]:
    """What each slot added to the caption of each row, by video. Tokens that end a slot, where the model decides when
    to speak, are not text. Raises InputError if the tokenizer is another."""
    from report.gallery import text_by_slot

    tokenizer = load_processor(find_model(model, ROOT)).tokenizer
    found = {}
    for video, row in Progress(rows.items(), "sentences", unit="video"):
        words = [pair for pair in zip(row["tokens"], row["slots"], strict=True) if pair[0] != row.get("end_of_slot")]
        spoken = Counter(slot for _, slot in words)
        counts = [spoken[slot] for slot in range(1, row["clips"] + 1)]
        found[video] = text_by_slot(tokenizer, [token for token, _ in words], counts)
        if "".join(found[video]) != row["result"]:
            raise InputError(
                f"{path}, video {video}: its tokens do not decode to its text with the tokenizer of {model}: "
                "run eval.sh again"
            )
    return found


def activitynet_predictions(arguments: argparse.Namespace) -> None:
    path = find(arguments.file, "the result file")
    check_output(arguments.output, path)
    made = read_arguments(path, ARGUMENTS)
    rows = load_finished(path, whole=True)
    if not rows:
        raise InputError(f"{path} has no rows: give a result file written by eval.sh")
    for video, row in rows.items():
        check_row(f"{path}, video {video!r}", row, made["variant"])
    data = find_data(made["data"], ROOT, "the evaluation data")
    asked = {str(row["video_id"]): row for _, row in read_data_rows(data)}
    if gone := [video for video in rows if video not in asked]:
        raise InputError(f"{data} has no row for video {gone[0]}: {path.name} was made from other data")
    pieces = make_pieces(path, rows, made["model"])
    results = {
        video: activitynet.time_sentences(pieces[video], *watched(asked[video]), seconds_per_clip(path, row))
        for video, row in rows.items()
    }
    details = arguments.external_data or f"{Path(describe_model(made['model'])).name}: Qwen2.5-VL and its training data"
    write_file(arguments.output, json.dumps(activitynet.make_predictions(results, details), indent=1) + "\n")
    sentences = count(sum(map(len, results.values())), "sentence")
    print(f"{sentences} of {count(len(results), 'video')}: {arguments.output}")


def seconds_per_clip(path: Path, row: Mapping[str, Any]) -> float:
    """The duration of a clip: 1 s unless the row of the result file at `path` says otherwise. Raises InputError."""
    seconds = row.get("seconds_per_clip", 1.0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise InputError(f"{path}, video {row['video_id']}: seconds_per_clip is {str(seconds)[:40]}: run eval.sh again")
    return float(seconds)


def watched(row: Mapping[str, Any]) -> tuple[float, float | None]:
    """Where the part of the video that a row is about begins, and its length if that is known, in seconds."""
    part, duration = video_part(row), row.get("video_duration_in_s")
    start = part.get("start", 0.0)
    if isinstance(duration, int | float) and not isinstance(duration, bool) and 0 < duration < math.inf:
        return start, part_seconds(row["video_path"], part, float(duration))
    return start, part["end"] - start if "end" in part else None


def activitynet_soda(arguments: argparse.Namespace) -> None:
    path = find(arguments.predictions, "the predictions")
    sources = [find(name, "the references") for name in arguments.references]
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


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str, output: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--output", type=Path, required=name != "activitynet-soda", help=output)
        return command

    benchmark = {"required": True, "help": "LiveSports-3K-CC.json, a JSON array or JSON Lines"}
    rows = add("livesports-rows", livesports_rows, "Make rows for eval.sh of LiveSports-3K-CC.", "JSON Lines of rows")
    rows.add_argument("benchmark", help=benchmark["help"])
    rows.add_argument(
        "--question", choices=(livesports.CONTEXT, livesports.NONE), default=livesports.CONTEXT,
        help="context: ask for commentary, with the title and the commentary so far; none: the built-in question "
        "[context]",
    )  # fmt: skip

    text = "Put the captions of a result file into the layout of LiveSports-3K-CC's predictions."
    made = add("livesports-predictions", livesports_predictions, text, "JSON Lines of predictions")
    made.add_argument("file", help="a result file, <variant>_infer.json, of rows that livesports-rows has written")
    made.add_argument("--benchmark", **benchmark)

    text = "Compare predictions with a baseline's by an LLM judge, in both orders, and print the win rate."
    judge = add("livesports-judge", livesports_judge, text, "JSON Lines of winners; the answers are kept beside it")
    judge.add_argument("predictions", help="JSON Lines of predictions; the file's name without its ending is the model")
    judge.add_argument("--baseline", required=True, help="predictions of the baseline, such as GPT-4o's")
    judge.add_argument("--benchmark", **benchmark)
    judge.add_argument("--judge-url", required=True, help="base URL of an OpenAI-compatible endpoint")
    judge.add_argument("--judge-model", required=True, help="model name of the judge at that endpoint")
    judge.add_argument("--judge-workers", type=int, default=8, help="parallel requests [8]")
    judge.add_argument(
        "--judge-options", default=json.dumps(OPTIONS), help="additional fields of each request, as a JSON object"
    )
    judge.add_argument("--prompt", default="", help="a file with another prompt, with {a}, {b} and {human}")
    judge.add_argument("--allow-missing", action="store_true", help="compare only the events that have a prediction")

    text = "Put the sentences of a result file and their times into the layout of ActivityNet Captions."
    dense = add("activitynet-predictions", activitynet_predictions, text, "JSON of predictions")
    dense.add_argument("file", help="a result file, <variant>_infer.json")
    dense.add_argument("--external-data", default="", help="which data besides ActivityNet Captions trained the model")

    soda = add("activitynet-soda", activitynet_soda, "Compute SODA_c of predictions.", "JSON of scores")
    soda.add_argument("predictions", help="predictions in the layout of ActivityNet Captions")
    soda.add_argument("--references", nargs="+", required=True, help="a file per annotator, such as val_1.json")
    soda.add_argument(
        "--annotators", choices=(MERGED, BEST), default=MERGED,
        help="merged: the references of all annotators in one list; best: the best annotator of each video [merged]",
    )  # fmt: skip
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    arguments.run(arguments)
