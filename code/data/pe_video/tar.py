"""Where the members of a tar file are, read header by header and trusting none of them.

Written for shards of unknown origin: nothing is unpacked, no header makes it read or keep more than 64 KiB, and a
damaged file ends in a TarFault instead of a short list (the standard library's reader takes a broken header in
mid-file for the end). Knows nothing about what the members hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 16
PLAIN = (b"0", b"\0", b"7")
ODD_KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}
CUT_OFF = "is cut off by the end of the shard"
DIRECTORY, PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK, SPARSE = b"5", b"x", b"g", b"L", b"K", b"S"


class TarFault(Exception):
    """The rest of a tar file cannot be read; the message says why."""


@dataclass(frozen=True)
class Member:
    name: str
    """As written in the header; for a member with a fault, in a form that can be printed."""
    offset: int
    """Bytes from the start of the tar file to the member's data."""
    size: int
    """Bytes of data."""
    fault: str = ""
    """Why the member must not be used; empty for a plain file with a harmless name."""


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of a seekable tar `file`, directories left out. Raises TarFault where it cannot be read on."""
    end = file.seek(0, 2)
    position = 0
    extended: dict[str, bytes] = {}
    while True:
        header = _read(file, position, BLOCK)
        if not any(header) and header:
            return
        if len(header) < BLOCK:
            raise TarFault(f"ends at byte {end} without its end mark, so it was cut short")
        _check(header, position)
        kind, size = header[156:157], _number(header[124:136], position)
        data = position + BLOCK
        if kind in (PAX, LONG_NAME, PAX_GLOBAL, LONG_LINK, SPARSE) and data + size > end:
            raise TarFault(f"ends at byte {end}, inside an extended header, so it was cut short")
        if kind in (PAX, LONG_NAME):
            if size > MAX_EXTENSION_BYTES:
                raise TarFault(f"has an extended header of {size} bytes at byte {position}")
            block = _read(file, data, size)
            extended |= _pax(block, position) if kind == PAX else {"path": block.rstrip(b"\0")}
            position = _next(data, size)
            continue
        if kind in (PAX_GLOBAL, LONG_LINK):
            position = _next(data, size)
            continue
        if "size" in extended:
            size = _decimal(extended["size"], position)
        raw_name = extended.get("path") or _header_name(header)
        fault = "is a sparse file" if any(key.startswith("GNU.sparse") for key in extended) else ""
        extended = {}
        if kind in ODD_KINDS:
            yield Member(printable(raw_name), data, 0, f"is {ODD_KINDS[kind]}")
            position = _next(data, size) if kind == SPARSE else data
        elif kind == DIRECTORY:
            position = data
        else:
            fault = fault or name_fault(raw_name) or ("" if kind in PLAIN else f"is of unknown kind {kind!r}")
            if data + size > end:
                yield Member(printable(raw_name), data, size, fault or CUT_OFF)
                raise TarFault(f"ends at byte {end}, inside {printable(raw_name)!r}, so it was cut short")
            yield Member(printable(raw_name), data, size, fault)
            position = _next(data, size)


def name_fault(name: bytes) -> str:
    """Why a member's `name` is refused, or an empty string for a harmless one."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return "has a name that is not UTF-8"
    if text.startswith(("/", "\\")) or ".." in text.replace("\\", "/").split("/"):
        return "has a name that climbs out of its folder"
    if text.rstrip("/").rpartition("/")[2] in ("", "."):
        return "has an empty name"
    return "" if text.isprintable() else "has a name with control characters"


def printable(name: bytes) -> str:
    """`name` for messages; the same text where the name is harmless."""
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
        raise TarFault("is not a tar file" if position == 0 else f"has a broken header at byte {position}")


def _number(field: bytes, position: int) -> int:
    """A header's number: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            raise TarFault(f"has a negative size at byte {position}")
        return value
    return _decimal(field.strip(b"\0 ") or b"0", position, base=8)


def _decimal(digits: bytes, position: int, base: int = 10) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise TarFault(f"has a size that is no number at byte {position}")
    try:
        return int(digits, base)
    except ValueError as error:
        raise TarFault(f"has a size that is no number at byte {position}") from error


def _header_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(block: bytes, position: int) -> dict[str, bytes]:
    """The records of a pax header: "<length> <key>=<value>\\n", one after the other."""
    records = {}
    while block.strip(b"\0"):
        digits, space, _ = block.partition(b" ")
        length = _decimal(digits, position)
        record = block[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (space and equals and value.endswith(b"\n") and 0 < length <= len(block)):
            raise TarFault(f"has a broken extended header at byte {position}")
        records[key.decode("utf-8", "replace")] = value[:-1]
        block = block[length:]
    return records
