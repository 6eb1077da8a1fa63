"""Reads FunQA's annotation files. Each entry is a question about a video and an answer. Does not depend on video files.

An annotation file is one JSON list of objects with `instruction` (the question), `visual_input` (the video's file
name), `output` (the answer), `task` and, in the published files, `ID`. The published files hold each question of a
video in several phrasings, and several answers to each phrasing.
"""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from preparation.rules import BadSample, read_text
from qwen_vl_streaming.common.errors import InputError

SUBTASKS = ("H2", "H3", "C2", "C3", "M2", "M3")
"""Description (2) and reasoning (3) of humor, creative and magic videos."""
OTHER_SUBTASKS = ("H1", "H4", "C1", "C4", "C5", "M1")
"""Time localization (1), titles (4) and a creativity score (5), which the paper does not evaluate."""

OTHER_SUBTASK = "other sub-task"
REPEATED = "repeated question and answer"


@dataclass(frozen=True, slots=True)
class Entry:
    """One question about one video, with one answer."""

    where: str
    """The file and the number of the entry, for messages."""
    video: str = ""
    """The video's file name."""
    task: str = ""
    question: str = ""
    answer: str = ""
    identity: str = ""
    """Its ID in the annotation file; empty if it has none."""
    dropped: str = ""
    """Why it is skipped although it is valid."""
    error: str = ""
    """Why it cannot be used."""

    @property
    def stem(self) -> str:
        """The video's file name without its suffix."""
        return PurePosixPath(self.video).stem


def read_annotations(data: bytes, name: str) -> list[Any]:
    """Parse the bytes of the annotation file `name` as a list of entries.

    Raises InputError if it is not a list or has no question of SUBTASKS.
    """
    try:
        entries = json.loads(data.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({error}): download it again") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{name} is not a list of questions: give FunQA's own annotation file, such as FunQA_test.json"
        )
    tasks = Counter(str(entry.get("task"))[:9] for entry in entries if isinstance(entry, dict))
    if not tasks.keys() & set(SUBTASKS):
        found = ", ".join(f"{task} ({count})" for task, count in tasks.most_common(5)) or "no tasks"
        raise InputError(
            f"{name} has no question of {', '.join(SUBTASKS)}, only {found}: give FunQA's own annotation file"
        )
    return entries


def read_entries(entries: list[Any], name: str) -> Iterator[Entry]:
    """Yield an Entry for each item of the annotation file `name`, in order."""
    identities: set[str] = set()
    seen: set[tuple[str, ...]] = set()
    for number, data in enumerate(entries, 1):
        where = f"{name}, entry {number}"
        try:
            entry = _read_entry(data, where)
            if entry.identity and entry.identity in identities:
                raise BadSample(f"duplicate ID: {entry.identity}")
        except BadSample as error:
            video = str(data.get("visual_input")) if isinstance(data, dict) else ""
            yield Entry(where, video=video.encode(errors="replace").decode(), error=str(error))
            continue
        identities.add(entry.identity)
        key = (entry.video, entry.task, entry.question, entry.answer)
        if not entry.dropped and key in seen:
            entry = Entry(where, entry.video, entry.task, dropped=REPEATED)
        seen.add(key)
        yield entry


def _read_entry(data: Any, where: str) -> Entry:
    """Validate one item of an annotation file. Raises BadSample."""
    if not isinstance(data, dict):
        raise BadSample("entry is not an object")
    task, identity = data.get("task"), str(data.get("ID", "") or "")
    if task in OTHER_SUBTASKS:
        return Entry(where, str(data.get("visual_input")), task, identity=identity, dropped=OTHER_SUBTASK)
    if task not in SUBTASKS:
        raise BadSample(f"unknown sub-task: {str(task)[:40]!r}")
    video = PurePosixPath(read_text(data, "visual_input")).name
    question, answer = read_text(data, "instruction"), read_text(data, "output")
    if not any(map(str.isalnum, answer)):
        raise BadSample("output has no words")
    return Entry(where, video, task, question, answer, identity)
