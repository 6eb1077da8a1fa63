"""Atomic writes and the lock on a folder. Does not depend on what the files contain."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qwen_vl_streaming.common.errors import InputError

PARTIAL_SUFFIX = ".mani_data.part"


@contextmanager
def atomic_write(path: Path, mode: str = "w", *, sync: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` for writing and rename it to `path` when the block succeeds.

    Text is UTF-8 with "\\n" line ends. Without `sync` the file survives a killed process but may be lost in a power
    failure; use it for what a later run checks anyway. Raises InputError if the file cannot be written, for example
    because the disk is full.
    """
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a suffix could exceed the limit on a name's length
    partial = path.with_name(f".{digest}.{os.getpid()}{PARTIAL_SUFFIX}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode, **text) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): free some space or fix permissions, then run the same command "
            "again to resume"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another mani_data.py is running in {folder.parent}: wait for it or stop it") from error
        yield
