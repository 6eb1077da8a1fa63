"""The evaluation's tasks: which rows each takes, what is asked, and how the scores of sub-tasks become one.

`description` asks all videos the same question and scores all captions together. `funqa` asks each row's own question;
each of its six sub-tasks is scored by itself, and the mean of the six is what the paper's table has.

Knows nothing about models, nor how any measure is computed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from funqa.annotations import SUBTASKS
from qwen_vl_streaming.common.errors import InputError


@dataclass(frozen=True)
class Task:
    name: str
    data: str
    """Where mani_data.py writes its test rows."""
    trained: str
    """In the name of the folder of a checkpoint for it: qwen2_5vl-<trained>-<variant>."""
    subtasks: tuple[str, ...] = ()
    """Empty where there are none."""


TASKS = {
    task.name: task
    for task in (
        Task("description", "dataset/test_3_5.jsonl", "pe"),
        Task("funqa", "dataset/funqa_test.jsonl", "funqa", SUBTASKS),
    )
}


def get_task(name: str) -> Task:
    """Raises InputError for an unknown one."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def read_row(data: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What evaluation needs of a data row, as `read_data_rows` yields it: `video_id`, `video_path`, `question` (None:
    the one that is asked of all), `task`, and `annotation`, which is the reference or, where there are several, their
    list.

    Raises InputError, with what is wrong and the fix but not the row's place, where it is not of `task`, or a reference
    has no word.
    """
    check_subtask(data, task)
    question = data.get("question")
    if task.subtasks and question is None:
        raise InputError("has no question: give it one, or leave out --task funqa")
    if question is not None and not task.subtasks:
        raise InputError("has a question of its own: give --task funqa, or data without questions")
    references = data.get("references") or [data["human_caption"]]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise InputError("has references that are not a list of texts: correct or delete this line")
    if not all(any(map(str.isalnum, text)) for text in references):
        raise InputError("has a caption without a word: mend or delete this line")
    return {
        "video_id": str(data["video_id"]),
        "video_path": data["video_path"],
        "question": question,
        "task": data["task"] if task.subtasks else task.name,
        "annotation": references if len(references) > 1 else references[0],
    }


def check_subtask(row: Mapping[str, Any], task: Task) -> None:
    """Raise InputError where a data row, or a row of captions, is of another task."""
    found = row.get("task")
    if task.subtasks and found not in task.subtasks:
        names = ", ".join(task.subtasks)
        raise InputError(f"is of sub-task {found!r}, none of {names}: give data of {task.name}, or another --task")
    if not task.subtasks and found in SUBTASKS:
        raise InputError(f"is of sub-task {found} of funqa: give --task funqa")


def check_captions(path: Path, rows: Iterable[Mapping[str, Any]], task: Task) -> None:
    """Raise InputError where a row of the file of captions at `path` is of another task."""
    for row in rows:
        try:
            check_subtask(row, task)
        except InputError as error:
            raise InputError(f"{path}, video {row['video_id']}: {error}") from error


def score_by_task(
    rows: Sequence[Mapping[str, Any]], score: Callable[[list], Mapping[str, Any]], subtasks: Sequence[str]
) -> dict[str, Any]:
    """The scores of each of `subtasks`, by `score(its rows)`, and their means.

    `score` returns metrics by name, as floats, and in `not_computed` the reasons for those that it lacks. The result
    has under each metric's name the mean over the sub-tasks that have rows, in `tasks` what `score` returned for each
    with the `count` of its rows, in `mean_over` their names, and in `missing_tasks` those without a row, which are in
    no mean. A metric that one of the sub-tasks lacks has no mean; the reason is in `not_computed`.
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
            reasons.setdefault(metric, f"{', '.join(lacking)}: no video has it")
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
    """What `score_by_task` returned, a line a sub-task."""
    tasks = scores["tasks"]
    metrics = [name for name, value in scores.items() if isinstance(value, float)]
    metrics += [name for name in scores.get("not_computed", {}) if any(name in found for found in tasks.values())]
    widths = [max(8, len(metric) + 2) for metric in metrics]

    def line(label: str, values: Mapping[str, Any], count: int) -> str:
        cells = [f"{values[m]:>{w}.2f}" if m in values else f"{'-':>{w}}" for m, w in zip(metrics, widths, strict=True)]
        return f"{label:<10}" + "".join(cells) + f"{count:>8}"

    head = f"{'sub-task':<10}" + "".join(f"{m:>{w}}" for m, w in zip(metrics, widths, strict=True)) + f"{'rows':>8}"
    lines = [head, *(line(name, found, found["count"]) for name, found in tasks.items())]
    lines.append(line(f"mean of {len(tasks)}", scores, sum(found["count"] for found in tasks.values())))
    for name in scores.get("missing_tasks", []):
        lines.append(f"{name} has no row: it is in no mean")
    return "\n".join(lines)
