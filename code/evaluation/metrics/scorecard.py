"""Computes all metrics of a file of captions and writes them: corpus metrics, BLEURT, fluency, lag and
timeliness. Knows nothing about how captions are made and how a metric is computed.

Beside `<variant>_infer.json`, `<variant>_per_video.jsonl` has the metrics of each video, `<variant>_timeliness.jsonl`
when each event was named, and `<variant>_judge.jsonl` the judge's answers, from which a run that was killed resumes.
Scoring again keeps the metrics that are not asked for this time, if it is of the same captions.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from identity import arguments_path, read_arguments
from json_lines import write_rows
from qwen_vl_streaming.common.errors import InputError, first_line
from qwen_vl_streaming.common.files import read_object
from qwen_vl_streaming.common.paths import find_model, find_path
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.model.prompts import load_processor
from results import PER_VIDEO, POINTS, Row, check_writable, hash_rows, sibling
from settings import ROOT, Settings, read_judge_options
from tasks import get_task, score_by_task, table

from metrics import lag
from metrics.bleurt import bleurt, find_checkpoint
from metrics.judge import Judge, open_judge
from metrics.naming import Event
from metrics.references import read_times
from metrics.scoring import NotComputed, check_java, check_pairs, score, warn_of_unspaced, write_scores
from metrics.timing import describe, measure_file, times_of

logger = logging.getLogger(__name__)

STREAMING = ("AL", "LAAL", "early_words")
ANSWERS = "judge.jsonl"


@dataclass(frozen=True)
class Scoring:
    """What captions are scored with, already checked."""

    checkpoint: Path | None
    """Of BLEURT; None to skip it."""
    judge: Judge | None
    device: str
    subtasks: tuple[str, ...] = ()
    """Sub-tasks that are scored separately; empty if the task has none."""
    times: dict[str, list[Event]] | None = None
    """What happens in each video, by its id; None to read it from the rows."""


def prepare_scoring(settings: Settings) -> Scoring:
    """Check everything that scoring needs. Call it before anything that takes long; it takes seconds, unless a
    checkpoint must be downloaded. Raises InputError if something is missing."""
    check_java()
    checkpoint = find_checkpoint(settings.bleurt) if settings.bleurt else None
    judge = None
    if settings.judge_url:
        options = read_judge_options(settings.judge_options)
        judge = open_judge(settings.judge_url, settings.judge_model, options, settings.judge_workers)
    device = choose_device(settings.device, look(os.environ))[0] if settings.bleurt else "cpu"
    times = read_times(find_path(settings.times, ROOT, "--times")) if settings.times else None
    return Scoring(checkpoint, judge, device, get_task(settings.task).subtasks, times)


def score_rows(rows: list[Row], captions: Path, where: Path, skipped: int, scoring: Scoring) -> None:
    """Score `rows`, the rows of the file `captions`, write the scores to `where` and print them.

    `skipped` is the number of videos without a row. Metrics that could not be computed are omitted; `not_computed` has
    the reasons.
    """
    check_pairs(*pairs(rows))
    warn_of_unspaced(*pairs(rows))
    for path in (where, *(sibling(captions, what) for what in (PER_VIDEO, ANSWERS, POINTS))):
        check_writable(path)
    videos = {row["video_id"]: {"video_id": row["video_id"]} for row in rows}
    details, reasons = measure_videos(rows, list(videos.values()), captions, scoring)
    details |= measure_timeliness(rows, captions, scoring) | {"captions": hash_rows(rows)}
    details = keep_earlier(list(videos.values()), captions, where, scoring, details)
    write_rows(sibling(captions, PER_VIDEO), videos.values())

    def figures(some: list[Row]) -> dict:
        return {**score(*pairs(some)), **video_means([videos[row["video_id"]] for row in some])}

    scores = score_by_task(rows, figures, scoring.subtasks) if scoring.subtasks else figures(rows)
    if reasons := {**scores.pop("not_computed", {}), **reasons}:
        scores["not_computed"] = reasons
    write_scores(where, scores, count=len(rows), skipped=skipped, **details)
    print_scores(json.loads(where.read_text()), where)


def measure_videos(rows: list[Row], videos: list[dict], captions: Path, scoring: Scoring) -> tuple[dict, dict]:
    """Add its metrics to each of `videos`. Returns details of how they were computed, and the reasons for metrics that
    could not be."""
    details, reasons = {}, {}
    for metric in VIDEO_METRICS:
        if not metric.wanted(scoring):
            continue
        try:
            details.update(metric.measure(rows, videos, captions, scoring))
        except (NotComputed, InputError) as error:
            logger.warning("%s could not be computed: %s", ", ".join(metric.names), error)
            reasons.update(dict.fromkeys(metric.names, str(error)))
    return details, reasons


def keep_earlier(videos: list[dict], captions: Path, where: Path, scoring: Scoring, details: dict) -> dict:
    """`details` with those of earlier scores in `where` that were not asked for this time, whose values are added to
    `videos`. Logs which are removed, if the captions may have changed since."""
    if not where.exists():
        return details
    earlier, each, per_video = {}, {}, sibling(captions, PER_VIDEO)
    try:
        earlier = read_object(where, "it is written again")
        each = {found["video_id"]: found for found in map(json.loads, per_video.read_text().splitlines())}
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s or %s cannot be read (%s), and is written again", where.name, per_video.name, first_line(error)
        )
    metrics = [one for one in VIDEO_METRICS if one.detail in earlier and not one.wanted(scoring)]
    timed = "timeliness" not in details and "events" in earlier.get("timeliness", {})
    names = [name for metric in metrics for name in metric.names] + ["timeliness"] * timed
    if not names:
        return details
    if earlier.get("captions") != details["captions"] or each.keys() != {video["video_id"] for video in videos}:
        logger.warning(
            "%s: %s removed, as not asked for and perhaps of other captions: to have it, give its flags again",
            where.name,
            ", ".join(names),
        )
        return details
    logger.info("%s: %s kept, as the captions are the same", where.name, ", ".join(names))
    for video in videos:
        known = each[video["video_id"]]
        video.update({key: known[key] for one in metrics for key in (*one.names, *one.more) if key in known})
    kept = {one.detail: earlier[one.detail] for one in metrics}
    return {**kept, **({"timeliness": earlier["timeliness"]} if timed else {}), **details}


def pairs(rows: list[Row]) -> tuple[dict, dict]:
    """References and captions by video id."""
    return {row["video_id"]: row["annotation"] for row in rows}, {row["video_id"]: row["result"] for row in rows}


def video_means(videos: list[dict]) -> dict[str, float]:
    """Mean of each per-video metric, over the videos that have it."""
    names = [name for metric in VIDEO_METRICS for name in metric.names]
    values = {name: [video[name] for video in videos if name in video] for name in names}
    return {name: fmean(found) for name, found in values.items() if found}


def score_bleurt(rows: list[Row], videos: list[dict], captions: Path, scoring: Scoring) -> dict:
    references = [[row["annotation"]] if isinstance(row["annotation"], str) else row["annotation"] for row in rows]
    values = bleurt(scoring.checkpoint, references, [row["result"] for row in rows], scoring.device)
    for video, value in zip(videos, values, strict=True):
        video["BLEURT"] = value
    return {"bleurt": {"checkpoint": str(scoring.checkpoint)}}


def score_fluency(rows: list[Row], videos: list[dict], captions: Path, scoring: Scoring) -> dict:
    """Raises NotComputed if the endpoint stops answering, or no caption could be judged."""
    judge = scoring.judge
    verdicts = judge.judge([row["result"] for row in rows], sibling(captions, ANSWERS))
    for video, row in zip(videos, rows, strict=True):
        verdict = verdicts[row["result"]]
        if verdict.score is None:
            video["not_judged"] = verdict.why
            logger.warning("the caption of video %s was not judged: %s", row["video_id"], verdict.why)
        else:
            video.update(Fluency=verdict.score, why=verdict.why)
    judged = sum("Fluency" in video for video in videos)
    if rows and not judged:
        raise NotComputed(f"no caption could be judged: {videos[0]['not_judged']}")
    return {"judge": {"model": judge.model, "judged": judged, "not_judged": len(rows) - judged}}


def score_lag(rows: list[Row], videos: list[dict], captions: Path, scoring: Scoring) -> dict:
    """Raises NotComputed for captions without the slots of their tokens."""
    try:
        for row in rows:
            lag.check(row)
        decode = find_decoder(captions)
        found = [lag.measure(row, decode) for row in rows]
    except ValueError as error:
        raise NotComputed(str(error)) from error
    spoken = sum("AL" in values for values in found)
    if not spoken:
        raise NotComputed("no caption contains a word")
    for video, values in zip(videos, found, strict=True):
        video.update(values)
    return {"lag": {"videos": spoken, "without_words": len(rows) - spoken}}


def measure_timeliness(rows: list[Row], captions: Path, scoring: Scoring) -> dict:
    """When the captions say what happens, under the key `timeliness`; empty without references with times."""
    try:
        if (times := times_of(rows, captions, scoring.times)) is None:
            return {}
        return {"timeliness": measure_file(rows, captions, times, find_decoder(captions))}
    except (ValueError, InputError) as error:
        logger.warning("timeliness could not be computed: %s", error)
        return {"timeliness": {"not_computed": str(error)}}


@dataclass(frozen=True)
class VideoMetric:
    """A metric of each video, whose mean is reported."""

    names: tuple[str, ...]
    """Keys that `measure` adds to a video."""
    measure: Callable[[list[Row], list[dict], Path, Scoring], dict]
    """Called with the rows, a dict for each of their videos to add the values to, the file of captions and the
    settings. Returns details for `<variant>_scores.json`. Raises NotComputed, with the reason, if it cannot."""
    wanted: Callable[[Scoring], bool] = lambda scoring: True
    detail: str = ""
    """The key of what `measure` returns, for a metric that is only computed if it is asked for."""
    more: tuple[str, ...] = ()
    """Further keys that `measure` adds to a video."""


VIDEO_METRICS = [
    VideoMetric(("BLEURT",), score_bleurt, lambda scoring: scoring.checkpoint is not None, "bleurt"),
    VideoMetric(("Fluency",), score_fluency, lambda scoring: scoring.judge is not None, "judge", ("why", "not_judged")),
    VideoMetric(STREAMING, score_lag),
]
"""Add a metric of single videos here."""


def find_decoder(captions: Path) -> Callable[[list[int]], str]:
    """A function from token ids to text, with the tokenizer of the model that wrote the file of captions.

    Raises ValueError, with the reason, if the model is unknown.
    """
    if not (beside := arguments_path(captions)).exists():
        raise ValueError(f"{beside.name}, which names the model that wrote {captions.name}, does not exist")
    tokenizer = load_processor(find_model(read_arguments(captions, {"model": str})["model"], ROOT)).tokenizer
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


def print_scores(scores: dict, where: Path) -> None:
    notes = {"AL": "clips", "LAAL": "clips", "early_words": "words per video written before its last clip"}
    if judge := scores.get("judge"):
        notes["Fluency"] = f"1 to 5; {judge['judged']} of {scores['count']} captions judged by {judge['model']}"
    width = max(map(len, ("metric", *scores)))
    print(f"\n{'metric':<{width}}{'value':>8}" if "tasks" not in scores else f"\n{table(scores)}")
    for name, value in scores.items():
        if isinstance(value, float) and "tasks" not in scores:
            print(f"{name:<{width}}{value:>8.2f}  {notes.get(name, '')}".rstrip())
    for name, reason in scores.get("not_computed", {}).items():
        print(f"{name:<{width}}{'-':>8}  {reason}")
    if timeliness := scores.get("timeliness"):
        print(describe(timeliness))
    print(f"{scores['count']} videos scored, {scores['skipped']} skipped\nscores: {where}")
