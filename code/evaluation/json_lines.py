"""Files of JSON Lines that a program writes row by row, so that it loses nothing where it is killed.

A row is on disk as soon as it is written. A killed program leaves at most an incomplete last line, which is dropped.
Knows nothing about what rows mean.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import reporting_write_errors, write_file

log = logging.getLogger(__name__)


def read_lines(path: Path, whole: bool = False) -> tuple[list[tuple[int, Any]], int]:
    """The values in a file, each with the number of its line, and the number of bytes that hold them; what follows is
    an incomplete line. Nothing if the file does not exist.

    An incomplete last line is dropped with a warning, or refused if the file must be `whole`. Raises InputError for any
    other line that is not JSON, and for a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    values = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                values.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not whole:
                log.warning("%s, line %d: incomplete line dropped: the run that wrote it was killed", path, number)
                return values, len(data) - len(line)
            raise InputError(f"{path}, line {number}: not JSON ({error}): fix or delete this line") from None
    return values, len(data)


@contextlib.contextmanager
def appending(path: Path, size: int) -> Iterator[Callable[[Mapping], None]]:
    """A function that appends a row to a file and waits until it is on disk. What follows the first `size` bytes of the
    file is removed. Raises InputError if the file cannot be written."""
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115
        file.truncate(size)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):  # a complete row without a newline at its end
            file.write(b"\n")

    def append(row: Mapping) -> None:
        with reporting_write_errors(path):
            file.write(to_line(row))
            file.flush()
            os.fsync(file.fileno())

    try:
        yield append
    except BaseException:
        with contextlib.suppress(OSError):  # a row that did not fit on the disk is still buffered
            file.close()
        raise
    with reporting_write_errors(path):
        file.close()


def write_rows(path: Path, rows: Iterable[Mapping]) -> None:
    """Replace the file by `rows` in one step."""
    write_file(path, b"".join(map(to_line, rows)))


def to_line(row: Mapping) -> bytes:
    # Escaped to ASCII: some readers split lines at U+2028, and a lone surrogate cannot be encoded in UTF-8.
    return json.dumps(row).encode() + b"\n"
