"""Decodes the frames of one connection to a stream and gives each its time from FilmClock. Does not depend on clips."""

import heapq
import logging
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from ..common.clock import now
from .container import claimed_ticks, film_clock, has_stamps, shown_by_order, shown_stamp
from .index import steady
from .timestamps import Splices
from .wholeness import HEADERS, check_codec, time_base

logger = logging.getLogger(__name__)

REMEMBERED = 256  # packets whose times are kept while the decoder delays their frames


class StreamFrames:
    def __init__(self, container: InputContainer, track: av.VideoStream, name: str, film: bool):
        """`film`: whether the stream is a recording. Its packets are read on demand, so arrival times carry no
        timing."""
        self.clock = film_clock(container, track, name, live=not film)
        self.track, self.name = track, name
        self.stamped, self.by_order = has_stamps(container), shown_by_order(container, track)
        self.splices = Splices()
        self.known: dict[int, tuple[int | None, int]] = {}  # packets in the decoder: (time, duration) in ticks
        self.decoded: list[int] = []  # heap of their decoding timestamps
        self.key = False  # a keyframe has arrived; every packet from it on should decode

    def read(self, packets: Iterable[av.Packet]) -> Iterator[tuple[float | None, float, float, av.VideoFrame | None]]:
        """Decode `packets`. Yields, for each frame, (time, duration, arrival, frame), all times in seconds.

        `time` is the time on the continuous timeline of FilmClock, or None if the frame has no timestamp. In a format
        without timestamps, it is the arrival. `duration` is the one that the packet states, or 0. `arrival` is the
        wall-clock time at which the packet arrived that made the decoder return the frame. `frame` is None if it is
        damaged or does not decode.
        """
        for number, packet in enumerate(packets):
            came = now()
            if packet.size:
                yield from self._take(number, packet, came)
            try:
                frames = packet.decode()
            except FFmpegError:
                if self.key:
                    logger.debug("%s: skipping a frame that cannot be decoded", self.name)
                    yield None, 0.0, came, None
                continue
            yield from self._timed(frames, came)

    def _take(self, number: int, packet: av.Packet, came: float) -> Iterator[tuple]:
        """Record the presentation time of a packet's frame. At a splice, yields the frames left in the decoder and
        flushes it."""
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
        packet.pts = number  # the decoder copies it to the frame

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
                tick = time_base(self.track)
                yield None if shown is None else float(shown * tick), float(duration * tick), came, frame


def slow_rate(ahead: Sequence[av.Packet], track: av.VideoStream, fps: float) -> float | None:
    """The frame rate of a recording whose first packets are `ahead`, or None unless it is steady and below `fps`."""
    stamps = np.unique([packet.pts for packet in ahead if packet.size and packet.pts is not None])
    if len(stamps) < 2 or not steady(stamps):
        return None
    rate = float((len(stamps) - 1) / ((stamps[-1] - stamps[0]) * time_base(track)))
    whole = float(track.average_rate or 0)
    if track.container.format.name.startswith(HEADERS) and abs(whole / rate - 1) > 0.1:  # the rate varies later
        return None
    rate = whole if abs(whole / rate - 1) < 0.01 else rate
    return rate if rate < 0.99 * fps else None
