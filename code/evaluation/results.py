"""Reads, resumes and writes `<variant>_infer.json`: JSON Lines, one row a video. Knows nothing about models or metrics.

Each process of a run adds to a file of its own in `<variant>_infer.parts`, and rows are brought together at the start
of a run and at its end. A row is on the disk as soon as its caption is complete, so a killed run loses at most the
videos it was working on.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qwen_vl_streaming.common.errors import InputError

log = logging.getLogger(__name__)

Row = dict[str, object]

FIELDS: dict[str, type | tuple[type, ...]] = {
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
MOST = 2**31 - 1
"""Of a number in a row: token ids have to fit the tokenizer's."""
CAPTION_FIELDS = {name: FIELDS[name] for name in ("video_id", "annotation", "result")}
"""What a file of captions made elsewhere must have to be scored."""
SKIPPED = "skipped.jsonl"
SKIPPED_FIELDS = {"video_id": str, "reason": str}
"""What is written down of a video that was left out."""


def load_finished(
    path: Path, fields: Mapping[str, type | tuple[type, ...]] = FIELDS, whole: bool = False
) -> dict[str, Row]:
    """The rows of the file at `path`, by video_id and in the file's order; none where there is no file.

    `fields` are the names and types that each row must have; others are kept as they are. An incomplete last line,
    left by a killed run, is dropped with a warning, or refused where the file must be `whole`.

    Raises InputError for any other line that is no such row, for an id that comes twice, and for an unreadable file.
    """
    return _read(Path(path), fields, whole)[0]


def check_row(where: str, row: Row, variant: str) -> None:
    """Raise InputError, naming `where` the row is, where it contradicts its `variant` or itself."""
    tokens, slots, schedule = row["tokens"], row["slots"], row["schedule"]
    numbers = all(type(number) is int and 0 <= number <= MOST for number in (*tokens, *slots, *schedule))
    if row["variant"] != variant:
        fault = f"is of {row['variant']:.80}, but the arguments beside the file say {variant}"
    elif not numbers or len(schedule) != row["clips"] or not schedule:
        fault = f"does not have a number of tokens for each of its {str(row['clips'])[:20]} clips"
    elif sum(schedule) != len(slots) or slots != [slot for slot, count in enumerate(schedule, 1) for _ in range(count)]:
        fault = "has other slots than its schedule says"
    elif len(tokens) != len(slots):
        fault = "does not have a slot for each token"
    elif isinstance(row["seconds"], bool) or not 0 <= row["seconds"] <= MOST:
        fault = f"has taken {str(row['seconds'])[:20]} seconds"
    else:
        return
    raise InputError(f"{where}: {fault}: evaluate again with eval.sh")


