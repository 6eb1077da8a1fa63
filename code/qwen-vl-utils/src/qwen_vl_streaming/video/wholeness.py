"""Checks whether a video file is complete: not truncated, not several joined files, no packets lost. Of the frame
times, uses only where they end."""

import contextlib
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer
from av.stream import Stream

from ..common.errors import InputError

CUT_SHORT = 1.0  # seconds that may be missing from the stated length: audio and video seldom end together
HEADERS = ("mov", "avi")  # formats whose headers state a length for each track
BLOCK = 2**20  # bytes read at a time
MAGIC = {
    "flv": rb"FLV\x01.\0\0\0\x09",
    "nut": rb"nut/multimedia container\0",
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    "mxf": rb"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01\x02",
    "ivf": rb"DKIF\0\0\x20\0",
    "apng": rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}
"""Regular expressions for the first bytes of a file, for formats where FFmpeg reads only the first of two joined
files."""
LONGEST_MAGIC = 32
TS_PACKETS = (188, 0), (192, 0), (192, 4), (204, 0)
"""Layouts of MPEG-TS: bytes from one packet to the next, and bytes before a packet. Plain; M2TS, with a time before
each packet, where a position may be that of the packet or of the time; and with a checksum after each packet."""
SYNC = 0x47
PARAMETERS = {
    "h264": rb"(?:\x09.\0{0,3}\0\0\x01)?[\x27\x47\x67]",
    "hevc": rb"(?:\x46\x01.\0{0,3}\0\0\x01)?\x40\x01",
    "mpeg2video": rb"\xb3",
    "mpeg4": rb"\xb0",
}
"""Regular expressions for the parameters that follow the start code of a keyframe in MPEG-TS. Each matches one codec
only."""


@contextlib.contextmanager
def raw(source: str | Path | BinaryIO) -> Iterator[BinaryIO]:
    """Open the bytes of a file, or of a readable object. The position of an object is restored, since FFmpeg may be
    reading it."""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            yield file
    else:
        place = source.tell()
        yield source
        source.seek(place)


def _is_fragmented(source: str | Path | BinaryIO, container: InputContainer) -> bool:
    """Whether this is a fragmented MP4, as recorders of HLS and DASH write."""
    if not container.format.name.startswith("mov"):
        return False
    with raw(source) as file:
        return any(kind == b"moof" for kind, _, _ in _boxes(file))


def check_structure(source: str | Path | BinaryIO, name: str, container: str, furthest: int) -> None:
    """Raise InputError if the last box of a fragmented MP4, or an AVI header, states more bytes than the file has, and
    for joined files of which FFmpeg reads only the first. `container` is the name of the format. `furthest` is the
    largest byte position of a packet that FFmpeg found."""
    with raw(source) as file:
        size = file.seek(0, 2)
        if container.startswith("mov"):
            boxes = list(_boxes(file))
            kinds = [kind for kind, _, _ in boxes]
            if b"moof" in kinds and kinds[-1] in (b"moof", b"mdat"):
                _check_end(name, boxes[-1][2], size)
            starts = [at for kind, at, _ in boxes if kind == b"ftyp"]
            second = next((at for at in starts[1:] if at > furthest), None)
        elif container == "avi":
            file.seek(0)
            head = file.read(8)
            claimed = int.from_bytes(head[4:], "little")
            if 0 < claimed < 2**32 - 1:  # otherwise the writer did not know the size
                _check_end(name, claimed + 8, size + 1)  # the padding byte may be missing
            second = None
        else:
            second = _second_header(file, container)
    if second is not None:
        raise InputError(
            f"{name} consists of several joined files (the second starts at byte {second}), and only the first can be "
            "read: split it, or join the files with FFmpeg"
        )


