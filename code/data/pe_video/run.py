"""One run from the sources to the finished files. The command line is in mani_data.py."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from preparation.files import only_one, remove_parts, whole_file
from preparation.parallel import run_tasks
from preparation.report import Tally, draw
from preparation.rules import BAD, KEPT, Rules
from preparation.tokens import find_tokenizer, fingerprint, load_counter
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.common.progress import Progress

from .merge import merge_lines, settle_duplicates
from .sources import HUB, Unit, find_units
from .stages import (
    Job,
    Pick,
    Record,
    check_videos,
    finished_unit,
    finished_videos,
    prepare,
    read_unit,
)

logger = logging.getLogger(__name__)

STATE_FOLDER = ".mani_data"
STATE_FORMAT = 3  # raised when what lies in a state folder changes its meaning
VIDEOS_PER_TASK = 32


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    splits: dict[str, Path]
    """Split -> the folder with its JSON files or shards."""
    outputs: dict[str, Path]
    """Split -> the JSONL file to write."""
    root: Path
    """The project's root, to which the paths in rows are relative."""
    videos: Path
    """Where videos from shards belong: a folder a split."""
    output_dir: Path
    """Where the report and the state of the run lie."""
    hub_name: str
    """The hub's dataset, used where no split lies on disk; empty to insist on the disk."""
    rules: Rules
    tokenizer: str
    """A model on the hub, or a folder with tokenizer.json."""
    max_samples: int | None
    """At most so many training rows, drawn by `seed`."""
    seed: int
    workers: int | None
    """Processes; None for one a core, and four where the hub has to be waited for."""


def prepare_dataset(options: Options) -> dict[str, Tally]:
    """Read, filter, write. Returns what became of the samples of each split.

    Raises InputError for whatever the user can mend; what was finished by then is kept and not done again.
    """
    units = find_all_units(options)
    tokenizer = find_tokenizer(options.tokenizer, options.root)
    load_counter(tokenizer)  # a broken one is told of here, in one line, and not by each worker
    streaming = any(unit.kind == HUB for part in units.values() for unit in part)
    workers = options.workers or len(os.sched_getaffinity(0)) * (4 if streaming else 1)
    state_root = options.output_dir / STATE_FOLDER
    with only_one(state_root):
        remove_parts(options.output_dir)
        remove_parts(options.videos)
        state = state_root / _state_name(options, tokenizer)
        job = Job(options.rules, tokenizer, options.root, options.videos, state)
        _read_units([unit for part in units.values() for unit in part], job, workers)
        tallies = {split: Tally() for split in units}
        with whole_file(options.output_dir / "skipped.jsonl") as skipped:
            for split, part in units.items():
                _finish_split(split, part, job, options, workers, tallies[split], skipped)
        draw(tallies, options.rules, options.output_dir / "report.png")
        report = {"rules": options.rules.numbers(), "splits": {split: t.numbers() for split, t in tallies.items()}}
        with whole_file(options.output_dir / "report.json") as file:
            file.write(json.dumps(report, indent=2) + "\n")
    return tallies


def find_all_units(options: Options) -> dict[str, list[Unit]]:
    """The units of each split that is there: on disk, or else on the hub. Raises InputError where there are none."""
    units = {
        split: found
        for split, folder in options.splits.items()
        if (found := find_units(split, folder, options.videos / split))
    }
    if units:
        for split in options.splits.keys() - units.keys():
            logger.warning("%s holds no JSON files and no tar shards: no %s split", options.splits[split], split)
        return units
    if not options.hub_name:
        folders = " and ".join(str(folder) for folder in options.splits.values())
        raise InputError(f"neither JSON files nor tar shards in {folders}: check --source")
    from .hub import find_hub_units

    return find_hub_units(options.hub_name, list(options.splits), options.videos.parent)


