"""Decompresses gzip files to a temporary file, which is seekable. Does not depend on what they contain."""

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qwen_vl_streaming.common.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
"""The first bytes of a gzip file."""
MAX_RATIO = 100
"""Maximum decompressed size over compressed size. Videos hardly compress; a gzip bomb grows a thousandfold."""
ALWAYS_ALLOWED = 1 << 26
"""Decompressed bytes that are allowed at any ratio."""


@contextmanager
def decompress(packed: BinaryIO, scratch: Path) -> Iterator[BinaryIO]:
    """Decompress a seekable gzip file to an unnamed temporary file in the folder `scratch`, and open it.

    A truncated file gives the part that is there. Raises OSError for a damaged file and for one that exceeds the limits
    above, and InputError if `scratch` cannot be written or is full.
    """
    limit = max(ALWAYS_ALLOWED, MAX_RATIO * packed.seek(0, 2))
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
                    f"{scratch} cannot hold a decompressed shard ({error.strerror}): free some space, then run the "
                    "same command again to resume"
                ) from error
            if out.tell() > limit:
                raise OSError(f"it decompresses to more than {limit} bytes")
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
