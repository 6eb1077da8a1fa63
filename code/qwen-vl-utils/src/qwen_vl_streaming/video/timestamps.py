"""Maps packet timestamps to a continuous timeline, also across discontinuities. Files and streams share this code, so
they agree. Does not depend on PyAV, pixels or clips.

Timestamps and times on the timeline are integer ticks of the track's time base. Wall-clock times are in seconds.
"""

import collections
import logging
import math
from fractions import Fraction

from ..common.redact import Redacting

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())
_noted: set[str] = set()  # messages already logged for recordings

LEAP = 10.0  # seconds; the default of FFmpeg's -dts_delta_threshold
BACK = 0.1  # seconds by which decoding timestamps may go back; FFmpeg's tolerance
STUCK = 1.0  # seconds for which the timestamps of a live source may stand still
HELD = 3  # packets; one more than a demuxer holds back until later data arrives
PERIOD = 0.04  # seconds per frame until a gap is measured


class FilmClock:
    """Shifts the timestamps of one track's packets, added in decoding order, onto a continuous timeline.

    A timestamp that goes back by more than a tolerance is a discontinuity: two recordings were joined, or an encoder
    was restarted. With `leaps`, so is a keyframe of a recording that would be shown no later than an earlier frame. A
    jump ahead by more than LEAP is a discontinuity if the format may have discontinuities (`leaps`), or if it ends more
    than LEAP after the `length` in seconds that the container states. Other jumps are kept: a screen recording in MP4
    may show one frame for minutes. After a discontinuity, the timeline continues one frame after the newest one.

    For a `live` source, arrival times are used as well. A jump that exceeds the elapsed time by more than LEAP is a
    discontinuity, and so are timestamps that stand still for more than STUCK. The timeline then advances by the elapsed
    time. Each discontinuity is logged with the `name` of the source; a message about a recording is logged once.
    """

    def __init__(
        self,
        time_base: Fraction,
        name: str,
        *,
        leaps: bool,
        reorder: int = 0,
        live: bool = False,
        length: float | None = None,
    ):
        """`reorder` is the number of frames by which decoding order and presentation order may differ."""
        self.time_base, self.name, self.leaps, self.reorder, self.live = time_base, name, leaps, reorder, live
        self.length = math.inf if length is None else length
        self.shift = 0
        """Ticks to add to a timestamp."""
        self.breaks = 0
        """Number of discontinuities so far."""
        self._first = 0  # decoding timestamps on the timeline
        self._newest: int | None = None
        self._last: int | None = None  # latest presentation timestamp on the timeline
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=HELD)  # timestamps and arrivals
        self._gap = self._longest = self._ticks(PERIOD)

    def add(self, pts: int | None, dts: int | None, came: float = 0.0, key: bool = False) -> tuple[int | None, bool]:
        """Add a packet. Returns its presentation time in ticks on the timeline, and whether a discontinuity precedes
        it.

        The time is None if the packet has no presentation timestamp. `came` is the wall-clock arrival time, for a live
        source. `key` is whether the packet holds a keyframe, which is shown after all earlier packets.
        """
        broken = False
        if pts is not None and dts is not None and (self.live or self.leaps) and abs(pts - dts) * self.time_base > LEAP:
            pts = dts  # one of them is wrong; only the decoding timestamp is checked for jumps
        if dts is not None:
            newest = self._newest
            broken = newest is not None and self._step(newest, pts, dts, came, key)
            at = dts + self.shift
            if newest is None or at > newest or broken:
                if newest is None:
                    self._first = at
                elif not broken:
                    self._gap = at - newest
                    self._longest = max(self._longest, self._gap)
                self._newest = at
                self._recent.append((at, came))
        if pts is None:
            return None, broken
        shown = pts + self.shift
        self._last = shown if self._last is None else max(self._last, shown)
        return shown, broken

    def _step(self, newest: int, pts: int | None, dts: int, came: float, key: bool) -> bool:
        """Update the shift if a discontinuity precedes this packet. Returns whether one does."""
        step = float((dts + self.shift - newest) * self.time_base)
        # An MPEG-TS demuxer holds back the newest packets until later data arrives; older ones tell when they were due.
        passed = came - min(then + float((newest - at) * self.time_base) for at, then in self._recent)
        back = BACK if self.leaps else max(BACK, float((self.reorder + 1) * self._longest * self.time_base))
        overlap, at = -1.0, float((newest - self._first) * self.time_base)
        if key and self.leaps and not self.live and pts is not None and self._last is not None:
            overlap = float((self._last - pts - self.shift) * self.time_base)
        if step < -back or overlap >= 0:
            what = f"jump back by {max(-step, overlap) or 0.0:.1f} s"
        elif step - passed > LEAP and (self.live or self.leaps or at + step > self.length + LEAP):
            what = f"jump ahead by {step:.1f} s"
        elif self.live and step <= 0 and passed > STUCK:
            what = f"have not changed for {passed:.1f} s"
        else:
            return False
        period = min(self._gap, self._ticks(STUCK))
        ahead = max(period, self._ticks(passed)) if self.live else period
        shift = newest + ahead - dts
        if pts is not None and self._last is not None:
            shift = max(shift, self._last + period - pts)
        self.shift = shift
        self.breaks += 1
        self._recent.clear()
        note = f"{self.name}: timestamps {what} at {at:.1f} s; corrected"
        if self.live or note not in _noted:  # training reads a recording many times
            logger.warning("%s", note)
            _noted.add(note)
        return True

    def _ticks(self, seconds: float) -> int:
        return max(1, round(seconds / self.time_base))


class Splices:
    """Detects splices, where another recording was joined. The decoder must be flushed there, and some frames cannot be
    shown."""

    def __init__(self):
        self.corrupt: set[int] = set()
        """Numbers of packets that FFmpeg flags as corrupt, except those truncated by a splice."""
        self._waits = False  # whether frames are hidden until a keyframe
        self._floor: int | None = None

    def add(self, number: int, key: bool, corrupt: bool, shown: int | None, broken: bool) -> tuple[bool, bool]:
        """Add a packet. Returns whether the decoder must be flushed before it, and whether its frame is shown.

        `key` and `corrupt` are FFmpeg's flags of the packet; `shown` and `broken` are what FilmClock.add returns.
        """
        torn = self.corrupt & {number - 1, number - 2} if broken else set()
        anew = broken and (key or bool(torn))  # otherwise a camera only set its clock
        self.corrupt -= torn
        if corrupt:
            self.corrupt.add(number)
        self._waits = self._waits or anew
        if self._waits and key:
            self._waits, self._floor = False, shown
        before = self._floor is not None and shown is not None and shown < self._floor
        return anew, not (self._waits or before)
