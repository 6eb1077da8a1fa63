"""Converts published captions with times to rows with `segments`: finds and checks the videos, puts the
segments in order, and writes the rows and a reason for each sample without one."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write
from qwen_vl_streaming.common.paths import find_video
from qwen_vl_streaming.common.video_part import FIELDS, part_seconds
from qwen_vl_streaming.timeline.segments import in_order

from .files import exclusive_lock, remove_partial_files
from .own_rows import Options as OwnOptions
from .own_rows import check_own_videos, check_times
from .report import SplitStatistics
from .rules import BAD, KEPT, Sample
from .run import skipped_line, write_report, write_rows
from .timed_formats import FORMATS, Timed
from .videos import VIDEO_SUFFIXES, compare_duration, relative_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(OwnOptions):
    """Options of converting captions with times. `source` is a file or a folder."""

    format: str
    """A key of FORMATS."""
    segment_time: str
    """When the text of a segment may be written, see `data_rows.SEGMENT_TIMES`; empty for the format's own."""


def prepare_timed_rows(options: Options) -> dict[str, SplitStatistics]:
    """Convert `options.source`. Returns the statistics by its name. Raises InputError for user errors. Running again
    does not check the same videos again."""
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
        statistics = SplitStatistics()
        _write(samples, read(source), seconds, when, options, statistics)
        write_report({options.name: statistics}, options)
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
    """The seconds of each video, by path. Samples get the seconds of their part, or an error."""
    good = [sample for sample in samples if not sample.error]
    checked = check_own_videos([Sample(sample.name, sample.where, video=sample.video) for sample in good], options)
    for sample in good:
        found = checked[sample.video]
        stated = found.seconds if sample.duration is None else sample.duration
        sample.error = found.error or compare_duration(found.seconds, stated)
        if not sample.error:
            try:
                sample.seconds = part_seconds(sample.video, sample.part, found.seconds)
            except InputError as error:
                sample.error = f"part of the video is missing: {error}"
    return {path: found.seconds for path, found in checked.items()}


def _write(
    samples: list[Timed],
    again: Iterator[Timed],
    seconds: dict[str, float],
    when: str,
    options: Options,
    statistics: SplitStatistics,
) -> None:
    """Write rows, reasons and counts. `again` are the `samples` as read, with their segments."""
    names: Counter[str] = Counter()
    segments = moved = 0
    with write_rows(options.outputs[options.name]) as rows, atomic_write(options.skipped) as reasons:
        for sample, whole in zip(samples, again, strict=True):
            ordered = in_order(whole.segments, when)
            reason = sample.error or check_times(ordered, sample.seconds, when)
            names[sample.name] += 1
            video_id = sample.name if names[sample.name] == 1 else f"{sample.name}:{names[sample.name]}"
            statistics.add(BAD if reason else KEPT, sample.seconds, None, reason)
            if reason:
                reasons.write(skipped_line(options.name, sample.name, sample.where, reason))
                continue
            row = {
                "video_id": video_id,
                "video_path": _row_path(Path(sample.video).absolute(), options.root),
                **{name: sample.part[key] for name, key in FIELDS.items() if key in sample.part},
                "video_duration_in_s": round(seconds[sample.video], 3),
                **({"question": sample.question} if sample.question else {}),
                "segments": ordered,
                "segment_time": when,
            }
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            statistics.rows += 1
            segments += len(ordered)
            moved += ordered != whole.segments
    logger.info("%d segments, with segment_time %s", segments, when)
    if moved:
        logger.info("%d rows had segments that were not in the order in which they are written: sorted", moved)
    if statistics.rows < len(samples):
        logger.info("%s has a line for each sample without a row", options.skipped)


def _row_path(video: Path, root: Path) -> str:
    """The path of a video in a row: relative to the project's root if it is below, so that the project can move."""
    return relative_path(video, root) if video.is_relative_to(root) else str(video)
