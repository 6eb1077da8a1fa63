"""Film time from the stamps of packets: one time line that goes on where stamps go back or leap ahead. The index of a
file and the sampler of a stream both use it, so that they agree. Knows nothing about FFmpeg, pixels and clips.

Stamps and film time are whole ticks of the track's time base; wall-clock times are seconds.
"""

import collections
import logging
import math
from fractions import Fraction

from ..common.redact import Redacting

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())
_noted: set[str] = set()  # what was said of films

LEAP = 10.0  # seconds; FFmpeg's -dts_delta_threshold
BACK = 0.1  # seconds by which the order of decoding may go back; FFmpeg's tolerance
STUCK = 1.0  # seconds for which the stamps of a live source may stay as they are
HELD = 3  # packets, one more than a demuxer holds back until it has seen what follows
PERIOD = 0.04  # seconds of a frame, where nothing tells


class FilmClock:
    """Shifts the stamps of one track's packets, which are added in the order of decoding, onto one time line.

    A stamp that goes back is a discontinuity: two recordings were joined, or an encoder was restarted. So is one that
    leaps ahead by more than LEAP in a format whose stamps may do that (`leaps`), or beyond the `length` in seconds that
    the container claims; a screen recording in MP4 may show one frame for minutes. The time line then goes on one
    frame after the newest one. Of a `live` source the arrivals tell: a stamp that leaps ahead by LEAP more than the
    time that has passed, or that stays, is a discontinuity, and the time line goes on by what has passed. Each is
    logged once, with the `name` of the source.
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
        """`reorder` is the number of frames by which the order of decoding may differ from that of showing."""
        self.time_base, self.name, self.leaps, self.reorder, self.live = time_base, name, leaps, reorder, live
        self.length = math.inf if length is None else length
        self.shift = 0
        """Ticks to add to a stamp."""
        self.breaks = 0
        """Discontinuities so far."""
        self._first = self._newest = None  # decoding stamps, on the film's time line
        self._last: int | None = None  # the latest that is shown so far, likewise
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=HELD)  # stamps and arrivals
        self._gap = self._longest = self._ticks(PERIOD)

    def add(self, pts: int | None, dts: int | None, came: float = 0.0, key: bool = False) -> tuple[int | None, bool]:
        """A packet's time of showing in ticks of film time, and whether a discontinuity is before it.

        None for a packet without a stamp. `came` is the wall-clock time of its arrival, for a live source; `key` says
        whether it holds a keyframe, which is shown after all that come before it.
        """
        broken = False
        if None not in (pts, dts) and (self.live or self.leaps) and abs(pts - dts) * self.time_base > LEAP:
            pts = dts  # one of them is broken, and that of decoding is checked
        if dts is not None:
            broken = self._newest is not None and self._step(pts, dts, came, key)
            at = dts + self.shift
            if self._newest is None or at > self._newest or broken:
                if self._newest is not None and not broken:
                    self._gap = at - self._newest
                    self._longest = max(self._longest, self._gap)
                self._newest = at
                self._recent.append((at, came))
                self._first = at if self._first is None else self._first
        if pts is None:
            return None, broken
        shown = pts + self.shift
        self._last = shown if self._last is None else max(self._last, shown)
        return shown, broken

    def _step(self, pts: int | None, dts: int, came: float, key: bool) -> bool:
        """Shift what follows where this packet begins anew."""
        step = float((dts + self.shift - self._newest) * self.time_base)
        # The newest packets of MPEG-TS come only with what follows them: those before tell when they were due.
        passed = came - min(then + float((self._newest - at) * self.time_base) for at, then in self._recent)
        back = BACK if self.leaps else max(BACK, float((self.reorder + 1) * self._longest * self.time_base))
        overlap = -1.0
        if key and self.leaps and not self.live and None not in (pts, self._last):
            overlap = float((self._last - pts - self.shift) * self.time_base)
        if step < -back or overlap >= 0:
            what = f"go back by {max(-step, overlap) or 0.0:.1f} s"
        elif step - passed > LEAP and (self.live or self.leaps or self._since() + step > self.length + LEAP):
            what = f"leap ahead by {step:.1f} s"
        elif self.live and step <= 0 and passed > STUCK:
            what = f"have stayed for {passed:.1f} s"
        else:
            return False
        period = min(self._gap, self._ticks(STUCK))
        ahead = max(period, self._ticks(passed)) if self.live else period
        shift = self._newest + ahead - dts
        if None not in (pts, self._last):
            shift = max(shift, self._last + period - pts)
        self.shift = shift
        self.breaks += 1
        self._recent.clear()
        at = self._since()
        note = f"{self.name}: its time stamps {what} at {at:.1f} s: film time goes on without that"
        if self.live or note not in _noted:  # a film is read again and again in training
            logger.warning("%s", note)
            _noted.add(note)
        return True

    def _since(self) -> float:
        """Seconds from the first packet to the newest."""
        return float((self._newest - self._first) * self.time_base)

    def _ticks(self, seconds: float) -> int:
        return max(1, round(seconds / self.time_base))


class Splices:
    """Finds out where a decoder has to begin anew, since another recording was joined, and which frames it cannot
    show then."""

    def __init__(self):
        self.corrupt: set[int] = set()
        """Packets that FFmpeg flags, but for those that a join has torn."""
        self._waits = False  # for a keyframe
        self._floor: int | None = None

    def add(self, number: int, key: bool, corrupt: bool, shown: int | None, broken: bool) -> tuple[bool, bool]:
        """Whether the decoder begins anew with this packet, and whether its frame is shown.

        `key` and `corrupt` are FFmpeg's flags of the packet, `shown` and `broken` what FilmClock says of it.
        """
        torn = self.corrupt & {number - 1, number - 2} if broken else set()
        anew = broken and (key or bool(torn))  # else a camera has set its clock
        self.corrupt -= torn
        if corrupt:
            self.corrupt.add(number)
        self._waits = self._waits or anew
        if self._waits and key:
            self._waits, self._floor = False, shown
        before = self._floor is not None and shown is not None and shown < self._floor
        return anew, not (self._waits or before)
