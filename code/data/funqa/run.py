"""One run from FunQA's annotation files and videos to the finished rows. The command line is in mani_data.py.

Training rows are the entries of the annotation file: a question and one answer each. A test row is a question, with all
its answers as references, so that nothing is generated twice.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from preparation.files import only_one, remove_parts, whole_file
from preparation.report import Tally, draw
from preparation.rules import BAD, KEPT, Rules, cheap_rules
from preparation.tokens import find_tokenizer, load_counter
from preparation.videos import relative
from qwen_vl_streaming.common.errors import InputError

from .annotations import SUBTASKS, Entry, read_annotations, read_entries
from .sources import Source, find_sources
from .videos import Measured, Place, choose, look_at

logger = logging.getLogger(__name__)

STATE_FOLDER = ".mani_data"
TOO_MANY_QUESTIONS = "more questions than --max-questions"
TOO_MANY_REFERENCES = "more answers than --max-references"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    splits: list[str]
    """train, test or both."""
    source: Path
    """The folder with the annotation files and the videos, or zip files of them."""
    outputs: dict[str, Path]
    """Split -> the JSONL file to write."""
    root: Path
    """The project's root, to which the paths in rows are relative."""
    videos: Path
    """Where videos from zip files belong: a folder a split."""
    output_dir: Path
    """Where the report and the state of the run lie."""
    hub_name: str
    """The hub's dataset, used where `source` holds no annotation file; empty to insist on the disk."""
    rules: Rules
    tokenizer: str
    """A model on the hub, or a folder with tokenizer.json; used only where a rule needs it."""
    max_samples: int | None
    """At most so many training rows, drawn by `seed`."""
    seed: int
    max_questions: int | None
    """At most so many questions about each video and sub-task in the test rows, in the file's order."""
    max_references: int | None
    """At most so many answers to each question in the test rows, in the file's order."""
    workers: int | None
    """Processes; None for one a core, and four where the hub has to be waited for."""


@dataclass
class Question:
    """A row in the making."""

    entry: Entry
    """The first entry that it stands for."""
    number: int
    """Counts the rows of a video and sub-task."""
    answers: list[str] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)

    @property
    def video_id(self) -> str:
        return f"{self.entry.stem}:{self.entry.task}:{self.number}"


def prepare_funqa(options: Options) -> dict[str, Tally]:
    """Read, measure, filter, write. Returns what became of the entries of each split.

    Raises InputError for whatever the user can mend; what was finished by then is kept and not done again.
    """
    with only_one(options.output_dir / STATE_FOLDER):
        remove_parts(options.output_dir)
        remove_parts(options.videos)
        sources = find_sources(options.splits, options.source, options.videos, options.hub_name)
        count_tokens = None
        if options.rules.counts_tokens:
            count_tokens = load_counter(find_tokenizer(options.tokenizer, options.root))
        tallies = {split: Tally() for split in sources}
        with whole_file(options.output_dir / "funqa_skipped.jsonl") as skipped:
            for split, source in sources.items():
                _prepare_split(split, source, options, count_tokens, tallies[split], skipped)
        draw(tallies, options.rules, options.output_dir / "funqa_report.png")
        splits = {split: tally.numbers() for split, tally in tallies.items()}
        with whole_file(options.output_dir / "funqa_report.json") as file:
            file.write(json.dumps({"rules": options.rules.numbers(), "splits": splits}, indent=2) + "\n")
    return tallies


