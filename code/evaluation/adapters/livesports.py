"""LiveSports-3K-CC (Chen et al., "LiveCC", CVPR 2025): commentary on events within sports videos.

Its data, LiveSports-3K-CC.json of the data set stdKonjac/LiveSports-3K, has an object per event: `video_id`, `event_id`
(counts within the video), `begin` and `end` (seconds in the video), `video` (file name), `event_title`,
`event_asr_text` (the human commentary), `event_asr` (its sentences, with their times in the video, as the JSON text of
a list of [start, end, text]), `preasr_text` (what was said before) and fields that are not read here. Its predictions,
which LiveCC's evaluation/livesports3kcc/llm_judge.py reads, are JSON Lines of `video_id`, `event_id`, `begin`, `end`
and `pred`. That script names an event `<video_id>_<event_id>`; here this is the row's `video_id`.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from json_lines import write_rows
from metrics.judge import open_judge
from metrics.preference import OPTIONS, PROMPT, TIE, check_prompt, compare, question, win_rate
from metrics.scoring import NotComputed
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.timeline.segments import check_segments, in_order
from reading import get_id, get_seconds, get_text, read_records
from results import CAPTION_FIELDS, check_output, load_finished
from settings import ROOT, check_limit, read_judge_options
from text import counted

logger = logging.getLogger(__name__)

CONTEXT, NONE = "context", "none"
"""Questions of rows."""


@dataclass(frozen=True)
class Event:
    video_id: str
    event_id: str | int
    begin: float
    end: float
    video: str
    human: str
    """The human commentary on it."""
    title: str = ""
    before: str = ""
    """The human commentary before the event."""
    segments: Sequence[dict[str, Any]] = ()
    """The sentences of the human commentary, from `begin` on; empty if their times are not known."""

    @property
    def key(self) -> str:
        return f"{self.video_id}_{self.event_id}"

    @property
    def question(self) -> str:
        """Asks for commentary, with the context that LiveCC gives too: the title and what was said before."""
        text = "Comment on this video live, as an expert commentator does."
        if self.title:
            text += f"\nThe title of the video: {self.title}"
        if self.before:
            text += f"\nThe commentary so far, which you continue: {self.before}"
        return text


def read_events(path: Path) -> dict[str, Event]:
    """The events of the benchmark's file, a JSON array or JSON Lines, by key. Raises InputError, naming the entry."""
    events: dict[str, Event] = {}
    for place, record in read_records(path):
        event = Event(
            get_id(place, record, "video_id"),
            get_id(place, record, "event_id") and record["event_id"],
            begin := get_seconds(place, record.get("begin"), "begin"),
            end := get_seconds(place, record.get("end"), "end"),
            get_text(place, record, "video"),
            get_text(place, record, "event_asr_text"),
            get_text(place, record, "event_title", optional=True),
            get_text(place, record, "preasr_text", optional=True),
            read_sentences(place, get_text(place, record, "event_asr", optional=True), begin, end),
        )
        if not event.begin < event.end:
            raise InputError(f"{place}: ends at {event.end:g} s, not after its begin at {event.begin:g} s: correct it")
        if not any(map(str.isalnum, event.human)):
            raise InputError(f"{place}: event_asr_text has no word: delete this entry")
        if event.key in events:
            raise InputError(f"{place}: is the second entry of event {event.key}: delete one of them")
        events[event.key] = event
    return events