def _check_end(name: str, end: int, size: int) -> None:
    if end > size:
        raise InputError(f"{name} is truncated ({size} of {end} bytes): download it again")


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield the top-level boxes of an MP4: (type, start, stated end), in bytes."""
    size, at = file.seek(0, 2), 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:
            length = size - at
        if length < 8:
            return
        yield head[4:8], at, at + length
        at += length


def _second_header(file: BinaryIO, container: str) -> int | None:
    """The byte position at which another file of this format begins, or None."""
    if container not in MAGIC:
        return None
    magic, at, tail = re.compile(MAGIC[container], re.DOTALL), 0, b""
    file.seek(0)
    while block := file.read(BLOCK):
        for match in magic.finditer(tail + block):
            place = at - len(tail) + match.start()
            if place > LONGEST_MAGIC:
                return place
        at += len(block)
        tail = (tail + block)[-LONGEST_MAGIC:]
    return None


def is_whole(source: str | Path | BinaryIO, begin: int | None, end: int | None, fits: bool) -> bool:
    """Whether an MPEG-TS track is complete from a frame's first packet at byte `begin` to a keyframe's at byte `end`.
    If so, a jump of the continuity counter at `end` means that two recordings were joined there, not that packets are
    lost.

    The last packet of a frame has stuffing bytes unless the frame fills it exactly. With `fits`, a full packet is
    accepted if the counter is 0 at `end`, where another recording starts.
    """
    if begin is None or end is None or not 0 <= begin < end:
        return False
    with raw(source) as file:
        file.seek(begin)
        data = file.read(end - begin + 204)
    for size, before in TS_PACKETS:
        packets = [data[at : at + 188] for at in range(before, end - begin + before + 1, size)]
        if len(packets) > 1 and not (end - begin) % size and all(p[:1] == bytes([SYNC]) for p in packets):
            break
    else:
        return False
    track = [packet for packet in packets if _pid(packet) == _pid(packets[0]) and packet[3] & 0x10]  # with a payload
    counts = [packet[3] & 0xF for packet in track]
    if not all((after - before) % 16 in (0, 1) for before, after in pairwise(counts[:-1])):
        return False
    return len(track) > 1 and (_is_filled(track[-2]) or (fits and counts[-1] == 0))


def _is_filled(packet: bytes) -> bool:
    """Whether an MPEG-TS packet has stuffing bytes."""
    if not packet[3] & 0x20:  # no adaptation field
        return False
    length, flags = packet[4], packet[5]
    used = 1 + 6 * bool(flags & 0x10) + 6 * bool(flags & 8) + bool(flags & 4)  # flags, two clocks, splice countdown
    return length == 0 or flags == 0 or length > used


def _pid(packet: bytes) -> int:
    return int.from_bytes(packet[1:3], "big") & 0x1FFF


def check_codec(track: av.VideoStream, packet: av.Packet, name: str) -> None:
    """Raise InputError if a keyframe in MPEG-TS has another codec than its track. FFmpeg does not detect this."""
    if not packet.is_keyframe or not packet.size or track.container.format.name != "mpegts":
        return
    if track.codec_context.name not in PARAMETERS:
        return
    head = bytes(memoryview(packet)[:64])
    for codec, parameters in PARAMETERS.items():
        if codec != track.codec_context.name and re.match(rb"\0*\0\0\x01(?:" + parameters + rb")", head, re.DOTALL):
            raise InputError(
                f"{name} changes from {track.codec_context.name} to {codec} where recordings were joined: split it, "
                "or convert it to one codec"
            )


def time_base(stream: Stream) -> Fraction:
    """The length of a tick of a track in seconds. PyAV declares it as optional, but FFmpeg sets it for every track."""
    assert stream.time_base is not None
    return stream.time_base


def claimed_end(stream: Stream) -> Fraction:
    """The end of a video or audio track in seconds, as the container states it; 0 if not stated."""
    if stream.type not in ("video", "audio") or not stream.duration:
        return Fraction(0)
    return (stream.duration + (stream.start_time or 0)) * time_base(stream)


def claims(
    container: InputContainer, track: av.VideoStream, source: str | Path | BinaryIO | None = None
) -> dict[str, float]:
    """The length that the container states, in seconds, under one key: "length" is the duration of the track, "end" is
    its end on the axis of timestamps, and "all" is the end of all tracks. Empty if nothing is stated."""
    found = {}
    if track.duration and container.format.name.startswith(HEADERS):  # in other formats, FFmpeg estimates it
        fragmented = source is not None and _is_fragmented(source, container)
        found["end" if fragmented else "length"] = float(track.duration * time_base(track))
    elif (end := _clock_time(track.metadata.get("DURATION", ""))) is not None:  # the tag that FFmpeg writes to Matroska
        found["end"] = end
    elif container.duration:
        found["all"] = container.duration / av.time_base
    return found


def _clock_time(text: str) -> float | None:
    """Convert "HH:MM:SS.fraction" to seconds. Returns None for other text."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split("\0")[0].split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def check_length(name: str, claimed: dict[str, float], length: float, finish: float, end: float) -> None:
    """Raise InputError if a file ends more than CUT_SHORT before its stated end, see `shortfall`."""
    if short := shortfall(claimed, length, finish, end):
        raise InputError(f"{name} is truncated ({short[0]:.2f} s of {short[1]:.2f} s): download it again")


def shortfall(claimed: dict[str, float], length: float, finish: float, end: float) -> tuple[float, float] | None:
    """Return (found, claimed) seconds if the claim exceeds what was found by more than CUT_SHORT, otherwise None. The
    frames last for `length` seconds and end at `finish`; the last of all tracks ends at `end`."""
    found = {"length": length, "end": finish, "all": max(end, finish, length)}
    return next(((found[c], seconds) for c, seconds in claimed.items() if found[c] < seconds - CUT_SHORT), None)
