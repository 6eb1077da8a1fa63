"""Converts published captions with times to rows with `segments`: finds and checks the videos, cuts those of which only
a part is meant, brings the segments in order, and writes the rows and a reason for each sample without one."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.common.progress import Progress

from .cutting import cut_parts
from .files import exclusive_lock, remove_partial_files
from .own_rows import Options as OwnOptions
from .own_rows import check_own_videos, check_times
from .parallel import run_tasks
from .report import SplitStatistics
from .rules import BAD, KEPT, Sample
from .run import skipped_line, write_report
from .timed_formats import FORMATS, Timed
from .videos import TOLERANCE, VIDEO_SUFFIXES, compare_duration, relative_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(OwnOptions):
    """Options of converting captions with times. `source` is a file or a folder."""

    format: str
    """A key of FORMATS."""
    segment_time: str
    """When the text of a segment may be written, see `data_rows.SEGMENT_TIMES`; empty for the format's own."""
    parts: Path | None
    """The folder for parts that are cut out of videos. None: samples that need one are skipped."""


def prepare_timed_rows(options: Options) -> dict[str, SplitStatistics]:
    """Convert `options.source`. Returns the statistics by its name. Raises InputError for user errors. Running again
    does not check or cut the same videos again."""
    source, when = Path(options.source), options.segment_time or FORMATS[options.format].segment_time
    read = FORMATS[options.format].read
    with exclusive_lock(options.state_folder):
        remove_partial_files(options.output_dir, recursive=False)
        # Read twice, because millions of words would not fit in memory.
        samples = [replace(sample, segments=[]) for sample in read(source)]
        if not samples:
            raise InputError(f"{options.source} has no rows: give a file or folder in the format {options.format}")
        for sample in (sample for sample in samples if not sample.error):
            try:
                sample.video = str(_find(sample.video, options))
            except InputError as error:
                sample.error = f"video is missing: {error}"
        seconds = _inspect(samples, options)
        if _cut(samples, seconds, options):
            seconds = _inspect(samples, options)
        statistics = SplitStatistics()
        first = _write(samples, read(source), seconds, when, options, statistics)
        write_report({options.name: statistics}, options)
    if not statistics.rows:
        raise InputError(f"none of {len(samples)} samples could be converted, the first because {first}")
    return {options.name: statistics}


def _find(video: str, options: Options) -> Path:
    """The file of a video that is given with its suffix, or without it; `a.en` also stands for `a`."""
    if Path(video).suffix.lower() in VIDEO_SUFFIXES:
        return find_video(video, options.root, options.video_root)
    for stem in (video, os.path.splitext(video)[0]):
        for suffix in VIDEO_SUFFIXES:
            try:
                return find_video(stem + suffix, options.root, options.video_root)
            except InputError:
                continue
    raise InputError(f"no video has the name {Path(video).name}: put it there, or give its folder as --video-root")


def _inspect(samples: Sequence[Timed], options: Options) -> dict[str, float]:
    """The seconds of each video, by path. Samples with a video that cannot be used get an error."""
    good = [sample for sample in samples if not sample.error]
    checked = check_own_videos([Sample(sample.name, sample.where, video=sample.video) for sample in good], options)
    for sample in good:
        sample.error = checked[sample.video].error
    return {path: found.seconds for path, found in checked.items()}


