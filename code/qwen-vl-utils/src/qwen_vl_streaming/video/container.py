"""Opens a video with PyAV, selects its track, and tells what its format says of time stamps. Decodes nothing."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer
from av.error import ArgumentError
from av.format import Flags
from av.stream import Disposition

from ..common.errors import InputError
from .formats import FILE
from .timestamps import LEAP, FilmClock
from .wholeness import time_base

DECODING_STAMPS = ("avi", "asf")  # formats with decoding timestamps but no presentation timestamps


def open_film(source: str | Path | BinaryIO) -> InputContainer:
    """Open a file or a readable object with PyAV. Metadata such as titles may be in any encoding: it is not used here,
    so bytes that do not decode are replaced. Raises OSError if the format holds no video, such as a playlist, and the
    errors of PyAV."""
    if isinstance(source, str | Path):
        source = os.path.abspath(source)  # a relative path may look like a URL
    else:
        source.seek(0)
    try:
        return av.open(source, "r", options=FILE, metadata_errors="replace")
    except ArgumentError as error:
        raise OSError(errno.EINVAL, "its format has no video") from error


def demux(container: InputContainer, *tracks: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the packets of the given `tracks`, or of all tracks. Raises OSError if a track first appears in the middle
    of the source, which PyAV does not support."""
    try:
        yield from container.demux(*tracks)
    except IndexError as error:
        raise OSError(errno.EINVAL, "a track begins in the middle of the source") from error


def film_track(container: InputContainer, name: str, fix: str = "download it again or skip it") -> av.VideoStream:
    """The video track that FFmpeg selects. Raises InputError with `name` and `fix` if there is none or it is cover art,
    and InputError with `name` if FFmpeg has no decoder for it."""
    track = container.streams.best("video")
    if not isinstance(track, av.VideoStream) or track.disposition & Disposition.attached_pic:
        raise InputError(f"{name} has no video stream: {fix}")
    if track.codec_context is None:
        raise InputError(f"{name} has a codec that FFmpeg has no decoder for: convert it to H.264")
    return track


def check_stamps(container: InputContainer, name: str) -> None:
    """Raise InputError for a format without timestamps. FFmpeg invents timestamps for such a format."""
    if not has_stamps(container):
        raise InputError(f"{name} has frames without timestamps ({container.format.name}): rewrite it as MP4")


def has_stamps(container: InputContainer) -> bool:
    return not container.format.flags & Flags.no_timestamps.value


def may_leap(container: InputContainer) -> bool:
    """Whether timestamps in this format may have discontinuities. Such a format does not state its own length."""
    return bool(container.format.flags & Flags.ts_discont.value)


def film_clock(container: InputContainer, track: av.VideoStream, name: str, live: bool = False) -> FilmClock:
    return FilmClock(
        time_base(track),
        name,
        leaps=may_leap(container),
        reorder=track.codec_context.reorder_depth,
        live=live,
        length=container.duration / av.time_base if container.duration else None,
    )


def shown_by_order(container: InputContainer, track: av.VideoStream) -> bool:
    """Whether presentation times follow only from the order in which frames leave the decoder: frame k is shown at the
    k-th smallest decoding timestamp."""
    if not track.codec_context.reorder_depth:
        return False
    video_for_windows = "matroska" in container.format.name and track.codec_tag.strip("\0")
    return container.format.name in DECODING_STAMPS or bool(video_for_windows)


def shown_stamp(packet: av.Packet) -> int | None:
    """The presentation timestamp of a packet. ASF stores only decoding timestamps, and FFmpeg's guess gives the last
    two frames the same time, so the decoding timestamp is used. Without reordering the two are equal; with reordering,
    see `shown_by_order`."""
    decoding = packet.stream.container.format.name == "asf" and packet.dts is not None
    return packet.dts if decoding else packet.pts


def claimed_ticks(packet: av.Packet) -> int:
    """The duration of a packet in ticks, as the container states it; 0 if not stated. FFmpeg writes 1 for unknown."""
    return packet.duration if packet.duration and packet.duration > 1 else 0


def last_gap(claimed: float, usual: float, known: float = 0.0) -> float:
    """Seconds for which the last frame of a video is shown: the `claimed` duration if it is plausible, otherwise the
    `usual` gap between frames.

    A claim is plausible if it is above 0 and at most LEAP, or at most a duration `known` to be possible: the longest
    gap between frames, or the time until other tracks end.
    """
    return claimed if 0 < claimed <= max(LEAP, known) else usual
