"""Checks videos in worker processes and records the results, so that a killed run resumes.

Does not depend on where the videos come from.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress

from .parallel import run_tasks

VIDEOS_PER_TASK = 32


class Video:
    """What `inspect_videos` needs to know of a video. The defaults are those of a video on disk."""

    key: str
    """Identifies the video and its content across runs."""
    container: str = ""
    """The shard or archive that holds it, or its folder. A task opens one container."""
    one_task: bool = False
    """Whether all videos of the container belong in one task, because opening it is expensive."""
    target: Path | None = None
    """The file that it is unpacked to; None if it is not in a shard or archive."""
    size: int = 0
    """Bytes of `target`."""


@dataclass(frozen=True)
class Inspection:
    """The result of checking one video."""

    seconds: float = 0.0
    """Its duration."""
    error: str = ""
    """Why it cannot be used; empty if it can."""


def inspect_videos(
    videos: Iterable[Video],
    function: Callable[[Sequence[Any]], list[tuple[str, Inspection]]],
    journal: Path,
    workers: int,
    label: str,
    initializer: Callable[..., None] | None = None,
    *arguments: Any,
) -> dict[str, Inspection]:
    """Check `videos` and return their results by key.

    `function` receives up to VIDEOS_PER_TASK videos of one container, unpacks those that need it, and returns
    (key, result) for each. `initializer` and its arguments are as in `run_tasks`. Results are appended to `journal`;
    videos listed there are not checked again unless an unpacked file is gone. Raises what `run_tasks` raises.
    """
    known = _read_journal(journal)
    done: dict[str, Inspection] = {}
    todo: dict[str, Video] = {}
    for video in videos:
        result = known.get(video.key)
        if result and (result.error or _is_unpacked(video)):
            done[video.key] = result
        else:
            todo[video.key] = video
    tasks: list[Sequence[Video]] = []
    in_order = sorted(todo.values(), key=lambda video: (video.container, video.key))
    for _, group in groupby(in_order, lambda video: video.container):
        members = list(group)
        size = len(members) if members[0].one_task else VIDEOS_PER_TASK
        tasks += [members[start : start + size] for start in range(0, len(members), size)]
    if not tasks:
        return done
    _append(journal, "\n")  # ends a line that a killed run left incomplete
    with (
        Progress(total=len(todo), unit="video", desc=f"{label} videos") as bar,
        closing(run_tasks(function, tasks, min(workers, len(tasks)), initializer, *arguments)) as results,
    ):
        for result in results:
            _append(journal, "".join(json.dumps([key, found.seconds, found.error]) + "\n" for key, found in result))
            done.update(result)
            bar.update(len(result))
    return done


def _append(journal: Path, text: str) -> None:
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise InputError(
            f"cannot write {journal} ({error.strerror}): free some space, then run the same command again to resume"
        ) from error


def _is_unpacked(video: Video) -> bool:
    target = video.target
    return target is None or (target.is_file() and target.stat().st_size == video.size)


def _read_journal(path: Path) -> dict[str, Inspection]:
    """The results of earlier runs by key; incomplete lines are ignored."""
    known: dict[str, Inspection] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            key, seconds, error = json.loads(line)
        except (ValueError, TypeError):
            continue
        known[key] = Inspection(seconds, error)
    return known
