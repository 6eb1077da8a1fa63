"""The two stages of a run, each a set of tasks that any worker does once, its result being a file.

Stage 1 reads every unit and writes what became of its samples; stage 2 writes and checks the videos of the rows that
were kept. A result that is there already is not made again, which is how a killed run goes on. Knows nothing about
the final files.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from preparation.files import whole_file
from preparation.report import Tally
from preparation.rules import BAD, KEPT, Rules, Sample, Verdict, judge
from preparation.tokens import load_counter
from preparation.videos import Slice, measure
from qwen_vl_streaming.common.errors import InputError

from .sources import FOLDER, HUB, Unit, open_shard, read_samples

SAMPLES_PER_BATCH = 512
BYTES_PER_PART = 16 << 20  # of records, which are sorted in memory
TOLERANCE = 1.0  # seconds by which a video may be shorter or longer than its JSON claims


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    rules: Rules
    tokenizer: Path
    root: Path
    """The project's root, to which the paths in rows are relative."""
    videos: Path
    """Where videos from shards belong: a folder a split."""
    state: Path
    """Where results lie; another folder for every other set of rules."""


class Record(NamedTuple):
    """What became of one sample, as one line of a result file. Lines sort by id, then by where the sample was."""

    video_id: str
    unit: str
    position: int
    """Within its unit."""
    outcome: str
    seconds: str
    """A number, or empty where it is not known; likewise tokens."""
    tokens: str
    where: str
    video: str
    text: str
    """The row of a kept sample, the reason of a bad one."""

    def line(self) -> str:
        fields = [self.video_id, self.unit, f"{self.position:09d}", self.outcome, self.seconds, self.tokens]
        return "\t".join([*fields, self.where, self.video, self.text]) + "\n"

    def spoiled(self, reason: str, tally: Tally) -> "Record":
        """The same sample, found to be bad and counted as such in `tally`."""
        seconds, tokens = float(self.seconds), int(self.tokens) if self.tokens else None
        tally.spoil(self.outcome, seconds, tokens, reason)
        return self._replace(outcome=BAD, text=" ".join(reason.split()))

    @staticmethod
    def parse(line: str) -> "Record":
        video_id, unit, position, *rest = line.rstrip("\n").split("\t", 8)
        return Record(video_id, unit, int(position), *rest)


@dataclass(frozen=True, slots=True)
class Pick:
    """A kept row whose video is to be written or checked."""

    video_id: str
    where: str
    video: str
    seconds: float


def in_shard(pick: Pick, videos: Path) -> tuple[Path, int, int]:
    """Where a video from a shard is written, and where it starts in the shard and how many bytes it has there."""
    offset, size, ending = pick.video.split("+")
    return videos / f"{pick.video_id}{ending}", int(offset), int(size)


_job: Job
_count_tokens: Callable[[list[str]], list[int]]


def prepare(job: Job) -> None:
    """Make this process ready for `read_unit` and `check_videos`."""
    global _job, _count_tokens
    _job, _count_tokens = job, load_counter(job.tokenizer)


def read_unit(unit: Unit) -> int:
    """Stage 1 for one unit; returns the number of its samples."""
    samples = read_samples(unit, _job.videos / unit.split, _job.root, _job.state)
    lines: list[str] = []
    tally = Tally()
    sizes: list[int] = []  # of the parts written
    size = count = 0
    while batch := judge(itertools.islice(samples, SAMPLES_PER_BATCH), _job.rules, _count_tokens):
        for sample, verdict in batch:
            lines.append(_record(unit, count, sample, verdict).line())
            tally.add(verdict.outcome, verdict.seconds, verdict.tokens, verdict.reason)
            size += len(lines[-1])
            count += 1
        if size > BYTES_PER_PART:
            sizes.append(_write_part(unit, len(sizes), lines))
            lines, size = [], 0
    sizes.append(_write_part(unit, len(sizes), lines))
    with whole_file(result_of(unit, _job.state), sync=False) as file:
        file.write(json.dumps({"parts": sizes, "samples": count, "tally": tally.to_json()}) + "\n")
    return count


def result_of(unit: Unit, state: Path) -> Path:
    """The file that stage 1 writes when it has finished `unit`; its parts lie beside it."""
    key = hashlib.sha256("\0".join((unit.kind, unit.name, unit.path, unit.stamp)).encode("utf-8", "surrogateescape"))
    return state / f"{unit.split}-{key.hexdigest()[:24]}.done"


@dataclass(frozen=True)
class Finished:
    """What stage 1 made of a unit."""

    parts: list[Path]
    """Files of sorted records."""
    samples: int
    tally: str
    """As Tally.add_json takes it."""


def finished_unit(unit: Unit, state: Path) -> Finished | None:
    """What stage 1 made of `unit`, or None where it has not finished it, or a power cut took part of that away."""
    result = result_of(unit, state)
    try:
        found = json.loads(result.read_text())
        parts = [result.with_suffix(f".{number}.tsv") for number in range(len(found["parts"]))]
        if [part.stat().st_size for part in parts] != found["parts"]:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return Finished(parts, found["samples"], found["tally"])