class Appender:
    """`with Appender(path) as out: out.append(row)`: adds rows to a new or an interrupted file.

    Entering drops an incomplete last line from the file. Raises InputError where `load_finished` does.
    """

    def __init__(self, path: Path, fields: Mapping[str, type | tuple[type, ...]] = FIELDS) -> None:
        self.path, self.fields = Path(path), fields

    def __enter__(self) -> "Appender":
        rows, whole = _read(self.path, self.fields)
        self._ids = set(rows)
        with told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
            self._file.truncate(whole)
            if whole:
                self._file.seek(whole - 1)
                if self._file.read(1) != b"\n":  # a whole row, but made by something that ends without a newline
                    self._file.write(b"\n")
        return self

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on the disk. Raises ValueError for a bad row or an id already there,
        InputError where it cannot be written."""
        _check(row, self.fields)
        if row["video_id"] in self._ids:
            raise ValueError(f"video {row['video_id']!r} already has a row in {self.path}")
        with told(self.path):
            self._file.write(_line(row))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._ids.add(row["video_id"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with told(self.path):
                self._file.close()
        else:
            with contextlib.suppress(OSError):  # a row that found no room is still waiting to be written
                self._file.close()


def rows_part(path: Path, process: str) -> Path:
    """Where a process of the run that writes `path` adds its rows."""
    return _parts(path) / f"{process}.rows.jsonl"


def skipped_part(path: Path, process: str) -> Path:
    """Where a process of the run that writes `path` adds the videos that it left out."""
    return _parts(path) / f"{process}.skipped.jsonl"


def shared_mark(path: Path, token: str) -> Path:
    """A file by which the machines of a run see that they share a folder."""
    return _parts(path) / f"{token}.mark"


def sibling(path: Path, what: str) -> Path:
    """What goes with the result file at `path`: `group_scores.json` with `group_infer.json`, `x.scores.json` with
    `x.json`."""
    if path.stem.endswith("_infer"):
        return path.with_name(f"{path.stem.removesuffix('_infer')}_{what}")
    return path.with_suffix(f".{what}")


def count_left_out(path: Path) -> int:
    """Videos of which the file beside the result file at `path` says that they were left out."""
    return len(load_finished(sibling(path, SKIPPED), SKIPPED_FIELDS))


def load_skipped(path: Path) -> dict[str, Row]:
    """The videos that the processes of the run that writes `path` left out, by video_id."""
    return _load(sorted(_parts(path).glob("*.skipped.jsonl")), SKIPPED_FIELDS)


def load_all(path: Path, order: Iterable[str]) -> list[Row]:
    """The rows of the file and of its parts in the `order` of the data's video ids.

    Ids without a row (skipped videos) are passed over; of two rows for one video, the file's own or the first part's
    stays. Raises InputError for an id that `order` has twice, for a row whose id `order` lacks, and where
    `load_finished` does.
    """
    order = list(order)
    seen: set[str] = set()
    for video_id in order:
        if video_id in seen:
            raise InputError(f"video {video_id!r} comes twice in the data: give each video its own video_id")
        seen.add(video_id)
    rows = _load([path, *sorted(_parts(path).glob("*.rows.jsonl"))], FIELDS)
    for video_id in rows:
        if video_id not in seen:
            raise InputError(
                f"{path} has a row for video {video_id!r}, which is not in the data: "
                "it is from another data set, or from more of it, choose another output file"
            )
    return [rows[video_id] for video_id in order if video_id in rows]


def bring_together(path: Path, rows: Iterable[Row]) -> None:
    """Make `rows`, which `load_all` has given, the file, whole or not at all; then remove the parts."""
    lines = b"".join(map(_line, rows))
    if lines or path.exists():
        write_whole(path, lines)
    shutil.rmtree(_parts(path), ignore_errors=True)


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Nobody else writes this result file meanwhile. Raises InputError where somebody does, and where the folder
    cannot be written to."""
    lock = path.with_suffix(".lock")
    with contextlib.closing(_locked(lock, path)):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before it is released: see _locked


def _locked(lock: Path, path: Path) -> BinaryIO:
    """The file at `lock`, open and locked. Raises InputError where `only_writer` of `path` does."""
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
            raise InputError(f"another run is writing {path}: wait for its end, or give another --output-dir") from None
        except OSError as error:
            log.warning("%s: no locks on this file system (%s): see that no other run writes there", path, error)
            return file
        # Who held it may have removed the file since it was opened here: the next run would lock another of its name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()


def _parts(path: Path) -> Path:
    return path.with_suffix(".parts")


def _load(paths: Iterable[Path], fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for path in paths:
        for video_id, row in load_finished(path, fields).items():
            rows.setdefault(video_id, row)
    return rows


def check_writable(path: Path) -> None:
    """Raise InputError where `write_whole` could not make this file."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "it is a folder" if path.is_dir() else f"{folder} is not to be written to"
        raise InputError(f"{path} cannot be written ({what}): move it away, or give another place")


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """An OSError on the way to writing `path` becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, or give another place; the same command goes on "
            "from what is finished"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, bring it to the disk, then rename: a killed run leaves the old file or the new.
    Raises InputError where that fails."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def _line(row: Row) -> bytes:
    # Escaped to ASCII: some readers split lines at U+2028 and its like, and a lone surrogate has no UTF-8.
    return json.dumps(row).encode() + b"\n"


def _read(path: Path, fields: Mapping[str, type | tuple[type, ...]], whole: bool = False) -> tuple[dict[str, Row], int]:
    """The rows, and how many bytes at the file's start hold them; what follows is an incomplete line."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a result file") from None

    rows: dict[str, Row] = {}
    first_seen: dict[str, int] = {}
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not whole:
                log.warning("%s, line %d: dropped, incomplete: the run that wrote it was killed", path, number)
                return rows, len(data) - len(line)
            raise InputError(f"{path}, line {number}: not JSON ({error}): mend or delete this line") from None
        try:
            _check(row, fields)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}: mend or delete this line") from None
        video_id = row["video_id"]
        if video_id in rows:
            raise InputError(
                f"{path}, line {number}: video {video_id!r} is already in line {first_seen[video_id]}: "
                "delete one of the two"
            )
        rows[video_id], first_seen[video_id] = row, number
    return rows, len(data)


def _check(row: object, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise ValueError where `row` is not an object with these fields."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} where a row (a JSON object) should be")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"the row has no {name!r}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name!r} is {row[name]!r:.80}, a {type(row[name]).__name__}")
