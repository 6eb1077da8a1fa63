"""Files that are there whole or not at all. Knows nothing about what is in them."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qwen_vl_streaming.common.errors import InputError

PART_SUFFIX = ".mani_data.part"


@contextmanager
def whole_file(path: Path, mode: str = "w", *, sync: bool = True) -> Iterator[IO[Any]]:
    """Open `path` for writing beside itself; it takes its place only when the block ends well.

    Text is UTF-8 with plain newlines. Without `sync` it may be lost when the power fails, though not when the process
    is killed: for what a later run checks anyway. Raises InputError, in one line, where it cannot be written, as on a
    full disk.
    """
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a name of full length leaves no room for a suffix
    part = path.with_name(f".{digest}.{os.getpid()}{PART_SUFFIX}")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **text) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): make room and start again, what was finished is kept"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a killed run left half-written anywhere below `folder`."""
    for part in folder.rglob(f".*{PART_SUFFIX}") if folder.is_dir() else ():
        part.unlink(missing_ok=True)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises InputError where another run holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - held open as long as the lock
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}): make it writable or use --output-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another mani_data.py is at work in {folder.parent}: wait for it or stop it") from error
        yield
