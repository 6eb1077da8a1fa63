"""Filters rows that are already in the format of training, by the same rules and checks as a published data set.

Reads what `read_data_rows` reads, and writes the kept rows in their order, with all their fields, as JSON Lines. Does
not depend on where the rows come from.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qwen_vl_streaming.common.data_rows import SEGMENT_TIMES, check_data_rows, row_place
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write
from qwen_vl_streaming.common.paths import check_videos, find_video
from qwen_vl_streaming.timeline.segments import check_segments, row_caption

from .files import exclusive_lock, remove_partial_files
from .inspection import Inspection, Video, inspect_videos
from .report import SplitStatistics
from .rules import BAD, CAPTION_FIELD, DURATION_FIELDS, KEPT, Decision, Rules, Sample, apply_rules
from .run import RunOptions, draw_rows, skipped_line, write_report, write_rows
from .tokens import find_tokenizer, load_counter
from .videos import check_video, compare_duration

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of filtering one's own rows."""

    source: str
    """A data set as `read_data_rows` reads it."""
    video_root: Path | None
    """A further folder in which videos are looked up, as in training."""

    @property
    def name(self) -> str:
        """The data set's name in the report."""
        return Path(self.source).name


@dataclass(frozen=True)
class OwnVideo(Video):
    """The video of a row."""

    path: str
    key: str

    @staticmethod
    def of(path: str) -> "OwnVideo":
        status = os.stat(path)
        return OwnVideo(path, f"{os.path.abspath(path)}:{status.st_size}:{status.st_mtime_ns}")


@dataclass
class OwnSample(Sample):
    """A row, with its own duration where it states one."""

    duration_fields: tuple[str, ...] = DURATION_FIELDS[:1]
    """Other fields of one's own rows, such as "duration", can mean anything, and are ignored."""
    stated: bool = False
    """Whether the row states the duration of its video."""
    segments: list[dict] | None = None
    """Its captions with times."""
    segment_time: str = SEGMENT_TIMES[0]
    """When the text of a segment may be written."""


def prepare_own_rows(options: Options) -> dict[str, SplitStatistics]:
    """Read, filter and write one's own rows. Returns the statistics by the name of the data set.

    Raises InputError for user errors. Running again does not check the same videos again.
    """
    count_tokens = load_counter(find_tokenizer(options.tokenizer, options.root))
    with exclusive_lock(options.state_folder):
        remove_partial_files(options.output_dir, recursive=False)
        samples = list(_read(options))
        checked = check_own_videos([sample for sample in samples if not sample.error and not sample.stated], options)
        for sample in samples:
            if not sample.error and sample.video in checked:
                sample.error = checked[sample.video].error
                sample.measure_duration = _measured(checked[sample.video])
        rest, decided = iter(samples), []
        while batch := apply_rules(islice(rest, ROWS_PER_BATCH), options.rules, count_tokens):
            decided += batch
        statistics = SplitStatistics()
        for sample, decision in decided:
            timed = sample.segments is not None and decision.outcome == KEPT
            if timed and (reason := check_times(sample.segments, decision.seconds, sample.segment_time)):
                decision.outcome, decision.reason = BAD, reason
            statistics.add(decision.outcome, decision.seconds, decision.tokens, decision.reason)
        _write(decided, options, statistics)
        write_report({options.name: statistics}, options)
    return {options.name: statistics}


def _read(options: Options) -> Iterator[OwnSample]:
    """The rows as samples. An invalid row, or one without a video file, has an error."""
    rows = list(check_data_rows(options.source))
    paths = (row["video_path"] for _, row in rows if not isinstance(row, InputError))
    check_videos(paths, options.root, options.video_root)
    for number, row in rows:
        place = row_place(options.source, number)
        where = place.removeprefix(f"{options.source}, ")
        if isinstance(row, InputError):
            reason = str(row).removeprefix(f"{place}: ").removeprefix(f"{options.source}, ")
            yield OwnSample("", where, error=f"row is not valid: {reason}")
            continue
        sample = OwnSample(str(row["video_id"]), where, json.dumps(row, default=str).encode())
        sample.stated = any(row.get(name) is not None for name in sample.duration_fields)
        try:
            sample.video = str(find_video(row["video_path"], options.root, options.video_root))
            if not os.path.isfile(sample.video):
                raise InputError(f"{sample.video} is not a file")
        except InputError as error:
            sample.error = f"video is missing: {error}"
        sample.video_path = row["video_path"]
        sample.segments, caption = row.get("segments"), row_caption(row)
        sample.segment_time = row.get("segment_time") or SEGMENT_TIMES[0]
        if row.get(CAPTION_FIELD) is None:
            sample.caption = caption
        if not any(map(str.isalnum, caption)):
            sample.error = f"caption without a word: {caption[:40]!r}"
        yield sample


