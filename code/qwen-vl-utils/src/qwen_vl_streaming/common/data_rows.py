"""Reads and checks the rows of a data set. All programs use this module, so they accept the same data.

JSON Lines are parsed here because `datasets` does not keep line numbers, converts strings that look like dates to dates
and large ids to floats, and fails on a byte order mark. `tables.py` reads all other sources. Checks only the fields
`video_id`, `video_path`, `human_caption`, `question`, `video_start`, `video_end`, `segments` and `segment_time`.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .numbers import is_number
from .tables import CAPTIONS, is_json_lines, list_names, read_table, unreadable
from .video_part import video_part

SURROGATE = re.compile("[\ud800-\udfff]")
"""Matches an unpaired surrogate. JSON can escape it, but UTF-8 cannot encode it."""
SEGMENT_TIMES = ("end", "start", "spread")
"""Values of `segment_time`: when the text of a segment may be written. `end`, the default: all of it from the segment's
end, because a description is about the whole segment. `start`: all of it from the segment's start. `spread`: word by
word at an even pace, each at its end, as for the words of a subtitle."""
TOKENS_PER_SECOND = (3.0, 5.0)
"""Caption tokens per second of video that a stream can follow: the default bounds of mani_data.py."""
FIX = "correct or delete this row"
HOW = "see 'Captions of your own' in docs/data.md"
RENAME = f"rename a field, {HOW}, or delete this row"
TABLES = {".csv": "a CSV file", ".tsv": "a TSV file"}
STARTS = {
    b"[": "a JSON array",
    b"PAR1": "a Parquet file whose name does not end in .parquet",
    b"PK\x03\x04": "an Excel or zip file",
    b"\x1f\x8b": "compressed by gzip",
}
"""How files start that are not JSON Lines."""


def read_data_rows(source: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row with its number, counted from 1.

    Each row has a unique `video_id` (a string or an integer), the string `video_path`, the string `human_caption` or
    `segments` or both, and optionally a non-blank string `question` and a part of the video (see `video_part`).
    `segments` are a list of objects with the numbers `start` and `end` and the string `text`; whether they are in order
    is checked by `timeline.segments`. `segment_time` is one of SEGMENT_TIMES, if the row has it. `source` is one of:

    - A JSON Lines file in UTF-8, with or without byte order marks, with LF or CRLF. Blank lines are skipped. The number
      of a row is its line number.
    - A Parquet file, or a pattern such as `data/train-*.parquet`. Matching files are read in the order of their names.
    - A folder written by `Dataset.save_to_disk`.
    - `hf://datasets/OWNER/NAME[:SPLIT]`, which is downloaded to the cache of `datasets`.

    Writes no files next to the data. Raises InputError if `source` cannot be read, or, with the number of the row, if a
    row does not have this format.
    """
    for number, row in check_data_rows(source):
        if isinstance(row, InputError):
            raise row
        yield number, row


