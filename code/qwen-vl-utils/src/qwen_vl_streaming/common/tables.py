"""Reads Parquet files, folders written by `save_to_disk` and data sets on the Hugging Face Hub with `datasets`. Knows
of their rows only which columns they must have.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, first_line

HUB = "hf://datasets/"
"""Prefix of a data set on the Hub: hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME:SPLIT."""
PARQUET = ".parquet"
CAPTIONS = ("human_caption", "segments")
"""A row has one of them or both."""


def is_json_lines(source: str | Path) -> bool:
    """Returns whether `source` is read as JSON Lines. Other sources are read with `datasets`."""
    return not (str(source).startswith(HUB) or str(source).endswith(PARQUET) or os.path.isdir(source))


def read_table(source: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of `source` without columns of media, which `datasets` would decode. Raises InputError."""
    import datasets  # imported here: it takes a second, and most data is JSON Lines
    from datasets.exceptions import DatasetNotFoundError

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="datasets_", ignore_cleanup_errors=True) as locks:
        try:
            table = _open_table(source, locks)
            _check_columns(source, table.features)
            yield from table.select_columns([name for name, kind in table.features.items() if _is_plain(kind)])
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Arrow, fsspec and the Hub client raise many types
            cause = error if isinstance(error, DatasetNotFoundError) else error.__cause__ or error
            raise unreadable(source, first_line(cause)[:300]) from error


def _check_columns(source: str, columns: dict) -> None:
    """Raises InputError if a required column is missing, or has videos or images in place of text."""
    captions = [name for name in CAPTIONS if name in columns] or CAPTIONS[:1]
    for name in ("video_id", "video_path", *captions):
        if name not in columns:
            fix = "rename its columns with `datasets`, as docs/data.md shows"
            raise InputError(f"{source} has no column {name} (its columns: {list_names(columns)}): {fix}")
        if not _is_plain(columns[name]):
            kind = type(columns[name]).__name__
            raise InputError(f"{source} has {kind} data in its column {name}: give text, as docs/data.md shows")


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
        try:
            splits = datasets.load_dataset(name)
        except ValueError as error:
            if "Config name is missing" not in str(error):
                raise
            save = "`load_dataset(NAME, CONFIGURATION, split=SPLIT).save_to_disk(FOLDER)`"
            raise InputError(f"{source} has several configurations: save one with {save}, and give FOLDER") from error
        return _only_split(source, splits, split)
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


def unreadable(source: str | Path, reason: object) -> InputError:
    """The error for a `source` of either kind that cannot be read."""
    fix = "give a file or data set with one row per video"
    if str(source).startswith(HUB):
        fix = "check its name, log in with `hf auth login` if it is private, or download it on a machine with a network"
    return InputError(f"{source} cannot be read ({reason}): {fix}")


def list_names(names: Iterable[str]) -> str:
    """The `names` of columns or fields for a message, shortened to 200 characters."""
    text = ", ".join(names) or "none"
    return text if len(text) <= 200 else text[:197] + "..."