def _prepare_split(
    split: str,
    source: Source,
    options: Options,
    count_tokens: Callable[[list[str]], list[int]] | None,
    tally: Tally,
    skipped: IO[str],
) -> None:
    entries = list(read_entries(read_annotations(source.annotations, source.name), source.name))
    places = {
        video: choose(video, source.videos)
        for video in sorted({entry.video for entry in entries if not entry.dropped and not entry.fault})
    }
    found = [place for place, _ in places.values() if place]
    if places and not found:
        raise InputError(
            f"none of the {len(places)} videos that {source.name} names is in {options.source}, such as "
            f"{next(iter(places))}: put {split}.zip or its videos there"
        )
    streaming = any(place.archive and place.archive.repository for place in found)
    workers = options.workers or len(os.sched_getaffinity(0)) * (4 if streaming else 1)
    measured = look_at(found, options.output_dir / STATE_FOLDER / f"funqa-{split}-videos.jsonl", workers, split)

    def fate(entry: Entry) -> tuple[str, float | None, str]:
        """(outcome, seconds, reason) by all but the tokens."""
        if entry.dropped:
            return entry.dropped, None, ""
        place, fault = places[entry.video] if not entry.fault else (None, entry.fault)
        video = measured[place] if place else Measured(fault=fault)
        if video.fault:
            return BAD, None, video.fault
        return cheap_rules(entry.answer, video.seconds, options.rules) or KEPT, video.seconds, ""

    fates = [fate(entry) for entry in entries]
    tokens: dict[str, int] = {}
    if count_tokens:
        answers = sorted({entry.answer for entry, (outcome, *_) in zip(entries, fates, strict=True) if outcome == KEPT})
        tokens = dict(zip(answers, count_tokens(answers) if answers else [], strict=True))
    rows = Rows(split == "test", options)
    for entry, (outcome, seconds, reason) in zip(entries, fates, strict=True):
        count = tokens.get(entry.answer) if outcome == KEPT else None
        if outcome == KEPT and count is not None:
            outcome = token_rule(count, seconds, options.rules)
        if not entry.dropped and not entry.fault:
            outcome = rows.add(entry, outcome)
        tally.add(outcome, seconds, count, reason)
        if outcome == BAD:
            line = {"split": split, "video_id": entry.stem or None, "where": entry.where, "reason": reason}
            skipped.write(json.dumps(line, ensure_ascii=False) + "\n")
    drawn = rows.draw(options.max_samples if split == "train" else None, options.seed)
    tally.not_drawn = len(rows.made) - len(drawn)
    tally.tasks = Counter({task: sum(row.entry.task == task for row in drawn) for task in SUBTASKS})
    with whole_file(options.outputs[split]) as file:
        for row in drawn:
            place = places[row.entry.video][0]
            file.write(write_row(row, place, measured[place].seconds, split == "test", options.root))
            tally.rows += 1
    for task, count in tally.tasks.items():
        if not count:
            logger.warning("%s: no row of sub-task %s", options.outputs[split].name, task)


def token_rule(tokens: int, seconds: float, rules: Rules) -> str:
    """KEPT, or the rule by which an answer's tokens a second drop it."""
    if tokens < rules.min_tokens_per_second * seconds:
        return "too few tokens per second"
    return "too many tokens per second" if tokens > rules.max_tokens_per_second * seconds else KEPT


class Rows:
    """Collects entries into rows: one an entry, or with `by_question` one a question, with its answers."""

    def __init__(self, by_question: bool, options: Options):
        self.by_question, self.options = by_question, options
        self.questions: dict[tuple[str, ...], Question] = {}
        self.numbers: Counter[tuple[str, str]] = Counter()

    def add(self, entry: Entry, outcome: str) -> str:
        """Take in an entry, which got `outcome` so far; returns what it has got in the end.

        Those that are left out count too, so that ids do not depend on the rules.
        """
        about = (entry.stem, entry.task)
        key = (entry.video, entry.task, entry.question) if self.by_question else (entry.where,)
        if key not in self.questions:
            self.numbers[about] += 1
            self.questions[key] = Question(entry, self.numbers[about])
        question = self.questions[key]
        if outcome != KEPT:
            return outcome
        if self.by_question and question.number > (self.options.max_questions or question.number):
            return TOO_MANY_QUESTIONS
        if self.by_question and len(question.answers) == self.options.max_references:
            return TOO_MANY_REFERENCES
        question.answers.append(entry.answer)
        question.identities += [entry.identity] if entry.identity else []
        return KEPT

    @property
    def made(self) -> list[Question]:
        """Those with an answer, in the file's order."""
        return [question for question in self.questions.values() if question.answers]

    def draw(self, limit: int | None, seed: int) -> list[Question]:
        """Up to `limit` of `made`. The draw depends on the seed and the ids only."""
        if limit is None:
            return self.made

        def draw_key(question: Question) -> bytes:
            return hashlib.sha256(f"{seed}:{question.video_id}".encode()).digest()

        drawn = {question.video_id for question in sorted(self.made, key=draw_key)[:limit]}
        return [question for question in self.made if question.video_id in drawn]


def write_row(question: Question, place: Place, seconds: float, references: bool, root: Path) -> str:
    """The finished JSON line. `references` adds all answers to the first."""
    row: dict[str, Any] = {
        "video_id": question.video_id,
        "video_path": relative(place.file, root),
        "video_duration_in_s": seconds,
        "task": question.entry.task,
        "question": question.entry.question,
        "human_caption": question.answers[0],
    }
    if references:
        row["references"] = question.answers
    if question.identities:
        row["funqa_ids"] = question.identities
    return json.dumps(row, ensure_ascii=False) + "\n"
