"""The two stages of a run, as tasks for worker processes.

Stage 1 reads every unit and writes the outcomes of its samples to files. Stage 2 checks the videos of the kept rows and
unpacks those in shards. Finished work is recorded, so a killed run resumes. Does not depend on the final files.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from preparation.inspection import Inspection, Video
from preparation.report import SplitStatistics
from preparation.rules import BAD, KEPT, Decision, Rules, Sample, apply_rules
from preparation.tokens import load_counter
from preparation.videos import FileSlice, check_video, compare_duration
from qwen_vl_streaming.common.files import atomic_write

from .sources import FOLDER, HUB, Unit, open_shard, read_samples

SAMPLES_PER_BATCH = 512
BYTES_PER_PART = 16 << 20  # records are sorted in memory


@dataclass(frozen=True)
class Job:
    """Settings of a worker process."""

    rules: Rules
    tokenizer: Path
    root: Path
    """The project's root, to which the paths in rows are relative."""
    videos: Path
    """Videos from shards are unpacked to <videos>/<split>."""
    state: Path
    """Folder of the results; each set of rules has its own."""


class Record(NamedTuple):
    """The outcome of one sample, one line of a result file. Lines sort by id, then unit, then position."""

    video_id: str
    unit: str
    position: int
    """Index of the sample in its unit."""
    outcome: str
    seconds: str
    """A number, or empty if unknown; the same for `tokens`."""
    tokens: str
    where: str
    video: str
    """The video's path, or "offset+size+suffix" in a shard; empty if it has none."""
    text: str
    """The row of a kept sample, the reason of a bad one."""

    def line(self) -> str:
        """The record as a line, as `parse` reads it."""
        fields = [self.video_id, self.unit, f"{self.position:09d}", self.outcome, self.seconds, self.tokens]
        return "\t".join([*fields, self.where, self.video, self.text]) + "\n"

    def as_bad(self, reason: str, statistics: SplitStatistics) -> "Record":
        """The same sample as a bad one, which is recounted in `statistics`."""
        seconds, tokens = float(self.seconds), int(self.tokens) if self.tokens else None
        statistics.mark_bad(self.outcome, seconds, tokens, reason)
        return self._replace(outcome=BAD, text=" ".join(reason.split()))

    @staticmethod
    def parse(line: str) -> "Record":
        """Parse a line of a result file."""
        video_id, unit, position, *rest = line.rstrip("\n").split("\t", 8)
        return Record(video_id, unit, int(position), *rest)


@dataclass(frozen=True)
class UnitVideo(Video):
    """The video of a kept row, in its unit."""

    unit: Unit
    folder: Path
    """Folder that videos of the split are unpacked to."""
    video_id: str
    where: str
    video: str
    """As in Record."""
    seconds: float
    """Duration in the row."""

    @cached_property
    def key(self) -> str:
        unit = self.unit
        parts = [unit.kind, unit.path, unit.stamp, self.video_id, self.video]
        if unit.kind == FOLDER and os.path.exists(self.video):
            status = os.stat(self.video)
            parts.append(f"{status.st_size}:{status.st_mtime_ns}")
        digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self.video_id}:{digest[:24]}"

    @property
    def container(self) -> str:
        return self.unit.name

    @property
    def one_task(self) -> bool:
        return self.unit.path.lower().endswith("gz")  # a gzip shard is decompressed once per task

    @property
    def target(self) -> Path | None:
        if self.unit.kind == FOLDER:
            return None
        return self.folder / f"{self.video_id}{self.video.split('+')[2]}"

    @property
    def offset(self) -> int:
        """Offset of the video in its shard, in bytes."""
        return int(self.video.split("+")[0])

    @property
    def size(self) -> int:
        return int(self.video.split("+")[1])


_job: Job
_count_tokens: Callable[[list[str]], list[int]]


def initialize_worker(job: Job) -> None:
    """Prepare this process for `read_unit` and `check_videos`."""
    global _job, _count_tokens
    _job, _count_tokens = job, load_counter(job.tokenizer)


