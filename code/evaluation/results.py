"""Reads, resumes and writes `<variant>_infer.json`: JSON Lines, one row per video. Knows nothing about models or
metrics.

Each process of a run appends to its own file in `<variant>_infer.parts`. These parts are merged at the start of a run
and at its end. A row is on disk as soon as its caption is complete, so a run that is killed loses at most the videos
that it was captioning.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from json_lines import appending, read_lines, write_rows
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object, reporting_write_errors

log = logging.getLogger(__name__)

Row = dict[str, object]
Fields = Mapping[str, type | tuple[type, ...]]
"""Names and types that each row must have."""

FIELDS: Fields = {
    "video_id": str,
    "annotation": (str, list),  # the reference, or several
    "task": str,
    "result": str,
    "variant": str,
    "schedule": list,  # k_1 … k_N, answer tokens
    "tokens": list,  # ids written
    "slots": list,  # the slot of each token
    "clips": int,  # N
    "seconds": (int, float),
}
MAX_NUMBER = 2**31 - 1
"""Largest number in a row: the tokenizer holds token ids in 32 bits."""
CAPTION_FIELDS = {name: FIELDS[name] for name in ("video_id", "annotation", "result")}
"""Fields that a file of captions from elsewhere needs to be scored."""
SKIPPED = "skipped.jsonl"
SKIPPED_FIELDS = {"video_id": str, "reason": str}
"""Fields of a skipped video."""
SCORES, PER_VIDEO, POINTS = "scores.json", "per_video.jsonl", "timeliness.jsonl"
"""What is computed from the captions, beside them."""


def load_finished(path: Path, fields: Fields = FIELDS, whole: bool = False) -> dict[str, Row]:
    """The rows of the file at `path` by video_id, in the file's order; empty if the file does not exist.

    Fields besides `fields` are kept. An incomplete last line, left by a killed run, is dropped with a warning, or
    refused if the file must be `whole`.

    Raises InputError for any other invalid line, for a repeated id, and for a file that cannot be read.
    """
    return _read(path, fields, whole)[0]


def check_row(where: str, row: Row, variant: str) -> None:
    """Raise InputError if the row, which is at `where`, contradicts the `variant` or itself."""
    tokens, slots, schedule = row["tokens"], row["slots"], row["schedule"]
    numbers = all(type(number) is int and 0 <= number <= MAX_NUMBER for number in (*tokens, *slots, *schedule))
    if row["variant"] != variant:
        fault = f"the variant is {row['variant']:.80}, but {variant} in the arguments beside the file"
    elif not numbers or len(schedule) != row["clips"] or not schedule:
        fault = f"the schedule does not have a number of tokens for each of the {str(row['clips'])[:20]} clips"
    elif sum(schedule) != len(slots) or slots != [slot for slot, count in enumerate(schedule, 1) for _ in range(count)]:
        fault = "the slots do not match the schedule"
    elif len(tokens) != len(slots):
        fault = "the number of slots differs from the number of tokens"
    elif "end_of_slot" in row and type(row["end_of_slot"]) is not int:
        fault = f"end_of_slot is {row['end_of_slot']!r:.20}, not a token id"
    elif isinstance(row["seconds"], bool) or not 0 <= row["seconds"] <= MAX_NUMBER:
        fault = f"seconds is {str(row['seconds'])[:20]}"
    else:
        return
    raise InputError(f"{where}: {fault}: run eval.sh again")


@contextlib.contextmanager
def appender(path: Path, fields: Fields = FIELDS) -> Iterator[Callable[[Row], None]]:
    """A function that appends a row to a new or an interrupted file, and waits until it is on disk.

    The function raises ValueError for an invalid row or a repeated id, and InputError if the row cannot be written. On
    entry an incomplete last line is removed from the file. Raises InputError as `load_finished` does.
    """
    rows, size = _read(path, fields)
    ids = set(rows)
    with appending(path, size) as write:

        def append(row: Row) -> None:
            _check(row, fields)
            if row["video_id"] in ids:
                raise ValueError(f"video {row['video_id']!r} already has a row in {path}")
            write(row)
            ids.add(row["video_id"])

        yield append


def rows_part(path: Path, process: str) -> Path:
    """The file to which a process of the run that writes `path` appends its rows."""
    return _parts(path) / f"{process}.rows.jsonl"


def skipped_part(path: Path, process: str) -> Path:
    """The file to which a process of the run that writes `path` appends the videos that it skipped."""
    return _parts(path) / f"{process}.skipped.jsonl"


def shared_marker(path: Path, token: str) -> Path:
    """A file that shows the nodes of a run that they share a folder."""
    return _parts(path) / f"{token}.marker"


def sibling(path: Path, what: str) -> Path:
    """The path of a file that belongs to the result file at `path`: `group_scores.json` for `group_infer.json`,
    `x.scores.json` for `x.json`."""
    if path.stem.endswith("_infer"):
        return path.with_name(f"{path.stem.removesuffix('_infer')}_{what}")
    return path.with_suffix(f".{what}")


def count_skipped(path: Path) -> int:
    """The number of videos in the file of skipped videos beside the result file at `path`."""
    return len(load_finished(sibling(path, SKIPPED), SKIPPED_FIELDS))


def load_skipped(path: Path) -> dict[str, Row]:
    """The videos that the processes of the run that writes `path` skipped, by video_id."""
    return _load(sorted(_parts(path).glob("*.skipped.jsonl")), SKIPPED_FIELDS)


def load_all(path: Path, order: Sequence[str]) -> list[Row]:
    """The rows of the file and of its parts, in the `order` of the data's video ids.

    Ids without a row (skipped videos) are omitted. Of two rows for one video, that of the file or of the first part is
    kept. Raises InputError for a row whose id is not in `order`, and as `load_finished` does.
    """
    rows = _load([path, *sorted(_parts(path).glob("*.rows.jsonl"))], FIELDS)
    if unknown := rows.keys() - set(order):
        raise InputError(
            f"{path} has a row for video {min(unknown)!r}, which is not in the data: "
            "it was made from other data or with a larger --limit: give another --output-file"
        )
    return [rows[video_id] for video_id in order if video_id in rows]


def merge_parts(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file by `rows`, as returned by `load_all`, in one step; then remove the parts. If the file has other
    rows, what was computed from those is removed first."""
    if list(rows) != list(load_finished(path).values()):
        _remove_computed(path)
    if rows or path.exists():
        write_rows(path, rows)
    shutil.rmtree(_parts(path), ignore_errors=True)


