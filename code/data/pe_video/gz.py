"""Files that gzip has made, unpacked so that they can be read at any place. Knows nothing about what is in them."""

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qwen_vl_streaming.common.errors import InputError

GZIP = b"\x1f\x8b"
"""The first bytes of a gzip file."""
MOST_TIMES = 100
"""How many times its own size a file may have unpacked: videos hardly shrink, and a trap grows a thousandfold."""
ANYWAY = 1 << 26
"""Bytes that it may have unpacked however small it is."""


@contextmanager
def unpack(packed: BinaryIO, scratch: Path) -> Iterator[BinaryIO]:
    """What a seekable gzip file holds, as an open file in the folder `scratch` that no other process sees and that is
    gone afterwards. One that is cut short gives what it still holds.

    Raises OSError for a damaged file and for one that grows too much, and InputError where `scratch` has no room.
    """
    most = max(ANYWAY, MOST_TIMES * packed.seek(0, 2))
    packed.seek(0)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        out = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"{scratch} cannot be written ({error.strerror}): make it writable") from error
    with out:
        for block in _blocks(packed):
            try:
                out.write(block)
            except OSError as error:
                raise InputError(
                    f"{scratch} cannot hold an unpacked shard ({error.strerror}): make room and start again, what was "
                    "finished is kept"
                ) from error
            if out.tell() > most:
                raise OSError(f"it grows to more than {most} bytes when it is unpacked")
        out.seek(0)
        yield out


def _blocks(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=packed) as file:
        try:
            while block := file.read1(1 << 20):
                yield block
        except EOFError:
            return
        except zlib.error as error:
            raise OSError(f"it is damaged: {error}") from error