def read_unit(unit: Unit) -> int:
    """Stage 1 for one unit: write the outcomes of its samples. Returns their number."""
    samples = read_samples(unit, _job.videos / unit.split, _job.root, _job.state)
    lines: list[str] = []
    statistics = SplitStatistics()
    sizes: list[int] = []  # bytes of the parts written
    size = count = 0
    while batch := apply_rules(itertools.islice(samples, SAMPLES_PER_BATCH), _job.rules, _count_tokens):
        for sample, decision in batch:
            lines.append(_record(unit, count, sample, decision).line())
            statistics.add(decision.outcome, decision.seconds, decision.tokens, decision.reason)
            size += len(lines[-1])
            count += 1
        if size > BYTES_PER_PART:
            sizes.append(_write_part(unit, len(sizes), lines))
            lines, size = [], 0
    sizes.append(_write_part(unit, len(sizes), lines))
    with atomic_write(result_file(unit, _job.state), sync=False) as file:
        file.write(json.dumps({"parts": sizes, "samples": count, "tally": statistics.to_json()}) + "\n")
    return count


def result_file(unit: Unit, state: Path) -> Path:
    """The file that stage 1 writes when `unit` is finished. Its parts are beside it."""
    key = hashlib.sha256("\0".join((unit.kind, unit.name, unit.path, unit.stamp)).encode("utf-8", "surrogateescape"))
    return state / f"{unit.split}-{key.hexdigest()[:24]}.done"


@dataclass(frozen=True)
class UnitResult:
    """Result of stage 1 for a unit."""

    parts: list[Path]
    """Files of sorted records."""
    samples: int
    statistics: str
    """As `SplitStatistics.add_json` reads it."""


def finished_unit(unit: Unit, state: Path) -> UnitResult | None:
    """The result of stage 1 for `unit`, or None if it is not finished or a power failure has lost part of it."""
    result = result_file(unit, state)
    try:
        found = json.loads(result.read_text())
        parts = [result.with_suffix(f".{number}.tsv") for number in range(len(found["parts"]))]
        if [part.stat().st_size for part in parts] != found["parts"]:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return UnitResult(parts, found["samples"], found["tally"])


def check_videos(videos: Sequence[UnitVideo]) -> list[tuple[str, Inspection]]:
    """Stage 2 for some videos of one unit: check each, and unpack it if it is in a shard. Returns results by key."""
    unit = videos[0].unit
    if unit.kind == FOLDER:
        return [(video.key, _check(Path(video.video), video)) for video in videos]
    try:
        with open_shard(unit, _job.state) as file:
            return [(video.key, _unpack(file, video)) for video in videos]
    except OSError as error:
        result = Inspection(error=f"shard cannot be read: {error.strerror or error}")
        return [(video.key, result) for video in videos]


def _record(unit: Unit, position: int, sample: Sample, decision: Decision) -> Record:
    return Record(
        video_id=sample.video_id,
        unit=unit.name,
        position=position,
        outcome=decision.outcome,
        seconds="" if decision.seconds is None else repr(decision.seconds),
        tokens="" if decision.tokens is None else str(decision.tokens),
        where=sample.where,
        video=sample.video if decision.outcome == KEPT else "",
        text=decision.row or " ".join(decision.reason.split()),
    )


def _write_part(unit: Unit, part: int, lines: list[str]) -> int:
    """Write `lines` sorted. Returns their size in bytes."""
    path = result_file(unit, _job.state).with_suffix(f".{part}.tsv")
    with atomic_write(path, sync=False) as file:
        file.writelines(sorted(lines))
    return path.stat().st_size


def _unpack(file: BinaryIO, video: UnitVideo) -> Inspection:
    """Check one video of a shard and write it to its target; removes the target if the video cannot be used."""
    part = FileSlice(file, video.offset, video.size)
    result = _check(part, video)
    if result.error:
        video.target.unlink(missing_ok=True)
    elif not _is_written(video, part):
        part.seek(0)
        with atomic_write(video.target, "wb", sync=False) as out:
            shutil.copyfileobj(part, out, 1 << 20)
    return result


def _is_written(video: UnitVideo, part: FileSlice) -> bool:
    """Whether an earlier run, killed or with other rules, has already written the video to its target."""
    target = video.target
    if target.is_symlink() or not target.is_file() or target.stat().st_size != video.size:
        return False
    if video.unit.kind == HUB:  # comparing would need the download that this check saves
        return True
    part.seek(0)
    with open(target, "rb") as written:
        return all(written.read(1 << 20) == block for block in iter(lambda: part.read(1 << 20), b""))


def _check(source: Path | FileSlice, video: UnitVideo) -> Inspection:
    """Whether a video opens, decodes, and is as long as its row says."""
    seconds, error = check_video(source, video.where)
    return Inspection(seconds, error or compare_duration(seconds, video.seconds))
