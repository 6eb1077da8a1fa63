"""Finds the time at which each frame of a video file is shown. Decodes at most up to the first frame. Does not depend
on sampling, clips or frame sizes."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from ..common.errors import InputError
from .container import (
    check_stamps,
    claimed_ticks,
    demux,
    film_clock,
    film_track,
    last_gap,
    may_leap,
    open_film,
    shown_by_order,
    shown_stamp,
)
from .timestamps import FilmClock, Splices
from .wholeness import check_codec, check_length, check_structure, claimed_end, claims, is_whole, time_base

VP8_SHOWN = 0x10  # bit in a packet's first byte; not set for a frame that is used only as a reference
EVEN = 0.9, 0.1  # steady rate: at least this share of the gaps differs from the median by at most this share of it
LATE = 30_000.0  # seconds, with a margin: decord aborts the process if the first timestamp is 35,792 s or later
BREAK = 2.5  # steady rate: no gap exceeds this multiple of the median


@dataclass(frozen=True)
class FrameIndex:
    """The visible frames of a video, in presentation order."""

    times: np.ndarray
    """(n,) float64: presentation times in seconds from the first frame."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    numbers: np.ndarray | None
    """(n,) int64: for each frame, the number of its packet in the track, in decoding order. None if frames can be
    matched to times only by the order in which they leave the decoder."""
    container: str
    """FFmpeg's names of the container format, separated by commas."""
    skipped: frozenset[int] = field(default=frozenset(), repr=False)
    """Packets whose frames are not shown: before the first frame that can be decoded, or at a splice."""
    damaged: frozenset[int] = field(default=frozenset(), repr=False)
    """Packets that FFmpeg flags as corrupt, except those explained by a splice."""
    anew: frozenset[int] = field(default=frozenset(), repr=False)
    """Packets before which the decoder is flushed, because another recording was joined here."""
    odd: str = ""
    """A property of this file that only PyAV handles correctly, as text for messages; empty if there is none."""

    @property
    def fps(self) -> float:
        """Mean frame rate of the video; 0 for a single frame."""
        return (len(self.times) - 1) / self.times[-1] if len(self.times) > 1 else 0.0

    @property
    def even(self) -> bool:
        """Whether the frame rate is steady. Occasional single missing frames are allowed."""
        return steady(self.times)


def steady(times: np.ndarray) -> bool:
    """Whether frames at these ascending (n,) times have a steady rate, see FrameIndex.even."""
    gaps = np.diff(times)
    if len(gaps) < 2:  # a single gap does not determine a rate
        return False
    share, spread = EVEN
    median = np.median(gaps)
    return bool(np.mean(np.abs(gaps - median) <= spread * median) >= share and gaps.max() <= BREAK * median)


@dataclass(frozen=True)
class _Packet:
    number: int
    shown: int | None  # ticks on the continuous timeline of FilmClock
    decoded: int | None
    duration: int
    key: bool


def index_video(source: str | Path | BinaryIO, name: str = "") -> FrameIndex:
    """Index the frame times of a file, or of a readable object; messages call the object `name`.

    Raises InputError if the source is missing, not a regular file, empty, not a video, truncated, or damaged at its
    beginning; if it has no frames, no decoder, or missing or broken timestamps; or if it joins files that FFmpeg cannot
    read as one.
    """
    name = str(source) if isinstance(source, str | Path) else name
    name = name if name.isprintable() else repr(name)
    if isinstance(source, str | Path):
        _check_file(source, name)
    try:
        with open_film(source) as container:
            track = film_track(container, f"video {name}")
            check_stamps(container, f"video {name}")
            tick = time_base(track)
            clock = film_clock(container, track, f"video {name}")
            packets, skipped, damaged, anew, end, furthest = _read(container, track, clock, source)
            check_structure(source, f"video {name}", container.format.name, furthest)
            claimed = {} if clock.breaks or may_leap(container) else claims(container, track, source)
            others = float(max((claimed_end(s) for s in container.streams if s.index != track.index), default=0.0))
            by_order = shown_by_order(container, track)
            tracks, container_name = len(container.streams.video), container.format.name
    except (FFmpegError, OSError) as error:
        raise InputError(f"video {name} cannot be opened ({error.strerror}): download it again") from error
    if not packets:
        raise InputError(f"video {name} has no frames: download it again or skip it")
    begin = min((p.decoded if by_order else p.shown) or 0 for p in packets)
    late = not packets[0].key or any(_before(packet.shown, packets[0].shown) for packet in packets)
    if late:
        number = _first_decoded(source, name)
        first = next((packet for packet in packets if packet.number == number), packets[0])
        gone = [p for p in packets if (p.number < number if by_order else _before(p.shown, first.shown))]
        skipped |= {packet.number for packet in gone}
        packets = [packet for packet in packets if packet.number not in skipped]
        late = bool(gone)
    stamps = [stamp for packet in packets for stamp in (packet.shown, packet.decoded) if stamp is not None]
    if stamps and max(map(abs, stamps)) >= 2**62:
        raise InputError(f"video {name} has timestamps that are out of range: rewrite it as MP4")
    if by_order and all(packet.decoded is not None for packet in packets):
        ticks, numbers = np.sort(np.array([packet.decoded for packet in packets], np.int64)), None
    elif any(packet.shown is None for packet in packets):
        raise InputError(f"video {name} has frames without timestamps: rewrite it as MP4")
    else:
        shown = np.array([packet.shown for packet in packets], np.int64)
        ticks, places = np.unique(shown, return_index=True)
        numbers = np.array([packets[place].number for place in places], np.int64)
    times = (ticks - ticks[0]) * tick.numerator / tick.denominator
    last = float(max(packets, key=lambda p: (p.decoded if numbers is None else p.shown) or 0).duration * tick)
    newest = float(ticks[-1] * tick)
    first_shown = newest - float(times[-1])
    gaps = np.diff(times)
    usual = float(np.median(gaps)) if len(gaps) else 0.0
    duration = float(times[-1]) + last_gap(last, usual, max(gaps.max(initial=0.0), others - newest))
    finish = newest + max(last, duration - float(times[-1]))
    check_length(f"video {name}", claimed, finish - float(begin * tick), finish, float(end))
    odd = (
        "decoding timestamps only" if numbers is None else
        "timestamp discontinuities" if clock.breaks else
        "timestamps that begin hours late" if first_shown >= LATE else
        "frames before the first decodable frame" if late or skipped else
        f"{tracks} video tracks" if tracks > 1 else
        "MPEG-TS, whose first frames it loses" if "mpegts" in container_name else ""
    )  # fmt: skip
    sets = (frozenset(skipped), frozenset(damaged), frozenset(anew))
    return FrameIndex(times, duration, numbers, container_name, *sets, odd)