def check_data_rows(source: str | Path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yields the same as `read_data_rows`, but in place of an invalid row the error that it would raise."""
    number_of: dict[str, int] = {}
    rows = _read_lines(Path(source)) if is_json_lines(source) else enumerate(read_table(str(source)), 1)
    for number, content in rows:
        try:
            row = _check_row(_parse(content) if isinstance(content, bytes) else content)
        except InputError as error:
            yield number, InputError(f"{row_place(source, number)}: {error}")
            continue
        video_id = str(row["video_id"])
        if (other := number_of.setdefault(video_id, number)) != number:
            both = f"{row_place(source, other, number)} both have the video_id {video_id}"
            yield number, InputError(f"{both}: rename or delete one")
            continue
        yield number, row


def row_place(source: str | Path, *numbers: int) -> str:
    """Formats the place of rows for messages: `train.jsonl, line 3` or `train.parquet, rows 3 and 7`."""
    unit = "line" if is_json_lines(source) else "row"
    return f"{source}, {unit}{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"


def hash_data(source: str | Path) -> str:
    """Returns the SHA-256 of a data set's contents.

    Hashes the bytes of a JSON Lines file. For other sources, hashes the rows in order, without media, so that the
    same rows in a Parquet file, in a folder and on the Hub have the same hash.

    Raises InputError if the data cannot be read.
    """
    if is_json_lines(source):
        try:
            with open(source, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(source, error.strerror) from error
    digest = hashlib.sha256()
    for row in read_table(str(source)):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def check_characters(row: dict[str, Any], *fields: str) -> None:
    """Raises InputError if one of `fields` has an unpaired surrogate. File names and tokenizers do not accept it."""
    for name in fields:
        if SURROGATE.search(str(row.get(name))):
            raise InputError(f"{name} has an unpaired surrogate, which is not a valid character: {FIX}")


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    first = True
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if (line := line.removeprefix(codecs.BOM_UTF8)).strip():
                    if first:
                        _check_format(path, line.lstrip())
                        first = False
                    yield number, line
    except OSError as error:
        raise unreadable(path, error.strerror) from error


def _check_format(path: Path, start: bytes) -> None:
    """Raises InputError if a file that starts with `start` has another format than JSON Lines."""
    if start.startswith(b"{"):
        return
    named = (name for begin, name in STARTS.items() if start.startswith(begin))
    if found := TABLES.get(path.suffix.lower()) or next(named, ""):
        raise InputError(f"{path} is {found}, not JSON Lines: convert it, {HOW}")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"cannot be read as UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except RecursionError as error:
        raise InputError(f"is nested too deeply: {FIX}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON ({error.msg} at character {error.pos + 1}): {FIX}") from error
    except ValueError as error:  # a number with more digits than Python converts
        raise InputError(f"has a number that is too long: {FIX}") from error
    if not isinstance(row, dict):
        raise InputError(f"is not a JSON object: {FIX}")
    return row


def _check_row(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("video_id", "video_path"):
        if name not in row:
            raise InputError(f"has no {name} (its fields: {list_names(row)}): {RENAME}")
    if "human_caption" not in row and row.get("segments") is None:
        raise InputError(f"has no human_caption and no segments (its fields: {list_names(row)}): {RENAME}")
    video_id, question = row["video_id"], row.get("question")
    if isinstance(video_id, bool) or not isinstance(video_id, str | int) or video_id == "":
        raise InputError(f"has the video_id {_show(video_id)}, which is not a string or an integer: {FIX}")
    for name in ("video_path", "human_caption"):
        if name in CAPTIONS and row.get(name) is None and row.get("segments") is not None:
            continue
        if not isinstance(row[name], str):
            raise InputError(f"has the {name} {_show(row[name])}, which is not a string: {FIX}")
    _check_segments(row)
    if question is not None and not (isinstance(question, str) and question.strip()):
        raise InputError(
            f"has the question {_show(question)}, which is not a non-blank string: correct it or delete the field"
        )
    check_characters(row, "video_id", "video_path", "question")
    video_part(row)
    return row


def _check_segments(row: dict[str, Any]) -> None:
    if (segments := row.get("segments")) is None:
        return
    if not isinstance(segments, list):
        raise InputError(f"has the segments {_show(segments)}, which are not a list: {FIX}")
    for number, segment in enumerate(segments, 1):
        name = f"segment {number}, {_show(segment)},"
        if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
            raise InputError(f"{name} is not an object with start, end and text: {FIX}")
        times = segment.get("start"), segment.get("end")
        if not all(is_number(time) or isinstance(time, float) for time in times):  # `check_segments` refuses NaN
            raise InputError(f"{name} has a start or an end that is not a number of seconds: {FIX}")
        check_characters(segment, "text")
    if (time := row.get("segment_time")) is not None and time not in SEGMENT_TIMES:
        raise InputError(f"has the segment_time {_show(time)}, which is not one of {', '.join(SEGMENT_TIMES)}: {FIX}")


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
