"""Atomic writes: a reader, also after a crash or a power cut, finds the old file or the new one. Has no other
knowledge of the programs."""

import contextlib
import os
from pathlib import Path


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to a hidden file beside `path`, flush it to the disk, then rename it.

    Raises OSError where that fails; `path` is unchanged then, and the hidden file is removed.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
