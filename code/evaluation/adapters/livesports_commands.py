"""The commands of LiveSports-3K-CC: rows of its events, predictions in its layout, and its judge."""

import argparse
import json
import logging

from json_lines import write_rows
from metrics.judge import open_judge
from metrics.preference import OPTIONS, PROMPT, TIE, check_prompt, compare, question, win_rate
from metrics.scoring import NotComputed
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_path
from results import CAPTION_FIELDS, load_finished
from settings import ROOT, check_limit, read_judge_options

from adapters import livesports
from adapters.files import check_output, count

logger = logging.getLogger(__name__)


def add_commands(add) -> None:
    """Add the commands with `add`, as `cli.make_parser` defines it."""
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


def livesports_rows(arguments: argparse.Namespace) -> None:
    source = find_path(arguments.benchmark, ROOT, "the benchmark")
    check_output(arguments.output, source)
    rows = list(livesports.make_rows(livesports.read_events(source).values(), arguments.question))
    write_rows(arguments.output, rows)
    videos = len({row["video_path"] for row in rows})
    print(f"{count(len(rows), 'event')} of {count(videos, 'video')}: {arguments.output}")
    if untimed := [row["video_id"] for row in rows if "segments" not in row]:
        why = "event_asr is missing, or not in order, or not within the event"
        print(f"{count(len(untimed), 'event')} without segments, since {why}; the first is {untimed[0]}")


def livesports_predictions(arguments: argparse.Namespace) -> None:
    source = find_path(arguments.benchmark, ROOT, "the benchmark")
    path = find_path(arguments.file, ROOT, "the result file")
    check_output(arguments.output, source, path)
    events = livesports.read_events(source)
    captions = {key: str(row["result"]) for key, row in load_finished(path, CAPTION_FIELDS, whole=True).items()}
    predictions = list(livesports.make_predictions(captions, events, path))
    write_rows(arguments.output, predictions)
    print(f"predictions for {len(predictions)} of {count(len(events), 'event')}: {arguments.output}")


def read_prompt(path: str) -> str:
    if not path:
        return PROMPT
    found = find_path(path, ROOT, "the prompt")
    try:
        prompt = found.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{found} cannot be read as UTF-8 text ({error}): give another --prompt") from error
    check_prompt(prompt, f"the prompt {found}")
    return prompt


def livesports_judge(arguments: argparse.Namespace) -> None:
    source = find_path(arguments.benchmark, ROOT, "the benchmark")
    mine = find_path(arguments.predictions, ROOT, "the predictions")
    other = find_path(arguments.baseline, ROOT, "the baseline's predictions")
    answers = arguments.output.with_name(f"{arguments.output.stem}.answers.jsonl")
    for path in (arguments.output, answers):
        check_output(path, source, mine, other)
    prompt = read_prompt(arguments.prompt)
    events = livesports.read_events(source)
    said, theirs = livesports.read_predictions(mine), livesports.read_predictions(other)
    pairs = livesports.pair_up((mine, said), (other, theirs), events, arguments.allow_missing)
    options = read_judge_options(arguments.judge_options)
    check_limit("judge_workers", arguments.judge_workers)
    judge = open_judge(arguments.judge_url, arguments.judge_model, options, arguments.judge_workers, question(prompt))
    try:
        outcomes = compare(judge, pairs, answers, prompt)
    except NotComputed as error:
        raise InputError(str(error)) from error
    names = {True: mine.stem, False: other.stem, None: TIE}
    write_rows(
        arguments.output,
        [
            {"video_event_id": key, "ab_winner": names[outcome.as_a], "ba_winner": names[outcome.as_b]}
            for key, outcome in outcomes.items()
        ],
    )
    ties = [outcome for outcome in outcomes.values() if outcome.reason]
    if ties:
        logger.warning("%s with a tie, which is not a win: %s", count(len(ties), "event"), ties[0].reason)
    missing = sum(key in theirs for key in events) - len(pairs)
    without = f"; not counted, without a prediction: {missing}" if missing else ""
    print(f"{mine.stem} wins {win_rate(outcomes.values()):.2f}% against {other.stem}, judged by {judge.model}")
    print(f"{count(len(outcomes), 'event')} in both orders{without}\nwinners: {arguments.output}")
