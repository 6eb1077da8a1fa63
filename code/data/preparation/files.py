"""Cleaning up after killed runs, and the lock on a folder. Does not depend on what the files contain."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import PARTIAL_SUFFIX


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of a killed run from `folder` and everything below it."""
    for partial in folder.rglob(f".*{PARTIAL_SUFFIX}") if folder.is_dir() else ():
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process. Raises InputError if another run holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - stays open as long as the lock is held
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}): make it writable or use --output-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another mani_data.py is running in {folder.parent}: wait for it or stop it") from error
        yield