def _remove_computed(path: Path) -> None:
    for file in (sibling(path, what) for what in (SCORES, PER_VIDEO, POINTS)):
        if file.exists():
            with reporting_write_errors(file):
                file.unlink()
            log.warning(
                "%s removed, as it is of other captions than %s has now: to have all of it, give its flags again",
                *(file.name, path.name),
            )


def hash_rows(rows: Sequence[Mapping]) -> str:
    """Identifies rows by all that they contain: captions with all that is scored, or events."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def scores_of(path: Path, rows: Sequence[Row]) -> tuple[dict, str]:
    """The scores of `rows`, those of the result file at `path`, and an empty string; or, if there are none or they are
    of other captions, an empty dict and the reason. Scores of earlier versions, without a hash of the captions, are
    compared by the number of captions. Raises InputError if they cannot be read."""
    found = sibling(path, SCORES)
    if not found.exists():
        return {}, f"{found.name} does not exist"
    scores = read_object(found, "remove it, then score again")
    same = scores["captions"] == hash_rows(rows) if "captions" in scores else scores.get("count") == len(rows)
    return (scores, "") if same else ({}, f"{found.name} is of other captions: score again with eval.sh --score-only")


@contextlib.contextmanager
def exclusive_writer(path: Path) -> Iterator[None]:
    """Locks the result file for this run. Raises InputError if another run holds the lock, or the folder is not
    writable."""
    lock = path.with_suffix(".lock")
    with contextlib.closing(_locked(lock, path)):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before the lock is released: see _locked


def _locked(lock: Path, path: Path) -> BinaryIO:
    """The file at `lock`, open and locked. Raises InputError as `exclusive_writer` of `path` does."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("wb")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): give another --output-dir") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise InputError(f"another run is writing {path}: wait for it, or give another --output-dir") from None
        except OSError as error:
            log.warning("%s: the file system has no locks (%s): make sure that no other run writes there", path, error)
            return file
        # The previous holder may have removed the file since it was opened here; the next run would lock a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()


def _parts(path: Path) -> Path:
    return path.with_suffix(".parts")


def _load(paths: Iterable[Path], fields: Fields) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for path in paths:
        for video_id, row in load_finished(path, fields).items():
            rows.setdefault(video_id, row)
    return rows


def check_writable(path: Path) -> None:
    """Raise InputError if `write_file` could not write this file."""
    try:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir():
            fault = "it is a folder"
        elif not folder.is_dir() or not os.access(folder, os.W_OK):
            fault = f"{folder} is not writable"
        else:
            return
    except OSError as error:  # such as a name that is too long
        fault = error.strerror
    raise InputError(f"{path} cannot be written ({fault}): move it, or give another path")


def check_output(output: Path, *inputs: Path) -> None:
    """Raise InputError if `output` cannot be written or is one of `inputs`."""
    check_writable(output)
    for path in inputs:
        if output.exists() and output.samefile(path):
            raise InputError(f"--output {output} would overwrite what is read: give another name")


def _read(path: Path, fields: Fields, whole: bool = False) -> tuple[dict[str, Row], int]:
    """The rows, and the number of bytes that hold them; what follows is an incomplete line."""
    rows: dict[str, Row] = {}
    line_of: dict[str, int] = {}
    lines, size = read_lines(path, whole)
    for number, row in lines:
        try:
            _check(row, fields)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}: fix or delete this line") from None
        video_id = row["video_id"]
        if (other := line_of.setdefault(video_id, number)) != number:
            raise InputError(
                f"{path}, line {number}: video {video_id!r} is already in line {other}: delete one of them"
            )
        rows[video_id] = row
    return rows, size


def _check(row: object, fields: Fields) -> None:
    """Raise ValueError if `row` is not an object with these fields."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a row (a JSON object), found {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"the row has no {name!r}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name!r} is {row[name]!r:.80}, a {type(row[name]).__name__}")
