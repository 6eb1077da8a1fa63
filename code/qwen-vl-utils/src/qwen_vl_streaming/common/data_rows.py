"""The rows of a data set, read and checked in one place, so that all programs accept the same data.

JSON Lines are parsed here: `datasets` does not keep line numbers, turns strings that look like dates into dates and
large ids into floats, and stops at a byte order mark. Parquet files, folders written by `save_to_disk` and data sets of
the Hugging Face hub are read through `datasets`. Does not know what a program needs of a row beyond its four fields.
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
"""Prefix of a data set on the hub: hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME:SPLIT."""
PARQUET = ".parquet"
SURROGATE = re.compile("[\ud800-\udfff]")
"""An unpaired surrogate, which JSON can escape and UTF-8 cannot encode."""
TEXTS = ("video_path", "human_caption")
FIX = "correct or delete this row"


def is_json_lines(source: str | Path) -> bool:
    """Whether `source` is read as JSON Lines rather than through `datasets`."""
    return not (str(source).startswith(HUB) or str(source).endswith(PARQUET) or os.path.isdir(source))


def read_data_rows(source: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row, from 1, and the row: a `video_id` that no other row has, a string as `video_path`
    and `human_caption`, and a non-blank string as `question`, if it has one.

    `source` is one of

    - a JSON Lines file: UTF-8, with or without byte order marks, LF or CRLF. Blank lines are skipped; a row's number
      is that of its line;
    - a Parquet file, or a pattern such as `data/train-*.parquet`, read in the order of the names;
    - a folder written by `Dataset.save_to_disk`;
    - `hf://datasets/OWNER/NAME[:SPLIT]`, which is downloaded to the cache of `datasets`.

    Nothing is written beside the data. Raises InputError, with the number of the row, for anything else.
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
    """How messages name rows: `train.jsonl, line 3` or `train.parquet, rows 3 and 7`."""
    unit = "line" if is_json_lines(source) else "row"
    return f"{source}, {unit}{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"


def hash_data(source: str | Path) -> str:
    """SHA-256 of a data set's contents: the bytes of JSON Lines, else the rows in order, so that a Parquet file, a
    folder and the hub give the same. Raises InputError where it cannot be read."""
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
    """Raise InputError where one of `fields` has an unpaired surrogate, which no file name or tokenizer accepts."""
    for name in fields:
        if SURROGATE.search(str(row.get(name))):
            raise InputError(f"{name} has an unpaired surrogate, which is not a character: {FIX}")


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
    """Rows through `datasets`. Columns of media, which would be decoded, are dropped."""
    import datasets  # takes a second to import, and most data is JSON Lines

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="datasets_", ignore_cleanup_errors=True) as locks:
        try:
            table = _open_table(source, locks)
            yield from table.select_columns([name for name, kind in table.features.items() if _is_plain(kind)])
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Arrow, fsspec and the hub client raise many kinds
            cause = error.__cause__ or error
            raise _unreadable(source, next(iter(str(cause).splitlines()), type(cause).__name__)[:300]) from error


def _is_plain(kind) -> bool:
    """Whether a column has texts, numbers or lists of them, rather than media."""
    import datasets

    if isinstance(kind, datasets.Value):
        return "binary" not in kind.dtype
    return isinstance(kind, datasets.List | datasets.LargeList | datasets.Json)


def _open_table(source: str, locks: str):
    import datasets

    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition(":")
        return _only_split(source, datasets.load_dataset(name), split)
    if source.endswith(PARQUET):
        paths = [source] if os.path.exists(source) else [str(path) for path in matching_files(source)]
        # Streamed, since the rows are read once and need no copy in a cache.
        return datasets.IterableDataset.from_parquet(paths, cache_dir=locks)
    found = datasets.load_from_disk(source)
    if not isinstance(found, datasets.DatasetDict):
        return found
    folders = " or ".join(os.path.join(source, split) for split in found)
    raise InputError(f"{source} has several splits: give the folder of one, {folders}")


def _only_split(source: str, splits: dict, split: str):
    if not split and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        names = ", ".join(splits)
        what = f"has no split {split!r}" if split else "has several splits"
        raise InputError(f"{source} {what}: name one of {names}, as in {HUB}OWNER/NAME:SPLIT")
    return splits[split]


def matching_files(pattern: str | Path) -> list[Path]:
    """The files that a pattern such as `data/train-*.parquet` matches, sorted by name."""
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
    except ValueError as error:  # a number of more digits than Python reads
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
        raise InputError(f"has the question {_show(question)}, which is not a text: correct it or delete the field")
    check_characters(row, "video_id", "video_path", "question")
    return row


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
