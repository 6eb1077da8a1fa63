"""Lists the members of an untrusted tar file with their offsets.

Nothing is unpacked, no header can make it read or keep more than 64 KiB, and a damaged file raises TarError instead of
giving a short list (the standard library's tarfile takes a broken header in mid-file for the end). Does not depend on
what the members contain.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 16
PLAIN = (b"0", b"\0", b"7")
REFUSED_TYPES = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
TRUNCATED = "is truncated at the end of the shard"
DIRECTORY, PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK, SPARSE = b"5", b"x", b"g", b"L", b"K", b"S"


class TarError(Exception):
    """The rest of a tar file cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """One member of a tar file."""

    name: str
    """As in the header; with escapes where it is not printable."""
    offset: int
    """Offset of its data in the tar file, in bytes."""
    size: int
    """Bytes of data."""
    error: str = ""
    """Why it must not be used; empty for a plain file with a safe name."""


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of a seekable tar `file` other than directories. Raises TarError at damage."""
    end = file.seek(0, 2)
    position = 0
    extended: dict[str, bytes] = {}
    while True:
        header = _read(file, position, BLOCK)
        if not any(header) and header:
            return
        if len(header) < BLOCK:
            raise TarError(f"ends at byte {end} without an end-of-archive marker: the file is truncated")
        _check(header, position)
        type_flag, size = header[156:157], _number(header[124:136], position)
        data = position + BLOCK
        if type_flag in (PAX, LONG_NAME, PAX_GLOBAL, LONG_LINK, SPARSE) and data + size > end:
            raise TarError(f"ends at byte {end}, inside an extended header: the file is truncated")
        if type_flag in (PAX, LONG_NAME):
            if size > MAX_EXTENSION_BYTES:
                raise TarError(f"has an extended header of {size} bytes at byte {position}")
            block = _read(file, data, size)
            extended |= _pax(block, position) if type_flag == PAX else {"path": block.rstrip(b"\0")}
            position = _next(data, size)
            continue
        if type_flag in (PAX_GLOBAL, LONG_LINK):
            position = _next(data, size)
            continue
        if "size" in extended:
            size = _decimal(extended["size"], position)
        raw_name = extended.get("path") or _header_name(header)
        error = "is a sparse file" if any(key.startswith("GNU.sparse") for key in extended) else ""
        extended = {}
        if type_flag in REFUSED_TYPES:
            yield Member(printable(raw_name), data, 0, f"is {REFUSED_TYPES[type_flag]}")
            position = _next(data, size) if type_flag == SPARSE else data
        elif type_flag == DIRECTORY:
            position = data
        else:
            error = (
                error or name_error(raw_name) or ("" if type_flag in PLAIN else f"has the unknown type {type_flag!r}")
            )
            if data + size > end:
                yield Member(printable(raw_name), data, size, error or TRUNCATED)
                raise TarError(f"ends at byte {end}, inside {printable(raw_name)!r}: the file is truncated")
            yield Member(printable(raw_name), data, size, error)
            position = _next(data, size)


def name_error(name: bytes) -> str:
    """Why a member's `name` is refused, or an empty string if it is safe."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return "has a name that is not UTF-8"
    if text.startswith(("/", "\\")) or ".." in text.replace("\\", "/").split("/"):
        return "has a name that points outside its folder"
    if text.rstrip("/").rpartition("/")[2] in ("", "."):
        return "has an empty name"
    return "" if text.isprintable() else "has a name with control characters"


def printable(name: bytes) -> str:
    """`name` as text for messages, with escapes where it is not printable."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _next(data: int, size: int) -> int:
    return data + -(-size // BLOCK) * BLOCK


def _check(header: bytes, position: int) -> None:
    stored = header[148:156].strip(b"\0 ")
    try:
        expected = int(stored, 8)
    except ValueError:
        expected = -1
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if total != expected:
        raise TarError("is not a tar file" if position == 0 else f"has a broken header at byte {position}")


def _number(field: bytes, position: int) -> int:
    """Parse a header's number: octal digits, or base 256 if the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            raise TarError(f"has a negative size at byte {position}")
        return value
    return _decimal(field.strip(b"\0 ") or b"0", position, base=8)


def _decimal(digits: bytes, position: int, base: int = 10) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise TarError(f"has a size that is not a number at byte {position}")
    try:
        return int(digits, base)
    except ValueError as error:
        raise TarError(f"has a size that is not a number at byte {position}") from error


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(block: bytes, position: int) -> dict[str, bytes]:
    """Parse the records of a pax header, each "<length> <key>=<value>\\n"."""
    records = {}
    while block.strip(b"\0"):
        digits, space, _ = block.partition(b" ")
        length = _decimal(digits, position)
        record = block[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (space and equals and value.endswith(b"\n") and 0 < length <= len(block)):
            raise TarError(f"has a broken extended header at byte {position}")
        records[key.decode("utf-8", "replace")] = value[:-1]
        block = block[length:]
    return records