def check_times(segments: list[dict], seconds: float, when: str) -> str:
    """Why the `segments` of a video of `seconds` cannot be used with the segment time `when`, or an empty string."""
    try:
        check_segments(segments, seconds, when)
    except InputError as error:
        return f"segments are not valid: {error}"
    return ""


def _measured(inspection: Inspection) -> Callable[[], float]:
    return lambda: inspection.seconds


def check_own_videos(samples: Sequence[Sample], options: Options) -> dict[str, Inspection]:
    """Check the videos of `samples`. Returns the results by path."""
    paths = dict.fromkeys(sample.video for sample in samples)
    videos = {path: OwnVideo.of(path) for path in paths}
    journal = options.state_folder / "own-videos.jsonl"
    found = inspect_videos(videos.values(), inspect, journal, options.worker_count(from_hub=False), options.name)
    return {path: found[video.key] for path, video in videos.items()}


def inspect(videos: Sequence[OwnVideo]) -> list[tuple[str, Inspection]]:
    """Check `videos` in a worker process."""
    return [(video.key, Inspection(*check_video(video.path, video.path))) for video in videos]


def _write(decided: list[tuple[Sample, Decision]], options: Options, statistics: SplitStatistics) -> None:
    """Check the videos of kept rows, draw --max-samples of them, and write them and the reasons of all others."""
    kept = {sample.video_id: (sample, decision) for sample, decision in decided if decision.outcome == KEPT}

    def check(ids: list[str]) -> dict[str, str]:
        checked = check_own_videos([kept[video_id][0] for video_id in ids], options)
        results = ((video_id, checked[kept[video_id][0].video], kept[video_id][1].video_seconds) for video_id in ids)
        errors = (
            (video_id, found.error or compare_duration(found.seconds, stated)) for video_id, found, stated in results
        )
        return {video_id: error for video_id, error in errors if error}

    drawn, errors = draw_rows(list(kept), options.max_samples, options.seed, check)
    with write_rows(options.outputs[options.name]) as rows, atomic_write(options.skipped) as reasons:
        for sample, decision in decided:
            if decision.outcome == KEPT and sample.video_id in errors:
                decision.reason = errors[sample.video_id]
                statistics.mark_bad(KEPT, decision.seconds, decision.tokens, decision.reason)
                decision.outcome = BAD
            if decision.outcome == KEPT and sample.video_id not in drawn:
                statistics.not_drawn += 1
            elif decision.outcome == KEPT:
                rows.write(decision.row + "\n")
                statistics.rows += 1
            else:
                reason = decision.reason or explain_rule(decision, options.rules)
                reasons.write(skipped_line(options.name, sample.video_id, sample.where, reason))
    if statistics.rows < sum(statistics.outcomes.values()):
        logger.info("%s has a line for each row that was dropped or is bad", options.skipped)


def explain_rule(decision: Decision, rules: Rules) -> str:
    """Why a rule drops a sample, with its numbers."""
    seconds = f"{decision.seconds:.2f} s"
    details = {
        "too short": f"the video has {seconds}, the minimum is {rules.min_seconds:g} s",
        "too long": f"the video has {seconds}, the maximum is {rules.max_seconds:g} s",
        "caption prefix": f"the caption does not start with {rules.caption_prefix!r}",
    }
    if decision.outcome not in details:
        rate = f"{decision.tokens} tokens in {seconds}, {(decision.tokens or 0) / decision.seconds:.2f} per second"
        details |= {
            "too few tokens per second": f"{rate}, the minimum is {rules.min_tokens_per_second:g}",
            "too many tokens per second": f"{rate}, the maximum is {rules.max_tokens_per_second:g}",
        }
    return f"{decision.outcome}: {details[decision.outcome]}"
