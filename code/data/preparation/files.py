"""Cleaning up after killed runs, and the lock on a folder. Does not depend on what the files contain."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import PARTIAL_SUFFIX, lock_file


def remove_partial_files(folder: Path, *, recursive: bool = True) -> None:
    """Remove the temporary files of a killed run from `folder` and, if `recursive`, everything below it."""
    pattern = f".*{PARTIAL_SUFFIX}"
    for partial in (folder.rglob(pattern) if recursive else folder.glob(pattern)) if folder.is_dir() else ():
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
        if not lock_file(lock):
            raise InputError(f"another mani_data.py is running in {folder.parent}: wait for it or stop it")
        yield
