"""Writes files atomically: after a crash, a file is either complete or unchanged. Reads JSON objects.

Independent of what the files are for.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import InputError

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".atomic.part"
"""Ending of the hidden temporary files."""


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Converts an OSError raised while `path` is written to an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): free some space, make the folder writable or give another "
            "path, and run the command again to resume"
        ) from error


def lock_file(file: IO[Any]) -> bool:
    """Locks the open `file` for as long as it is open. Returns False if another process has locked it.

    Logs a warning and returns True on a file system without locks, such as Lustre mounted without `flock`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not run another one there", Path(file.name).parent, error.strerror)
    return True


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", *, sync: bool = True, report: bool = True) -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` for writing, and renames it to `path` when the block succeeds.

    Text is UTF-8 with "\\n" line ends. A process that is killed leaves either the old or the new file, even after a
    power failure unless `sync` is False. Creates the folder of `path` if needed, and raises InputError if the file
    cannot be written; if `report` is False, the folder must exist, and OSError is raised.
    """
    # A hash, because a suffix could exceed the limit on a name's length. Processes of two nodes may have the same id.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    partial = path.with_name(f".{digest}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with reporting_write_errors(path) if report else contextlib.nullcontext():
        if report:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, mode, **text) as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


def write_file(path: Path, data: bytes | str, *, report: bool = True) -> None:
    """Like `atomic_write`, for data that is ready."""
    with atomic_write(path, "wb", report=report) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Creates an empty temporary folder beside `folder`, which must not exist, and renames it to `folder` when the
    block succeeds. Raises OSError."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_object(path: Path, fix: str) -> dict:
    """Reads a JSON object. Raises InputError, with how to `fix` it, if the file does not have one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): {fix}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be read (it is not a JSON object): {fix}")
    return found
