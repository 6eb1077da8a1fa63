"""The evaluation's tasks: which rows each accepts, which question is asked, and how scores of sub-tasks are averaged.

`description` asks each row's own question, as training does, or the same one where a row has none, and scores all
captions together. `funqa` asks each row's own question and scores each of its six sub-tasks separately; the paper
reports the mean of the six.

Knows nothing about models and about how metrics are computed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from funqa.annotations import SUBTASKS
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.video_part import FIELDS as PART
from qwen_vl_streaming.timeline.segments import row_caption
from text import text_table


@dataclass(frozen=True)
class Task:
    name: str
    data: str
    """The file of test rows that mani_data.py writes."""
    trained: str
    """Part of a checkpoint's folder name: qwen2_5vl-<trained>-<variant>."""
    subtasks: tuple[str, ...] = ()
    """Empty if the task has none."""


TASKS = {
    task.name: task
    for task in (
        Task("description", "dataset/test_3_5.jsonl", "pe"),
        Task("funqa", "dataset/funqa_test.jsonl", "funqa", SUBTASKS),
    )
}


def get_task(name: str) -> Task:
    """The task with this name. Raises InputError for an unknown name."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def read_row(data: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """The fields of a data row that evaluation needs: `video_id`, `video_path`, `video_start` and `video_end` (None for
    the whole video), `question` (None for the default question), `task`, and `annotation`, which is the reference or a
    list of several. The reference is `human_caption`, else the joined text of `segments`, which are added if the row
    has them.

    Raises InputError, without the row's line number, if the row is of another task or a reference has no word.
    """
    check_subtask(data, task)
    question = data.get("question")
    if task.subtasks and question is None:
        raise InputError("has no question: add one, or remove --task funqa")
    references = data.get("references") or [row_caption(data)]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise InputError("has references that are not a list of strings: fix or delete this line")
    if not all(any(map(str.isalnum, text)) for text in references):
        raise InputError("has a caption without a word: fix or delete this line")
    return {
        "video_id": str(data["video_id"]),
        "video_path": data["video_path"],
        **{name: data.get(name) for name in PART},
        "question": question,
        "task": data["task"] if task.subtasks else task.name,
        "annotation": references if len(references) > 1 else references[0],
        **({} if data.get("segments") is None else {"segments": data["segments"]}),
    }


def video_seconds(data: Mapping[str, Any]) -> float:
    """The duration of the video of a data row in seconds; 0 where it has none. Raises InputError, without the row's
    place, for anything else."""
    value = data.get("video_duration_in_s") or 0
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"video_duration_in_s is {str(value)[:40]!r}: give seconds, or delete this line")
    return seconds


def check_subtask(row: Mapping[str, Any], task: Task) -> None:
    """Raise InputError if a data row, or a row of captions, is of another task."""
    found = row.get("task")
    if task.subtasks and found not in task.subtasks:
        names = ", ".join(task.subtasks)
        raise InputError(f"has sub-task {found!r}, not one of {names}: use data of {task.name}, or another --task")
    if not task.subtasks and found in SUBTASKS:
        raise InputError(f"has sub-task {found} of funqa: give --task funqa")


def check_captions(path: Path, rows: Iterable[Mapping[str, Any]], task: Task) -> None:
    """Raise InputError if a row of the file of captions at `path` is of another task."""
    for row in rows:
        try:
            check_subtask(row, task)
        except InputError as error:
            raise InputError(f"{path}, video {row['video_id']}: {error}") from error


def score_by_task(
    rows: Sequence[Mapping[str, Any]], score: Callable[[list], Mapping[str, Any]], subtasks: Sequence[str]
) -> dict[str, Any]:
    """The scores of each of `subtasks`, computed by `score(rows)`, and their means.

    `score` returns metrics by name as floats, and in `not_computed` the reasons for missing metrics. The result has the
    mean of each metric over the sub-tasks that have rows; in `tasks` what `score` returned for each sub-task, with the
    `count` of its rows; in `mean_over` the names of the sub-tasks; and in `missing_tasks` those without rows, which are
    excluded from the means. A metric that one of the sub-tasks lacks has no mean; the reason is in `not_computed`.
    """
    scores: dict[str, dict[str, Any]] = {}
    for subtask in subtasks:
        if some := [row for row in rows if row["task"] == subtask]:
            scores[subtask] = {**score(some), "count": len(some)}
    metrics = [name for found in scores.values() for name, value in found.items() if isinstance(value, float)]
    reasons: dict[str, str] = {}
    for subtask, found in scores.items():
        for metric, reason in found.get("not_computed", {}).items():
            reasons.setdefault(metric, f"{subtask}: {reason}")
    means: dict[str, Any] = {}
    for metric in dict.fromkeys(metrics):
        lacking = [subtask for subtask, found in scores.items() if metric not in found]
        if lacking:
            reasons.setdefault(metric, f"{', '.join(lacking)}: no video has this metric")
        else:
            means[metric] = fmean(found[metric] for found in scores.values())
    missing = [subtask for subtask in subtasks if subtask not in scores]
    return {
        **means,
        **({"not_computed": reasons} if reasons else {}),
        "tasks": scores,
        "mean_over": list(scores),
        **({"missing_tasks": missing} if missing else {}),
    }


def table(scores: Mapping[str, Any]) -> str:
    """The scores of `score_by_task` as text, one line per sub-task."""
    tasks = scores["tasks"]
    metrics = [name for name, value in scores.items() if isinstance(value, float)]
    metrics += [name for name in scores.get("not_computed", {}) if any(name in found for found in tasks.values())]
    lines = [["sub-task", *metrics, "rows"]]
    mean = {**scores, "count": sum(found["count"] for found in tasks.values())}
    for name, found in (*tasks.items(), (f"mean of {len(tasks)}", mean)):
        values = (f"{found[metric]:.2f}" if metric in found else "-" for metric in metrics)
        lines.append([name, *values, str(found["count"])])
    missing = [f"{name} has no rows: it is excluded from the means" for name in scores.get("missing_tasks", [])]
    return "\n".join([text_table(lines, first=10), *missing])