def _check_file(path: str | Path, name: str) -> None:
    try:
        size = Path(path).stat().st_size if Path(path).is_file() else None
    except OSError as error:  # the path is too long, or a parent folder is not accessible
        raise InputError(f"video {name:.200} cannot be read ({error.strerror}): check its path") from error
    if size is None and Path(path).is_dir():
        raise InputError(f"video {name} is a folder: give a video file in it")
    if size is None and Path(path).exists():
        raise InputError(f"video {name} is a pipe, a socket or a device: write the video to a file first")
    if size is None:
        raise InputError(f"video {name} does not exist: check the path")
    if not size:
        raise InputError(f"video {name} is empty: download it again")


def _before(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one < other


def _read(
    container: InputContainer, track: av.VideoStream, clock: FilmClock, source: str | Path | BinaryIO
) -> tuple[list[_Packet], set[int], set[int], set[int], Fraction, int]:
    """Read all packets. Returns the packets of visible frames in decoding order; three sets of packet numbers: not
    shown at a splice, corrupt, and preceded by a flush of the decoder; the end in seconds of the track that ends last;
    and the largest byte position of a packet."""
    packets: list[_Packet] = []
    splices, skipped, starts = Splices(), set(), set()
    end, furthest, number, vp8 = Fraction(0), 0, -1, track.codec_context.name == "vp8"
    flagged: dict[int, int | None] = {}  # number of each corrupt packet, and its byte position
    for packet in demux(container):
        furthest = max(furthest, packet.pos or 0)
        if packet.pts is not None and packet.size:
            end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream_index != track.index:
            continue
        number += 1
        if not packet.size or packet.is_discard or (vp8 and not memoryview(packet)[0] & VP8_SHOWN):
            continue
        check_codec(track, packet, clock.name)
        shown, broken = clock.add(shown_stamp(packet), packet.dts, key=packet.is_keyframe)
        if packet.is_corrupt:
            flagged[number] = packet.pos
        anew, visible = splices.add(number, packet.is_keyframe, packet.is_corrupt, shown, broken)
        if anew:
            starts.add(number)
        for before in flagged.keys() & {number - 1, number - 2} if packet.is_keyframe else ():
            tells = track.codec_context.name != "hevc"  # the HEVC decoder does not report a truncated frame
            if is_whole(source, flagged[before], packet.pos, fits=tells and not broken):
                splices.corrupt.discard(before)  # flagged only for the continuity counter of what follows
            elif broken and container.format.name == "mpegts":  # the earlier recording ends within a frame
                while packets and packets[-1].number >= before:
                    skipped.add(packets.pop().number)
        if visible:
            decoded = None if packet.dts is None else packet.dts + clock.shift
            packets.append(_Packet(number, shown, decoded, claimed_ticks(packet), packet.is_keyframe))
        else:
            skipped.add(number)
    return packets, skipped, splices.corrupt, starts, end, furthest


def _first_decoded(source: str | Path | BinaryIO, name: str) -> int:
    """The number of the packet with the first frame that can be decoded. Raises InputError if no frame decodes, or if
    decoding fails between the first keyframe and that frame."""
    key = False
    try:
        with open_film(source) as container:
            track = film_track(container, f"video {name}")
            for number, packet in enumerate(demux(container, track)):
                packet.pts = number  # the decoder copies it to the frame
                key = key or packet.is_keyframe
                try:
                    frames = packet.decode()
                except FFmpegError:
                    if key:
                        raise
                    continue
                if frames:
                    return frames[0].pts
    except (FFmpegError, OSError) as error:
        raise InputError(
            f"video {name} is damaged at the beginning ({error.strerror}): download it again or skip it"
        ) from error
    raise InputError(f"video {name} has no frame that can be decoded: download it again or skip it")
