"""Reads and checks the rows of a data set. All programs use this module, so they accept the same data.

JSON Lines are parsed here because `datasets` does not keep line numbers, converts strings that look like dates to dates
and large ids to floats, and fails on a byte order mark. Parquet files, folders written by `save_to_disk` and data sets
on the Hugging Face Hub are read with `datasets`. Checks only the four fields `video_id`, `video_path`, `human_caption`
and `question`.
"""

import codecs
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

HUB = "hf://datasets/"
"""Prefix of a data set on the Hub: hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME:SPLIT."""
PARQUET = ".parquet"
SURROGATE = re.compile("[\ud800-\udfff]")
"""Matches an unpaired surrogate. JSON can escape it, but UTF-8 cannot encode it."""
TEXTS = ("video_path", "human_caption")
FIX = "correct or delete this row"


def is_json_lines(source: str | Path) -> bool:
    """Returns whether `source` is read as JSON Lines. Other sources are read with `datasets`."""
    return not (str(source).startswith(HUB) or str(source).endswith(PARQUET) or os.path.isdir(source))


def read_data_rows(source: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row with its number, counted from 1.

    Each row has a unique `video_id` (a string or an integer), the strings `video_path` and `human_caption`, and
    optionally a non-blank string `question`. `source` is one of:

    - A JSON Lines file in UTF-8, with or without byte order marks, with LF or CRLF. Blank lines are skipped. The number
      of a row is its line number.
    - A Parquet file, or a pattern such as `data/train-*.parquet`. Matching files are read in the order of their names.
    - A folder written by `Dataset.save_to_disk`.
    - `hf://datasets/OWNER/NAME[:SPLIT]`, which is downloaded to the cache of `datasets`.

    Writes no files next to the data. Raises InputError if `source` cannot be read, or, with the number of the row, if a
    row does not have this format.
    """
    number_of: dict[str, int] = {}
    rows = _read_lines(Path(source)) if is_json_lines(source) else enumerate(_read_table(str(source)), 1)
    for number, content in rows:
        try:
            row = _check_row(_parse(content) if isinstance(content, bytes) else content)
        except InputError as error:
            raise InputError(f"{row_place(source, number)}: {error}") from error
        video_id = str(row["video_id"])
        if (other := number_of.setdefault(video_id, number)) != number:
            raise InputError(
                f"{row_place(source, other, number)} both have the video_id {video_id}: rename or delete one"
            )
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
            raise _unreadable(source, error.strerror) from error
    digest = hashlib.sha256()
    for row in _read_table(str(source)):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def check_characters(row: dict[str, Any], *fields: str) -> None:
    """Raises InputError if one of `fields` has an unpaired surrogate. File names and tokenizers do not accept it."""
    for name in fields:
        if SURROGATE.search(str(row.get(name))):
            raise InputError(f"{name} has an unpaired surrogate, which is not a valid character: {FIX}")


def _unreadable(source: str | Path, reason: object) -> InputError:
    return InputError(f"{source} cannot be read ({reason}): give a file or data set with one row per video")


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if (line := line.removeprefix(codecs.BOM_UTF8)).strip():
                    yield number, line
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


def _read_table(source: str) -> Iterator[dict[str, Any]]:
    """Yields rows read with `datasets`. Drops columns with media, because `datasets` would decode them."""
    import datasets  # imported here: it takes a second, and most data is JSON Lines

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="datasets_", ignore_cleanup_errors=True) as locks:
        try:
            table = _open_table(source, locks)
            yield from table.select_columns([name for name, kind in table.features.items() if _is_plain(kind)])
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Arrow, fsspec and the Hub client raise many types
            cause = error.__cause__ or error
            raise _unreadable(source, next(iter(str(cause).splitlines()), type(cause).__name__)[:300]) from error


def _is_plain(kind) -> bool:
    """Returns whether a column has strings, numbers, lists or JSON, as opposed to media or binary data."""
    import datasets

    if isinstance(kind, datasets.Value):
        return "binary" not in kind.dtype
    return isinstance(kind, datasets.List | datasets.LargeList | datasets.Json)


def _open_table(source: str, locks: str) -> Any:
    import datasets

    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        return _only_split(source, datasets.load_dataset(name), split)
    if source.endswith(PARQUET):
        paths: Any = [source] if os.path.exists(source) else [str(path) for path in matching_files(source)]
        # Stream the rows: they are read once, so a copy in the cache is not needed.
        return datasets.IterableDataset.from_parquet(paths, cache_dir=locks)
    found = datasets.load_from_disk(source)
    if not isinstance(found, datasets.DatasetDict):
        return found
    folders = " or ".join(os.path.join(source, str(split)) for split in found)
    raise InputError(f"{source} has several splits: give the folder of one split, {folders}")


def _only_split(source: str, splits: dict, split: str):
    if not split and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        names = ", ".join(splits)
        what = f"has no split {split!r}" if split else "has several splits"
        raise InputError(f"{source} {what}: choose one of {names}, as in {HUB}OWNER/NAME:SPLIT")
    return splits[split]


def matching_files(pattern: str | Path) -> list[Path]:
    """Returns the files that match a pattern such as `data/train-*.parquet`, sorted by name."""
    pattern = Path(pattern)
    return sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file())


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
    for name in ("video_id", *TEXTS):
        if name not in row:
            raise InputError(f"has no {name}: {FIX}")
    video_id, question = row["video_id"], row.get("question")
    if isinstance(video_id, bool) or not isinstance(video_id, str | int) or video_id == "":
        raise InputError(f"has the video_id {_show(video_id)}, which is not a string or an integer: {FIX}")
    for name in TEXTS:
        if not isinstance(row[name], str):
            raise InputError(f"has the {name} {_show(row[name])}, which is not a string: {FIX}")
    if question is not None and not (isinstance(question, str) and question.strip()):
        raise InputError(
            f"has the question {_show(question)}, which is not a non-blank string: correct it or delete the field"
        )
    check_characters(row, "video_id", "video_path", "question")
    return row


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
