"""Files that are complete or absent, even after a crash. Knows nothing about their contents."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError raised while `path` is written into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): free some space or give another path; the same command "
            "resumes from what is finished"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """`replace_file`, with the folder of `path` created where it is missing. Raises InputError where that fails."""
    path = Path(path)
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


def replace_file(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to a temporary file next to `path`, flush it to the disk, and rename it to `path`: a
    process that is killed leaves the old file or the new one. Raises OSError where that fails, and then removes the
    temporary file."""
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