def read_sentences(place: str, text: str, begin: float, end: float) -> list[dict[str, Any]]:
    """The segments in the `text` of `event_asr`, with times from `begin` on. They may overlap.
    Empty if the text is, or if they are not in order or not from `begin` to `end`. Raises InputError, naming the entry,
    for any other text."""
    try:
        segments = [
            {"start": round(first - begin, 3), "end": round(last - begin, 3), "text": " ".join(said.split())}
            for first, last, said in json.loads(text or "[]")
        ]
    except (AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{place}: event_asr is not a list of [start, end, text]: correct or delete it") from error
    ordered = in_order(segments, "spread")
    try:
        check_segments(ordered, end - begin, "spread")
    except InputError:
        return []
    return ordered if [each["text"] for each in ordered] == [each["text"] for each in segments] else []


def make_rows(events: Iterable[Event], question: str = CONTEXT) -> Iterator[dict[str, Any]]:
    """A row of our data for each event. `question` is CONTEXT for `Event.question`, or NONE for the built-in one."""
    for event in events:
        yield {
            "video_id": event.key,
            "video_path": event.video,
            "video_start": event.begin,
            "video_end": event.end,
            "human_caption": event.human,
            **({"segments": event.segments, "segment_time": "spread"} if event.segments else {}),
            **({"question": event.question} if question == CONTEXT else {}),
        }


def make_predictions(captions: Mapping[str, str], events: Mapping[str, Event], where: Path) -> Iterator[dict[str, Any]]:
    """The predictions for `captions` by key, in the order of the benchmark. `where` names their file in messages.

    Raises InputError for a caption of an event that the benchmark does not have.
    """
    if unknown := [key for key in captions if key not in events]:
        raise InputError(
            f"{where}, video {unknown[0]}: the benchmark has no such event ({len(unknown)} are unknown): evaluate rows "
            "that livesports-rows has written"
        )
    for key, event in events.items():
        if key in captions:
            yield {
                "video_id": event.video_id,
                "event_id": event.event_id,
                "begin": event.begin,
                "end": event.end,
                "pred": captions[key],
            }


def read_predictions(path: Path) -> dict[str, str]:
    """Commentary by key from a file of predictions. Raises InputError, naming the line."""
    found: dict[str, str] = {}
    for place, record in read_records(path):
        key = f"{get_id(place, record, 'video_id')}_{get_id(place, record, 'event_id')}"
        if key in found:
            raise InputError(f"{place}: is the second prediction for event {key}: delete one of them")
        found[key] = get_text(place, record, "pred")
    return found


def pair_up(
    model: tuple[Path, Mapping[str, str]],
    baseline: tuple[Path, Mapping[str, str]],
    events: Mapping[str, Event],
    allow_missing: bool = False,
) -> dict[str, tuple[str, str, str]]:
    """(the model's, the baseline's, the human) commentary by key, for the events that the judge compares: those of the
    baseline's predictions that the benchmark has. `model` and `baseline` are the files and their predictions.

    Raises InputError if the model has a prediction that cannot be compared, if none can, or, unless `allow_missing`, if
    it lacks one.
    """
    (path, said), (other, theirs) = model, baseline
    for key in said:
        for name, has in (("the benchmark", events), (str(other), theirs)):
            if key not in has:
                raise InputError(f"{path} has a prediction for event {key}, but {name} does not have it: remove it")
    asked = [key for key in events if key in theirs]
    missing = [key for key in asked if key not in said]
    if missing and not allow_missing:
        raise InputError(
            f"{path} has no prediction for {len(missing)} of {len(asked)} events of {other} (first: {missing[0]}): add "
            "them, or give --allow-missing to compare only the others"
        )
    if len(missing) == len(asked):
        raise InputError(f"{path} and {other} have no event of the benchmark in common: check both files")
    return {key: (said[key], theirs[key], events[key].human) for key in asked if key in said}


def add_commands(add) -> None:
    """Add the commands with `add`, as `cli.make_parser` defines it."""
    benchmark = {"required": True, "help": "LiveSports-3K-CC.json, a JSON array or JSON Lines"}
    rows = add("livesports-rows", run_rows, "Make rows for eval.sh of LiveSports-3K-CC.", "JSON Lines of rows")
    rows.add_argument("benchmark", help=benchmark["help"])
    rows.add_argument(
        "--question", choices=(CONTEXT, NONE), default=CONTEXT,
        help="context: ask for commentary, with the title and the commentary so far; none: the built-in question "
        "[context]",
    )  # fmt: skip

    text = "Put the captions of a result file into the layout of LiveSports-3K-CC's predictions."
    made = add("livesports-predictions", run_predictions, text, "JSON Lines of predictions")
    made.add_argument("file", help="a result file, <variant>_infer.json, of rows that livesports-rows has written")
    made.add_argument("--benchmark", **benchmark)

    text = "Compare predictions with a baseline's by an LLM judge, in both orders, and print the win rate."
    judge = add("livesports-judge", run_judge, text, "JSON Lines of winners; the answers are kept beside it")
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


def run_rows(arguments: argparse.Namespace) -> None:
    source = find_path(arguments.benchmark, ROOT, "the benchmark")
    check_output(arguments.output, source)
    rows = list(make_rows(read_events(source).values(), arguments.question))
    write_rows(arguments.output, rows)
    videos = len({row["video_path"] for row in rows})
    print(f"{counted(len(rows), 'event')} of {counted(videos, 'video')}: {arguments.output}")
    if untimed := [row["video_id"] for row in rows if "segments" not in row]:
        why = "event_asr is missing, or not in order, or not within the event"
        print(f"{counted(len(untimed), 'event')} without segments, since {why}; the first is {untimed[0]}")


def run_predictions(arguments: argparse.Namespace) -> None:
    source = find_path(arguments.benchmark, ROOT, "the benchmark")
    path = find_path(arguments.file, ROOT, "the result file")
    check_output(arguments.output, source, path)
    events = read_events(source)
    captions = {key: str(row["result"]) for key, row in load_finished(path, CAPTION_FIELDS, whole=True).items()}
    predictions = list(make_predictions(captions, events, path))
    write_rows(arguments.output, predictions)
    print(f"predictions for {len(predictions)} of {counted(len(events), 'event')}: {arguments.output}")


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


def run_judge(arguments: argparse.Namespace) -> None:
    source = find_path(arguments.benchmark, ROOT, "the benchmark")
    mine = find_path(arguments.predictions, ROOT, "the predictions")
    other = find_path(arguments.baseline, ROOT, "the baseline's predictions")
    check_output(arguments.output, source, mine, other)
    answers = arguments.output.with_name(f"{arguments.output.stem}.answers.jsonl")
    check_output(answers, source, mine, other)
    prompt = read_prompt(arguments.prompt)
    events = read_events(source)
    said, theirs = read_predictions(mine), read_predictions(other)
    pairs = pair_up((mine, said), (other, theirs), events, arguments.allow_missing)
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
        logger.warning("%s with a tie, which is not a win: %s", counted(len(ties), "event"), ties[0].reason)
    missing = sum(key in theirs for key in events) - len(pairs)
    without = f"; not counted, without a prediction: {missing}" if missing else ""
    print(f"{mine.stem} wins {win_rate(outcomes.values()):.2f}% against {other.stem}, judged by {judge.model}")
    print(f"{counted(len(outcomes), 'event')} in both orders{without}\nwinners: {arguments.output}")
