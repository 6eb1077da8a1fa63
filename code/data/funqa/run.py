"""Runs FunQA's preparation from annotation files and videos to rows. The command line is in mani_data.py.

A training row is an entry of the annotation file: a question and one answer. A test row is a question with all its
answers as references, so that evaluation generates one answer per question.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from preparation.inspection import Inspection, inspect_videos
from preparation.report import SplitStatistics
from preparation.rules import BAD, KEPT, Decision, duration_and_prefix_rules, speaking_rate_rule
from preparation.run import RunOptions, exclusive_run, sampling_key, skipped_line, write_report, write_rows
from preparation.tokens import find_tokenizer, load_counter
from preparation.videos import relative_path
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write

from .annotations import SUBTASKS, Entry, read_annotations, read_entries
from .sources import Source, find_sources
from .videos import VideoFile, check_videos, find_video_file

logger = logging.getLogger(__name__)

TOO_MANY_QUESTIONS = "more questions than --max-questions"
TOO_MANY_REFERENCES = "more answers than --max-references"


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of FunQA's preparation."""

    splits: list[str]
    """train, test or both."""
    source: Path
    """The folder with the annotation files and the videos, or zip files of them."""
    max_questions: int | None
    """Maximum number of questions per video and sub-task in the test rows, in the order of the file."""
    max_references: int | None
    """Maximum number of answers per question in the test rows, in the order of the file."""

    def recorded(self) -> dict:
        return {**super().recorded(), "max_questions": self.max_questions, "max_references": self.max_references}


@dataclass
class Question:
    """A row that is being collected."""

    entry: Entry
    """The first entry of the row."""
    number: int
    """Index of the row among those of its video and sub-task, from 1."""
    answers: list[str] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)

    @property
    def video_id(self) -> str:
        """The id of the row: video, sub-task and number."""
        return f"{self.entry.stem}:{self.entry.task}:{self.number}"


def prepare_funqa(options: Options) -> dict[str, SplitStatistics]:
    """Read, check, filter and write FunQA's rows. Returns the statistics of each split.

    Raises InputError for user errors. Running again resumes from what was finished.
    """
    with exclusive_run(options):
        sources = find_sources(options.splits, options.source, options.videos, options.hub_name)
        count_tokens = None
        if options.rules.counts_tokens:
            count_tokens = load_counter(find_tokenizer(options.tokenizer, options.root))
        statistics = {split: SplitStatistics() for split in sources}
        with atomic_write(options.skipped) as skipped:
            for split, source in sources.items():
                _prepare_split(split, source, options, count_tokens, statistics[split], skipped)
        write_report(statistics, options)
    return statistics


def _prepare_split(
    split: str,
    source: Source,
    options: Options,
    count_tokens: Callable[[list[str]], list[int]] | None,
    statistics: SplitStatistics,
    skipped: IO[str],
) -> None:
    entries = list(read_entries(read_annotations(source.annotations, source.name), source.name))
    videos = _check_videos(split, source, options, entries)

    def apply_rules(entry: Entry) -> Decision:
        """All rules except those on tokens."""
        if entry.dropped:
            return Decision(entry.dropped)
        error = entry.error or videos[entry.video][1].error
        if error:
            return Decision(BAD, error)
        seconds = videos[entry.video][1].seconds
        return Decision(duration_and_prefix_rules(entry.answer, seconds, options.rules) or KEPT, seconds=seconds)

    decisions = [apply_rules(entry) for entry in entries]
    tokens: dict[str, int] = {}
    if count_tokens:
        answers = sorted({entry.answer for entry, d in zip(entries, decisions, strict=True) if d.outcome == KEPT})
        tokens = dict(zip(answers, count_tokens(answers) if answers else [], strict=True))
    rows = Rows(split == "test", options)
    for entry, decision in zip(entries, decisions, strict=True):
        if decision.outcome == KEPT and entry.answer in tokens:
            decision.tokens = tokens[entry.answer]
            decision.outcome = speaking_rate_rule(decision.tokens, decision.seconds, options.rules) or KEPT
        if not entry.dropped and not entry.error:
            decision.outcome = rows.add(entry, decision.outcome)
        statistics.add(decision.outcome, decision.seconds, decision.tokens, decision.reason)
        if decision.outcome == BAD:
            skipped.write(skipped_line(split, entry.stem, entry.where, decision.reason))
    sampled = rows.sample(options.max_samples if split == "train" else None, options.seed)
    statistics.not_drawn = len(rows.complete) - len(sampled)
    statistics.tasks = Counter({task: sum(row.entry.task == task for row in sampled) for task in SUBTASKS})
    with write_rows(options.outputs[split]) as file:
        for row in sampled:
            video, checked = videos[row.entry.video]
            file.write(write_row(row, video, checked.seconds, split == "test", options.root))
            statistics.rows += 1
    for task, count in statistics.tasks.items():
        if not count:
            logger.warning("%s has no rows of sub-task %s", options.outputs[split].name, task)


def _check_videos(
    split: str, source: Source, options: Options, entries: list[Entry]
) -> dict[str, tuple[VideoFile | None, Inspection]]:
    """Find and check the videos of `entries`; by file name. Raises InputError if none is found."""
    names = sorted({entry.video for entry in entries if not entry.dropped and not entry.error})
    located = {name: find_video_file(name, source.videos) for name in names}
    found = [video for video, _ in located.values() if video]
    if names and not found:
        raise InputError(
            f"none of the {len(names)} videos of {source.name} is in {options.source}, for example {names[0]}: "
            f"put {split}.zip or its videos there"
        )
    workers = options.worker_count(from_hub=any(video.archive and video.archive.repository for video in found))
    journal = options.state_folder / f"funqa-{split}-videos.jsonl"
    checked = inspect_videos(found, check_videos, journal, workers, split)
    return {
        name: (video, checked[video.key] if video else Inspection(error=error))
        for name, (video, error) in located.items()
    }


class Rows:
    """Collects entries into rows: one per entry, or with `by_question` one per question with all its answers."""

    def __init__(self, by_question: bool, options: Options):
        self.by_question, self.options = by_question, options
        self.questions: dict[tuple[str, ...], Question] = {}
        self.numbers: Counter[tuple[str, str]] = Counter()

    def add(self, entry: Entry, outcome: str) -> str:
        """Add an entry whose outcome so far is `outcome`. Returns its final outcome.

        Skipped entries are numbered too, so that ids do not depend on the rules.
        """
        video_task = (entry.stem, entry.task)
        key = (entry.video, entry.task, entry.question) if self.by_question else (entry.where,)
        if key not in self.questions:
            self.numbers[video_task] += 1
            self.questions[key] = Question(entry, self.numbers[video_task])
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
    def complete(self) -> list[Question]:
        """The rows with an answer, in the order of the file."""
        return [question for question in self.questions.values() if question.answers]

    def sample(self, limit: int | None, seed: int) -> list[Question]:
        """Up to `limit` complete rows, in the order of the file. The sample depends on the seed and the ids only."""
        ids = sorted((row.video_id for row in self.complete), key=lambda video_id: sampling_key(seed, video_id))
        sampled = set(ids[:limit])
        return [row for row in self.complete if row.video_id in sampled]


def write_row(question: Question, video: VideoFile, seconds: float, references: bool, root: Path) -> str:
    """Return a row as a JSON line. With `references`, it lists all answers, not only the first."""
    row: dict[str, Any] = {
        "video_id": question.video_id,
        "video_path": relative_path(video.file, root),
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
