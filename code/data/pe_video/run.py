"""Runs PE-Video's preparation from the sources to the final files. The command line is in mani_data.py."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from preparation.inspection import inspect_videos
from preparation.parallel import run_tasks
from preparation.report import SplitStatistics
from preparation.rules import BAD, KEPT
from preparation.run import RunOptions, draw_rows, exclusive_run, skipped_line, write_report, write_rows
from preparation.tokens import find_tokenizer, fingerprint, load_counter
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.common.progress import Progress

from .merge import merge_lines, resolve_duplicates
from .sources import HUB, Unit, find_units
from .stages import Job, Record, UnitVideo, check_videos, finished_unit, initialize_worker, read_unit

logger = logging.getLogger(__name__)

STATE_FORMAT = 3  # increase when the meaning of the files in a state folder changes


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of PE-Video's preparation."""

    splits: dict[str, Path]
    """Split -> the folder with its JSON files or shards."""


def prepare_dataset(options: Options) -> dict[str, SplitStatistics]:
    """Read, filter and write PE-Video's rows. Returns the statistics of each split.

    Raises InputError for user errors. Running again resumes from what was finished.
    """
    units = find_all_units(options)
    tokenizer = find_tokenizer(options.tokenizer, options.root)
    load_counter(tokenizer)  # reports a broken tokenizer once, before the workers start
    workers = options.worker_count(from_hub=any(unit.kind == HUB for part in units.values() for unit in part))
    with exclusive_run(options):
        state = options.state_folder / _state_name(options, tokenizer)
        job = Job(options.rules, tokenizer, options.root, options.videos, state)
        _read_units([unit for part in units.values() for unit in part], job, workers)
        statistics = {split: SplitStatistics() for split in units}
        with atomic_write(options.skipped) as skipped:
            for split, part in units.items():
                _finish_split(split, part, job, options, workers, statistics[split], skipped)
        write_report(statistics, options)
    return statistics


def find_all_units(options: Options) -> dict[str, list[Unit]]:
    """Find the units of each split on disk, or else on the hub. Raises InputError if there are none."""
    units = {
        split: found
        for split, folder in options.splits.items()
        if (found := find_units(split, folder, options.videos / split))
    }
    if units:
        for split in options.splits.keys() - units.keys():
            logger.warning(
                "%s has no JSON files and no tar shards: the %s split is skipped", options.splits[split], split
            )
        return units
    if not options.hub_name:
        folders = " and ".join(str(folder) for folder in options.splits.values())
        raise InputError(f"no JSON files and no tar shards in {folders}: check --source")
    from .hub import find_hub_units

    return find_hub_units(options.hub_name, list(options.splits), options.videos.parent)


def _state_name(options: Options, tokenizer: Path) -> str:
    """The name of the state folder; differs if anything differs that changes the result of stage 1."""
    what = [STATE_FORMAT, asdict(options.rules), fingerprint(tokenizer), str(options.root), str(options.videos)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _read_units(units: list[Unit], job: Job, workers: int) -> None:
    """Stage 1 for the units that earlier runs have not finished."""
    done = [finished_unit(unit, job.state) for unit in units]
    todo = [unit for unit, finished in zip(units, done, strict=True) if finished is None]
    if len(todo) < len(units):
        samples = sum(finished.samples for finished in done if finished)
        logger.info(
            "resuming: %d of %d shards (%d samples) are already read", len(units) - len(todo), len(units), samples
        )
    with Progress(total=len(todo), unit="shard", desc="read", disable=not todo) as bar:
        count = 0
        with closing(run_tasks(read_unit, todo, min(workers, max(len(todo), 1)), initialize_worker, job)) as counts:
            for samples in counts:
                count += samples
                bar.set_postfix_str(f"{count} samples, {count / max(bar.format_dict['elapsed'], 1e-3):.0f}/s", False)
                bar.update()


def _finish_split(
    split: str,
    units: list[Unit],
    job: Job,
    options: Options,
    workers: int,
    statistics: SplitStatistics,
    skipped: IO[str],
) -> None:
    """Stage 2 for one split, then write its rows and its lines of `skipped`."""
    finished = [finished_unit(unit, job.state) for unit in units]
    parts = [part for unit in finished for part in unit.parts]
    for unit in finished:
        statistics.add_json(unit.statistics)
    kept, bad_lines = job.state / f"{split}.kept", job.state / f"{split}.bad"
    by_name, folder = {unit.name: unit for unit in units}, job.videos / split
    videos: dict[str, UnitVideo] = {}
    with atomic_write(kept, sync=False) as kept_file, atomic_write(bad_lines, sync=False) as bad_file:
        for record in resolve_duplicates(merge_lines(parts, job.state), statistics):
            if record.outcome == KEPT:
                kept_file.write(record.line())
                videos[record.video_id] = UnitVideo(
                    by_name[record.unit], folder, record.video_id, record.where, record.video, float(record.seconds)
                )
            elif record.outcome == BAD:
                bad_file.write(skipped_line(split, record.video_id, record.where, record.text))
    limit = options.max_samples if split == "train" else None

    def check(some: list[str]) -> dict[str, str]:
        return _check_videos(split, [videos[video_id] for video_id in some], job, workers)

    drawn, errors = draw_rows(list(videos), limit, options.seed, check)
    with write_rows(options.outputs[split]) as rows, open(bad_lines, encoding="utf-8", newline="\n") as bad_file:
        late = []
        for record in _records(kept):
            if record.video_id in errors:
                bad = record.as_bad(errors[record.video_id], statistics)
                late.append(skipped_line(split, bad.video_id, bad.where, bad.text))
            elif record.video_id in drawn:
                rows.write(record.text + "\n")
                statistics.rows += 1
                statistics.without_video += not (record.video or video_exists(json.loads(record.text), options.root))
            else:
                statistics.not_drawn += 1
        skipped.writelines([*bad_file, *late])
    kept.unlink()
    bad_lines.unlink()


def video_exists(row: dict[str, Any], root: Path) -> bool:
    """Whether training finds the video of a row."""
    try:
        find_video(row["video_path"], root)
    except InputError:
        return False
    return True


def _check_videos(split: str, videos: list[UnitVideo], job: Job, workers: int) -> dict[str, str]:
    """Stage 2 for `videos`. Returns why some of them cannot be used, by id."""
    videos = [video for video in videos if video.video]  # a row without one may get it later
    journal = job.state / f"{split}-videos.jsonl"
    results = inspect_videos(videos, check_videos, journal, workers, split, initialize_worker, job)
    errors = ((video.video_id, results[video.key].error) for video in videos)
    return {video_id: error for video_id, error in errors if error}


def _records(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from map(Record.parse, file)