def _cut(samples: Sequence[Timed], seconds: dict[str, float], options: Options) -> int:
    """Cut the parts that samples are about, and make these their videos. Returns the number of samples with a part."""
    tasks: dict[str, list[tuple[float, float, Path]]] = {}
    parts: dict[Path, list[Timed]] = {}
    for sample in samples:
        if sample.error or sample.part is None:
            continue
        (start, end), length = sample.part, seconds[sample.video]
        if start == 0 and end > length - TOLERANCE:
            continue
        if options.parts is None:
            end_text = "its end" if end == math.inf else f"{end:g} s"
            sample.error = f"video is only used in part: from {start:g} s to {end_text}: give --parts FOLDER to cut it"
            continue
        target = options.parts.absolute() / f"{sample.name}.mp4"
        if target in parts and parts[target][0].video != sample.video:
            sample.error = (
                f"video cannot be cut: {target} is for a part of {parts[target][0].video}: rename one of them"
            )
            continue
        if target not in parts:
            tasks.setdefault(sample.video, []).append((start, min(end, length), target))
        parts.setdefault(target, []).append(sample)
    if not tasks:
        return 0
    work = [(Path(video), wanted) for video, wanted in tasks.items()]
    workers = min(options.worker_count(from_hub=False), len(work))
    with (
        Progress(total=len(parts), unit="part", desc="cutting videos") as bar,
        closing(run_tasks(cut_parts, work, workers)) as results,
    ):
        for result in results:
            for target, error in result:
                for sample in parts[target]:
                    sample.video, sample.error = str(target), error
            bar.update(len(result))
    return len(parts)


def in_order(segments: list[dict[str, Any]], when: str) -> tuple[list[dict[str, Any]], bool]:
    """`segments` in the order in which their texts may be written, and whether some overlapped. The time that does not
    count for `when` is moved so that none do."""
    key = "end" if when == "end" else "start"
    ordered = [dict(segment) for segment in sorted(segments, key=lambda segment: (segment[key], segment["end"]))]
    overlapped = False
    for before, after in pairwise(ordered):
        if after["start"] < before["end"]:
            overlapped = True
            if when == "end":
                after["start"] = before["end"]
            else:
                before["end"] = after["start"]
    return ordered, overlapped


def _write(
    samples: list[Timed],
    again: Iterator[Timed],
    seconds: dict[str, float],
    when: str,
    options: Options,
    statistics: SplitStatistics,
) -> str:
    """Write rows, reasons and counts. `again` are the `samples` as read, with their segments. Returns the place of the
    first sample without a row and the reason."""
    names: Counter[str] = Counter()
    segments = overlaps = 0
    first = ""
    skipped = options.output_dir / f"{options.prefix}skipped.jsonl"
    with atomic_write(options.outputs[options.name]) as rows, atomic_write(skipped) as reasons:
        for sample, whole in zip(samples, again, strict=True):
            ordered, overlapped = in_order(whole.segments, when)
            length = seconds.get(sample.video, 0.0)
            reason = sample.error or _fault(whole, ordered, length)
            names[sample.name] += 1
            video_id = sample.name if names[sample.name] == 1 else f"{sample.name}:{names[sample.name]}"
            statistics.add(BAD if reason else KEPT, length, None, reason)
            if reason:
                reasons.write(skipped_line(options.name, sample.name, sample.where, reason))
                first = first or f"{sample.where}: {reason}"
                continue
            row = {
                "video_id": video_id,
                "video_path": _row_path(Path(sample.video).absolute(), options.root),
                "video_duration_in_s": round(length, 3),
                **({"question": sample.question} if sample.question else {}),
                "segments": ordered,
                "segment_time": when,
            }
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            statistics.rows += 1
            segments += len(ordered)
            overlaps += overlapped
    logger.info("%d segments, with segment_time %s", segments, when)
    if overlaps:
        moved = "start later" if when == "end" else "end earlier"
        logger.info("%d rows had segments that overlapped or were not in order: sorted, and some %s", overlaps, moved)
    if statistics.rows < len(samples):
        logger.info("%s has a line for each sample without a row", skipped)
    return first


def _row_path(video: Path, root: Path) -> str:
    """The path of a video in a row: relative to the project's root if it is below, so that the project can move."""
    return relative_path(video, root) if video.is_relative_to(root) else str(video)


def _fault(whole: Timed, ordered: list[dict[str, Any]], length: float) -> str:
    """Why a sample with a good video has no row, or an empty string."""
    if whole.duration is not None and (reason := compare_duration(length, whole.duration)):
        return reason
    # Before they were put in order, a segment may have ended before it started.
    if backward := next((s for s in whole.segments if s["end"] < s["start"]), None):
        return f"segments are not valid: one from {backward['start']:g} to {backward['end']:g} s ends before it starts"
    return check_times(ordered, length)
