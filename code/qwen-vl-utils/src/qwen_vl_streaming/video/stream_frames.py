"""Decoded frames of a connection to a stream, each with its film time by FilmClock. Knows nothing about clips."""

import heapq
import logging
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np

from ..common.clock import now
from .index import claimed_ticks, film_clock, has_stamps, shown_by_order, shown_stamp, steady
from .timestamps import Splices
from .wholeness import HEADERS, check_codec

logger = logging.getLogger(__name__)

REMEMBERED = 256  # packets for whose frames a decoder may keep one waiting


class StreamFrames:
    def __init__(self, container: av.container.InputContainer, track: av.VideoStream, name: str, film: bool):
        """`film`: the packets come as they are asked for, so that their arrivals tell nothing."""
        self.clock = film_clock(container, track, name, live=not film)
        self.track, self.name = track, name
        self.stamped, self.by_order = has_stamps(container), shown_by_order(container, track)
        self.splices = Splices()
        self.known: dict[int, tuple[int | None, int]] = {}  # of packets in the decoder, when they are shown, how long
        self.decoded: list[int] = []  # their decoding stamps, a heap
        self.key = False  # there was a keyframe, from which on all should decode

    def read(self, packets: Iterable[av.Packet]) -> Iterator[tuple[float | None, float, float, av.VideoFrame | None]]:
        """Yield of each frame its film time in seconds, None where it has none, the seconds for which it claims to
        stay, and the wall-clock time at which its packet came; None in place of a frame that is damaged."""
        for number, packet in enumerate(packets):
            came = now()
            if packet.size:
                yield from self._take(number, packet, came)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if self.key:
                    logger.debug("%s: a frame that does not decode", self.name)
                    yield None, 0.0, came, None
                continue
            yield from self._timed(frames, came)

    def _take(self, number: int, packet: av.Packet, came: float) -> Iterator[tuple]:
        """Note when the frame of a packet is shown. Yields what is left in the decoder where it begins anew."""
        check_codec(self.track, packet, self.name)
        shown, broken = self.clock.add(shown_stamp(packet), packet.dts, came, packet.is_keyframe)
        anew, visible = self.splices.add(number, packet.is_keyframe, packet.is_corrupt, shown, broken)
        if anew:
            yield from self._timed(self.track.codec_context.decode(None), came)
            self.track.codec_context.flush_buffers()
        self.key = self.key or packet.is_keyframe
        if visible:
            self.known[number] = shown, claimed_ticks(packet)
            if self.by_order and packet.dts is not None and self.key:
                heapq.heappush(self.decoded, packet.dts + self.clock.shift)
        self.known.pop(number - REMEMBERED, None)
        packet.pts = number  # handed on to its frame

    def _timed(self, frames: Sequence[av.VideoFrame], came: float) -> Iterator[tuple]:
        for frame in frames:
            if frame.pts not in self.known:
                continue
            shown, duration = self.known.pop(frame.pts)
            if self.by_order and self.decoded:
                shown = heapq.heappop(self.decoded)
            if frame.is_corrupt:
                yield None, 0.0, came, None
            elif not self.stamped:
                yield came, 0.0, came, frame
            else:
                time_base = self.track.time_base
                yield None if shown is None else float(shown * time_base), float(duration * time_base), came, frame


def slow_rate(ahead: Sequence[av.Packet], track: av.VideoStream, fps: float) -> float | None:
    """The frames per second of a film whose first packets are `ahead`, where it comes at a steady rate below `fps`."""
    stamps = np.unique([packet.pts for packet in ahead if packet.size and packet.pts is not None])
    if len(stamps) < 2 or not steady(stamps):
        return None
    rate = float((len(stamps) - 1) / ((stamps[-1] - stamps[0]) * track.time_base))
    whole = float(track.average_rate or 0)
    if track.container.format.name.startswith(HEADERS) and abs(whole / rate - 1) > 0.1:  # it varies later
        return None
    rate = whole if abs(whole / rate - 1) < 0.01 else rate
    return rate if rate < 0.99 * fps else None
