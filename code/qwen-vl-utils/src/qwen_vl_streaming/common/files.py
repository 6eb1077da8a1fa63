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
    """Write `data` to a temporary file next to `path`, flush it to the disk, and rename it to `path`: a process that is
    killed leaves the old file or the new one. Raises InputError where that fails."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
