"""Writes files atomically: after a crash, a file is either complete or unchanged. Independent of their contents."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Converts an OSError raised while `path` is written to an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): free some space or give another path, and run the command "
            "again to resume"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Like `replace_file`, but creates the folder of `path` if needed and raises InputError on failure."""
    path = Path(path)
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


def replace_file(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) to a temporary file next to `path`, flushes it to disk and renames it to `path`.

    A process that is killed leaves either the old or the new file. On failure, removes the temporary file and raises
    OSError.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
