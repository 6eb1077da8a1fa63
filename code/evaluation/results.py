"""Reads, resumes and writes `<variant>_infer.json`: JSON Lines, one row a video. Knows nothing about models or metrics.

A row is on the disk before the next video is begun, so a killed run loses at most the videos it was working on.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from qwen_vl_streaming.errors import InputError

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
CAPTION_FIELDS = {name: FIELDS[name] for name in ("video_id", "annotation", "result")}
"""What a file of captions made elsewhere must have to be scored."""


def load_finished(path: Path, fields: Mapping[str, type | tuple[type, ...]] = FIELDS) -> dict[str, Row]:
    """The rows of the file at `path`, by video_id and in the file's order; none where there is no file.

    `fields` are the names and types that each row must have; others are kept as they are. An incomplete last line,
    left by a killed run, is dropped with a warning.

    Raises InputError for any other line that is no such row, for an id that comes twice, and for an unreadable file.
    """
    return _read(Path(path), fields)[0]


class Appender:
    """`with Appender(path) as out: out.append(row)`: adds rows to a new or an interrupted result file.

    Entering drops an incomplete last line from the file. Raises InputError where `load_finished` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> "Appender":
        rows, whole = _read(self.path, FIELDS)
        self._ids = set(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        self._file.truncate(whole)
        if whole:
            self._file.seek(whole - 1)
            if self._file.read(1) != b"\n":  # a whole row, but made by something that ends without a newline
                self._file.write(b"\n")
        return self

    def append(self, row: Row) -> None:
        """Write one row and wait until it is on the disk. Raises ValueError for a bad row or an id already there."""
        _check(row, FIELDS)
        if row["video_id"] in self._ids:
            raise ValueError(f"video {row['video_id']!r} already has a row in {self.path}")
        self._file.write(_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._ids.add(row["video_id"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def finish(path: Path, order: Iterable[str]) -> list[Row]:
    """Rewrite the file's rows in the `order` of the data's video ids, whole or not at all, and return them.

    Ids without a row (skipped videos) are passed over. Raises InputError for an id that `order` has twice, for a row
    whose id `order` lacks, and where `load_finished` does.
    """
    order = list(order)
    seen: set[str] = set()
    for video_id in order:
        if video_id in seen:
            raise InputError(f"video {video_id!r} comes twice in the data: give each video its own video_id")
        seen.add(video_id)
    rows = load_finished(path)
    for video_id in rows:
        if video_id not in seen:
            raise InputError(
                f"{path} has a row for video {video_id!r}, which is not in the data: "
                "it is from another data set, choose another output file"
            )
    ordered = [rows[video_id] for video_id in order if video_id in rows]
    write_whole(path, b"".join(map(_line, ordered)))
    return ordered


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, bring it to the disk, then rename: a killed run leaves the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _line(row: Row) -> bytes:
    # Escaped to ASCII: some readers split lines at U+2028 and its like, and a lone surrogate has no UTF-8.
    return json.dumps(row).encode() + b"\n"


def _read(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> tuple[dict[str, Row], int]:
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
        except ValueError as error:
            if number == len(lines):
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
        if not isinstance(row[name], kind):
            raise ValueError(f"{name!r} is {row[name]!r:.80}, a {type(row[name]).__name__}")
