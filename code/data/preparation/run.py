"""What every data set's run shares: its options, its lock, sampling by seed, and the files that it reports in."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write

from .files import exclusive_lock, remove_partial_files
from .report import SplitStatistics, plot
from .rules import Rules

logger = logging.getLogger(__name__)

STATE_FOLDER = ".mani_data"
"""Below the output folder: what a killed run resumes from."""
HUB_WORKERS_PER_CORE = 4  # workers that read from the hub mostly wait for it


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every data set."""

    outputs: dict[str, Path]
    """Split -> the JSONL file to write."""
    root: Path
    """The project's root, to which the paths in rows are relative."""
    videos: Path
    """Videos from shards and archives are unpacked to <videos>/<split>."""
    output_dir: Path
    """Folder of the report and of the state that a killed run resumes from."""
    hub_name: str
    """The data set on the hub, used where nothing is found on disk; empty to never use the hub."""
    rules: Rules
    tokenizer: str
    """A model on the hub, or a folder with tokenizer.json."""
    max_samples: int | None
    """Maximum number of training rows, sampled by `seed`; None for all."""
    seed: int
    workers: int | None
    """Worker processes; None for one per core, or four per core when reading from the hub."""
    prefix: str = ""
    """Of the names of the reports."""

    @property
    def skipped(self) -> Path:
        """A line for each sample that cannot be used."""
        return self.output_dir / f"{self.prefix}skipped.jsonl"

    @property
    def state_folder(self) -> Path:
        return self.output_dir / STATE_FOLDER

    def recorded(self) -> dict:
        """What decides which rows are written, for report.json."""
        deciding = {"max_samples": self.max_samples, "seed": self.seed, "tokenizer": self.tokenizer}
        return {"rules": self.rules.as_json(), **deciding}

    def worker_count(self, from_hub: bool) -> int:
        """The number of worker processes."""
        return self.workers or len(os.sched_getaffinity(0)) * (HUB_WORKERS_PER_CORE if from_hub else 1)


@contextmanager
def exclusive_run(options: RunOptions) -> Iterator[None]:
    """Lock the output folder and remove what a killed run left half-written. Raises InputError if it is locked."""
    with exclusive_lock(options.state_folder):
        remove_partial_files(options.output_dir)
        remove_partial_files(options.videos)
        yield


class _NoRows(Exception):
    pass


@contextmanager
def write_rows(path: Path) -> Iterator[IO[str]]:
    """Like `atomic_write`, but leaves `path` as it is if no row is written."""
    with suppress(_NoRows), atomic_write(path) as rows:
        yield rows
        if not rows.tell():
            raise _NoRows


def check_rows(statistics: dict[str, SplitStatistics], options: RunOptions) -> None:
    """Raises InputError, with the place and the reason of the first sample that is not used, if a split has no rows."""
    for split, found in statistics.items():
        if found.rows:
            continue
        summary, output = found.summary(), options.outputs[split]
        if not summary["samples"]:
            raise InputError(f"{split} has no samples, so {output} is not written: check the data")
        none = f"none of the {summary['samples']} samples of {split} is kept, so {output} is not written"
        none += " and still has the rows of an earlier run" if output.exists() else ""
        with open(options.skipped, encoding="utf-8") as lines:
            first = next((line for line in map(json.loads, lines) if line["split"] == split), None)
        counts = summary["dropped"] | {"bad": summary["bad"]}
        why = ", ".join(f"{count} {rule}" for rule, count in counts.items() if count)
        if first:
            why += f". The first of {options.skipped.name}, {first['where']}: {first['reason']}"
        raise InputError(f"{none}: {why}")


def sampling_key(seed: int, video_id: str) -> bytes:
    """Sorting by this key shuffles rows. A row's place depends on the seed and the ids only, not on the input order."""
    return hashlib.sha256(f"{seed}:{video_id}".encode()).digest()


def skipped_line(split: str, video_id: str, where: str, reason: str) -> str:
    """One line of skipped.jsonl: a sample that cannot be used."""
    entry = {"split": split, "video_id": video_id or None, "where": where, "reason": reason}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def draw_rows(
    ids: Sequence[str], limit: int | None, seed: int, check: Callable[[list[str]], dict[str, str]]
) -> tuple[set[str], dict[str, str]]:
    """Sample up to `limit` of the rows `ids` whose videos pass `check`, which returns errors by id.

    Returns the ids drawn, and the errors of the rows that were checked and failed. The order in which rows are drawn
    depends on the seed and the ids only.
    """
    if limit is not None:
        ids = sorted(ids, key=lambda video_id: sampling_key(seed, video_id))
    limit = len(ids) if limit is None else limit
    drawn: set[str] = set()
    errors: dict[str, str] = {}
    position = 0
    while len(drawn) < limit and position < len(ids):
        some = list(ids[position : position + limit - len(drawn)])
        position += len(some)
        errors |= check(some)
        drawn |= set(some) - errors.keys()
    return drawn, errors


def warn_of_shared_videos(outputs: dict[str, Path]) -> None:
    """Warn of videos, by file name and duration, that have rows in the training and in the test file."""

    def videos(path: Path) -> set[tuple[str, float]]:
        with open(path, encoding="utf-8") as lines:
            rows = map(json.loads, lines)
            return {(Path(row["video_path"]).name, row["video_duration_in_s"]) for row in rows}

    if shared := sorted(videos(outputs["train"]) & videos(outputs["test"])):
        logger.warning(
            "videos in both %s and %s: %d, such as %s. Scores on them are those of training videos",
            outputs["train"].name,
            outputs["test"].name,
            len(shared),
            shared[0][0],
        )


def write_report(statistics: dict[str, SplitStatistics], options: RunOptions) -> None:
    """Write report.png and report.json, with the prefix of `options`, for the splits in `statistics`."""
    if {"train", "test"} <= {split for split, found in statistics.items() if found.rows}:
        warn_of_shared_videos(options.outputs)
    plot(statistics, options.rules, options.output_dir / f"{options.prefix}report.png")
    splits = {split: found.summary() for split, found in statistics.items()}
    with atomic_write(options.output_dir / f"{options.prefix}report.json") as file:
        file.write(json.dumps({**options.recorded(), "splits": splits}, indent=2) + "\n")