def check_videos(task: tuple[Unit, list[Pick]]) -> list[tuple[str, str]]:
    """Stage 2 for some rows of one unit: write videos that are in a shard, check all that are there.

    Returns (id, reason) for each that cannot be used.
    """
    unit, picks = task
    result = result_of_videos(task, _job.state)
    if unit.kind == FOLDER:
        bad = [(pick.video_id, fault) for pick in picks if (fault := _video_fault(Path(pick.video), pick))]
    else:
        try:
            with open_shard(unit, _job.state) as file:
                bad = [(pick.video_id, fault) for pick in picks if (fault := _unpack(unit, file, pick))]
        except OSError as error:
            bad = [(pick.video_id, f"shard cannot be read: {error.strerror or error}") for pick in picks]
    with whole_file(result) as file:
        file.writelines(f"{video_id}\t{fault}\n" for video_id, fault in bad)
    return bad


def finished_videos(task: tuple[Unit, list[Pick]], job: Job) -> list[tuple[str, str]] | None:
    """What `check_videos` found, if it has finished `task` and the videos it wrote are still there."""
    unit, picks = task
    try:
        lines = result_of_videos(task, job.state).read_text("utf-8").splitlines()
    except FileNotFoundError:
        return None
    bad = [(video_id, fault) for video_id, _, fault in (line.partition("\t") for line in lines)]
    faulty = {video_id for video_id, _ in bad}
    for pick in picks:
        if unit.kind != FOLDER and pick.video_id not in faulty:
            place, _, size = in_shard(pick, job.videos / unit.split)
            if not place.is_file() or place.stat().st_size != size:
                return None
    return bad


def result_of_videos(task: tuple[Unit, list[Pick]], state: Path) -> Path:
    """The file whose presence says that stage 2 has finished `task`."""
    unit, picks = task
    stamps = [unit.kind, unit.path, unit.stamp]
    for pick in picks:
        stamps += [pick.video_id, pick.video]
        if unit.kind == FOLDER and os.path.exists(pick.video):
            status = os.stat(pick.video)
            stamps.append(f"{status.st_size}:{status.st_mtime_ns}")
    key = hashlib.sha256("\0".join(stamps).encode("utf-8", "surrogateescape")).hexdigest()
    return state / f"{unit.split}-{key[:24]}.videos"


def _record(unit: Unit, position: int, sample: Sample, verdict: Verdict) -> Record:
    return Record(
        video_id=sample.video_id,
        unit=unit.name,
        position=position,
        outcome=verdict.outcome,
        seconds="" if verdict.seconds is None else repr(verdict.seconds),
        tokens="" if verdict.tokens is None else str(verdict.tokens),
        where=sample.where,
        video=sample.video if verdict.outcome == KEPT else "",
        text=verdict.row or " ".join(verdict.reason.split()),
    )


def _write_part(unit: Unit, part: int, lines: list[str]) -> int:
    """Write the sorted `lines`; returns their size in bytes."""
    path = result_of(unit, _job.state).with_suffix(f".{part}.tsv")
    with whole_file(path, sync=False) as file:
        file.writelines(sorted(lines))
    return path.stat().st_size


def _unpack(unit: Unit, file: BinaryIO, pick: Pick) -> str:
    """Write one video out of a shard; returns why it cannot be used, in which case nothing is left of it."""
    place, offset, size = in_shard(pick, _job.videos / unit.split)
    if fault := _video_fault(Slice(file, offset, size), pick):
        place.unlink(missing_ok=True)
        return fault
    if not _there(place, unit, file, offset, size):
        with whole_file(place, "wb", sync=False) as out:
            shutil.copyfileobj(Slice(file, offset, size), out, 1 << 20)
    return ""


def _there(place: Path, unit: Unit, file: BinaryIO, offset: int, size: int) -> bool:
    """Whether `place` already holds the video, as after a run that was killed or had other bounds."""
    if place.is_symlink() or not place.is_file() or place.stat().st_size != size:
        return False
    if unit.kind == HUB:  # comparing would cost the download that this is to save
        return True
    part = Slice(file, offset, size)
    with open(place, "rb") as written:
        return all(written.read(1 << 20) == block for block in iter(lambda: part.read(1 << 20), b""))


def _video_fault(source: Path | Slice, pick: Pick) -> str:
    """Why a video cannot be used: it does not open or decode, or lasts less or longer than its JSON claims."""
    from qwen_vl_streaming.video.readers import check_first_frame

    try:
        seconds = measure(source, pick.where)
        check_first_frame(source, pick.where)
    except InputError as error:
        return "video cannot be used: " + " ".join(str(error).split())
    if seconds < pick.seconds - TOLERANCE:
        return f"video is shorter than it claims: {seconds:.2f} s of {pick.seconds:.2f} s"
    if seconds > pick.seconds + TOLERANCE:
        return f"video is longer than it claims: {seconds:.2f} s, not {pick.seconds:.2f} s"
    return ""