def _state_name(options: Options, tokenizer: Path) -> str:
    """Another name for everything that changes what stage 1 finds."""
    what = [STATE_FORMAT, asdict(options.rules), fingerprint(tokenizer), str(options.root), str(options.videos)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _read_units(units: list[Unit], job: Job, workers: int) -> None:
    """Stage 1 for the units that no earlier run has finished."""
    done = [finished_unit(unit, job.state) for unit in units]
    todo = [unit for unit, finished in zip(units, done, strict=True) if finished is None]
    if len(todo) < len(units):
        samples = sum(finished.samples for finished in done if finished)
        logger.info("%d of %d shards (%d samples) were finished before", len(units) - len(todo), len(units), samples)
    with Progress(total=len(todo), unit="shard", desc="read", disable=not todo) as bar:
        count = 0
        with closing(run_tasks(read_unit, todo, min(workers, max(len(todo), 1)), prepare, job)) as counts:
            for samples in counts:
                count += samples
                bar.set_postfix_str(f"{count} samples, {count / max(bar.format_dict['elapsed'], 1e-3):.0f}/s", False)
                bar.update()


def _finish_split(
    split: str, units: list[Unit], job: Job, options: Options, workers: int, tally: Tally, skipped: IO[str]
) -> None:
    """Stage 2 for one split, then its rows and its part of `skipped`."""
    finished = [finished_unit(unit, job.state) for unit in units]
    parts = [part for unit in finished for part in unit.parts]
    for unit in finished:
        tally.add_json(unit.tally)
    kept, bad_lines = job.state / f"{split}.kept", job.state / f"{split}.bad"
    picks: list[tuple[str, Pick]] = []
    with whole_file(kept, sync=False) as kept_file, whole_file(bad_lines, sync=False) as bad_file:
        for record in settle_duplicates(merge_lines(parts, job.state), tally):
            if record.outcome == KEPT:
                kept_file.write(record.line())
                picks.append((record.unit, Pick(record.video_id, record.where, record.video, float(record.seconds))))
            elif record.outcome == BAD:
                bad_file.write(_skip_line(split, record))
    limit = options.max_samples if split == "train" else None
    by_name = {unit.name: unit for unit in units}

    def check(some: list[tuple[str, Pick]]) -> dict[str, str]:
        return _check_videos(split, some, by_name, job, workers)

    drawn, faults = draw_rows(picks, limit, options.seed, check)
    with whole_file(options.outputs[split]) as rows, open(bad_lines, encoding="utf-8", newline="\n") as bad_file:
        late = []
        for record in _records(kept):
            if record.video_id in faults:
                late.append(_skip_line(split, record.spoiled(faults[record.video_id], tally)))
            elif record.video_id in drawn:
                rows.write(record.text + "\n")
                tally.rows += 1
                tally.without_video += not (record.video or is_there(json.loads(record.text), options.root))
            else:
                tally.not_drawn += 1
        skipped.writelines([*bad_file, *late])
    kept.unlink()
    bad_lines.unlink()


def is_there(row: dict[str, Any], root: Path) -> bool:
    """Whether the video of a row is where training looks it up."""
    try:
        find_video(row["video_path"], root)
    except InputError:
        return False
    return True


def draw_rows(
    picks: list[tuple[str, Pick]], limit: int | None, seed: int, check: Callable[[list], dict[str, str]]
) -> tuple[set[str], dict[str, str]]:
    """The ids of up to `limit` picks that `check` finds nothing against, and its faults for the others it saw.

    The draw depends on the seed and the ids only: not on their order, nor on what else there is.
    """
    if limit is not None:
        picks = sorted(picks, key=lambda pick: hashlib.sha256(f"{seed}:{pick[1].video_id}".encode()).digest())
    limit = len(picks) if limit is None else limit
    drawn: set[str] = set()
    faults: dict[str, str] = {}
    position = 0
    while len(drawn) < limit and position < len(picks):
        some = picks[position : position + limit - len(drawn)]
        position += len(some)
        faults |= check(some)
        drawn |= {pick.video_id for _, pick in some} - faults.keys()
    return drawn, faults


def _check_videos(
    split: str, picks: list[tuple[str, Pick]], units: dict[str, Unit], job: Job, workers: int
) -> dict[str, str]:
    """Stage 2 for `picks`; returns why some of them cannot be used, by id."""
    by_unit: dict[str, list[Pick]] = {}
    for unit, pick in picks:
        if pick.video:
            by_unit.setdefault(unit, []).append(pick)
    tasks = []
    for unit, some in sorted(by_unit.items()):
        some.sort(key=lambda pick: pick.video_id)
        # What gzip has made is unpacked once for each task.
        count = len(some) if units[unit].path.lower().endswith("gz") else VIDEOS_PER_TASK
        tasks += [(units[unit], some[i : i + count]) for i in range(0, len(some), count)]
    faults: dict[str, str] = {}
    todo = []
    for task in tasks:
        done = finished_videos(task, job)
        if done is None:
            todo.append(task)
        else:
            faults.update(done)
    if not todo:
        return faults
    with (
        Progress(total=len(todo), unit=f"×{VIDEOS_PER_TASK} videos", desc=f"{split} videos") as bar,
        closing(run_tasks(check_videos, todo, min(workers, len(todo)), prepare, job)) as results,
    ):
        for bad in results:
            faults.update(bad)
            bar.update()
    return faults


def _records(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from map(Record.parse, file)


def _skip_line(split: str, record: Record) -> str:
    entry: dict[str, Any] = {"split": split, "video_id": record.video_id or None, "where": record.where}
    return json.dumps({**entry, "reason": record.text}, ensure_ascii=False) + "\n"
