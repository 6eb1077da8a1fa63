"""Clips of an RTSP or HTTP stream or a webcam, which may drop, stall, begin anew and have no clock of its own.

The same clips as frames.py's, by the same rule. Knows nothing about models or text.
"""

import collections
import errno
import itertools
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import av
import numpy as np
import torch

from ..common.clock import now
from ..common.errors import InputError
from ..common.redact import Redacting, redacted
from .formats import STREAM
from .frames import FRAMES_PER_CLIP, SLACK, PixelBudget, resize_frame, too_short
from .index import check_stamps, demux, film_track, last_gap
from .readers import upright
from .sources import Clip
from .stream_frames import StreamFrames, slow_rate
from .wholeness import claims, shortfall

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())

CLIPS_WAITING = 256  # read ahead of a slow consumer before the source itself has to wait
STALLED_SECONDS = 5.0  # without a byte before a connection counts as dropped
PAUSES = 0.2, 5.0  # seconds before a stream that broke off is tried again: at first, doubled each time, and at most
PLAYLISTS = ("hls", "dash")  # formats whose size is not that of the film
GAPS = 10_000  # between frames that are remembered, to tell how long the last one stays
LOOK_AHEAD = 32  # packets of a film from which its rate is told


def stream_clips(
    source: str,
    *,
    fps: float = 2.0,
    budget: PixelBudget | None = None,
    reconnect_seconds: float = 10.0,
    max_clips: int | None = None,
) -> Iterator[Clip]:
    """The clips of an RTSP or HTTP stream, or of a webcam such as "/dev/video0", read in a thread of its own.

    A stream that breaks off or ends is opened again for up to `reconnect_seconds`, which begin anew only after a
    connection that held for as long; in between, its last frame stays on screen, so that time goes on as it really did.
    So it does in place of a frame that cannot be decoded or is damaged. A film, whose size or length its server tells,
    is over at its end, and gives the clips that it gives as a file; where it breaks off, what was shown is skipped.
    Where stamps go back or leap, see FilmClock; a source without stamps, such as MJPEG, is shown as it arrives. Frames
    are sized once, by the first. Raises InputError where the source cannot be opened at all; ends when it cannot be
    opened again.
    """
    reader = _StreamReader(source, Sampler(fps, budget or PixelBudget()), reconnect_seconds, max_clips)
    thread = threading.Thread(target=reader.run, name=f"frames of {redacted(source)}", daemon=True)
    thread.start()
    try:
        while (clip := reader.clips.get()) is not None:
            yield clip
    finally:
        reader.stop.set()
    if reader.fault is not None:
        raise reader.fault


class Sampler:
    """Frames with their times in, clips out."""

    def __init__(self, fps: float, budget: PixelBudget):
        self.fps, self.budget = fps, budget
        self.size: tuple[int, int] | None = None
        self.shown: av.VideoFrame | None = None
        self.seconds: float | None = None  # of a clip, where the source keeps its own rate
        self.moment: float | None = None  # of the newest frame
        self.claimed = self.longest = 0.0  # how long the newest frame says that it stays; how long one did at most
        self.gaps: collections.deque[float] = collections.deque(maxlen=GAPS)
        self.targets = 0  # met so far
        self.waiting: list[tuple[torch.Tensor, float]] = []
        self.broken = 0

    def keep_rate(self, fps: float) -> None:
        """Sample at the source's own rate."""
        self.fps, self.seconds = fps, FRAMES_PER_CLIP / fps

    def add(self, moment: float, frame: av.VideoFrame, claimed: float = 0.0) -> Iterator[Clip]:
        """Take the frame shown from `moment` on; yield the clips that are complete now that it is known. It claims to
        stay for `claimed` seconds, where it says so."""
        if self.moment is not None and moment <= self.moment:
            return
        yield from self._meet(moment - SLACK)
        if self.moment is not None:
            self.gaps.append(moment - self.moment)
            self.longest = max(self.longest, self.gaps[-1])
        self.shown, self.moment, self.claimed = frame, moment, claimed

    def end(self) -> float:
        """Seconds until the newest frame ends, if no other comes."""
        usual = float(np.median(self.gaps)) if self.gaps else 0.0
        return (self.moment or 0.0) + last_gap(self.claimed, usual, self.longest)

    def finish(self) -> Iterator[Clip]:
        """Yield what is left: the last frame stays as in a file, and fills its clip."""
        if self.shown is None:
            return
        yield from self._meet(self.end() - SLACK)
        if self.waiting:
            yield from self._put(*self.waiting[-1])

    def _meet(self, until: float) -> Iterator[Clip]:
        """Put the frame on screen at each target time before `until`."""
        picture = None
        while self.shown is not None and self.targets / self.fps < until:
            if picture is None:
                picture = self._resized(self.shown)
            self.targets += 1
            yield from self._put(picture, self.moment)

    def _put(self, picture: torch.Tensor, moment: float) -> Iterator[Clip]:
        self.waiting.append((picture, moment))
        if len(self.waiting) == FRAMES_PER_CLIP:
            pictures, moments = zip(*self.waiting, strict=True)
            self.waiting = []
            index = -(-self.targets // FRAMES_PER_CLIP) - 1
            stamps = np.array(moments, np.float64)
            yield Clip(index, torch.stack(pictures), stamps, now(), broken=self.broken, seconds=self.seconds)

    def _resized(self, frame: av.VideoFrame) -> torch.Tensor:
        image = upright(frame)
        if self.size is None:
            self.size = self.budget.size(*image.shape[:2], frames=0)
        return resize_frame(image, self.size)


class _StreamReader:
    """Reads a stream in its own thread, so that a slow consumer never holds up the source."""

    def __init__(self, source: str, sampler: Sampler, reconnect_seconds: float, max_clips: int | None):
        self.source, self.sampler = source, sampler
        self.reconnect_seconds, self.max_clips = reconnect_seconds, max_clips
        self.clips: queue.Queue[Clip | None] = queue.Queue(CLIPS_WAITING)
        self.stop = threading.Event()
        self.fault: Exception | None = None
        self.begin: float | None = None  # wall-clock time of the first frame
        self.held: tuple[float, float] | None = None
        """When the first and the newest frame of the connection came."""
        self.film = False
        self.offset: float | None = None
        """Seconds from a film's stamps to its time, which is the same when it is opened again."""
        self.claimed: dict[str, float] = {}
        """What a film says of its length, where its server does not tell its size."""
        self.count = 0

    def run(self) -> None:
        try:
            self._read_until_gone()
            if not self.stop.is_set():
                duration, rate = self.sampler.end(), self.sampler.fps
                if self.film and duration + SLACK < FRAMES_PER_CLIP / rate:
                    raise InputError(too_short(f"source {self.source}", duration, rate))
                left = list(self.sampler.finish())
                self._hand_over(replace(clip, last=clip is left[-1]) for clip in left)
        except Exception as error:  # raised again where the clips are taken, for no one looks at a thread
            self.fault = error
        self._put(None)

    def _read_until_gone(self) -> None:
        lost, since, (pause, longest) = 0.0, None, PAUSES
        while not self.stop.is_set():
            self.held = None
            try:
                self._read_once()
                if self.film:
                    break
                reason = "it ended"
            except (av.FFmpegError, OSError) as error:
                if error.errno == errno.EIO and self._is_complete():
                    break
                reason = error.strerror or type(error).__name__
                if isinstance(error, av.ExitError):
                    reason = f"it did not answer for {STALLED_SECONDS:g} s"
                if self.begin is None:
                    raise InputError(f"source {self.source} cannot be opened ({reason}): check its address") from error
            if self.begin is None:
                raise InputError(f"source {self.source} gives no frames: check its address")
            at = now()
            if self.held is not None:
                first, newest = self.held
                lost += first - (since or first)
                if newest - first >= self.reconnect_seconds:
                    lost, pause = 0.0, PAUSES[0]
                since = at
                if (left := self.reconnect_seconds - lost) > 0:
                    logger.warning("%s dropped (%s); trying again for %.3g s", self.source, reason, left)
            if lost + at - since >= self.reconnect_seconds:
                break
            self.stop.wait(pause)
            pause = min(2 * pause, longest)
        logger.info("%s is over", self.source)

    def _is_complete(self) -> bool:
        """Whether a film was read to the end that it claims. Where its server does not tell its size, FFmpeg reports an
        error there."""
        length = self.sampler.end()
        return bool(self.claimed) and not shortfall(self.claimed, length, length - (self.offset or 0.0), 0.0)

    def _read_once(self) -> None:
        """Read one connection to its end. Its own clock starts where the wall clock stands at its first frame; a film's
        goes on, and what was shown of it is skipped."""
        webcam = self.source.startswith("/dev/")
        options = {} if webcam else dict(STREAM)
        options["fpsprobesize"] = "0"  # else it opens 20 frames late, to learn a frame rate that nobody asks for
        if self.source.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        with av.open(
            self.source,
            format="v4l2" if webcam else None,
            options=options,
            timeout=(STALLED_SECONDS, STALLED_SECONDS),
            metadata_errors="replace",
        ) as container:
            name = f"source {self.source}"
            track = film_track(container, name, "check its address")
            self.film = bool(container.duration or (container.size > 0 and container.format.name not in PLAYLISTS))
            packets = demux(container, track)
            if self.film:
                check_stamps(container, name)
                self.claimed = {} if container.size > 0 else claims(container, track)
                ahead = list(itertools.islice(packets, LOOK_AHEAD))
                packets = itertools.chain(ahead, packets)
                if self.begin is None and (rate := slow_rate(ahead, track, self.sampler.fps)):
                    self.sampler.keep_rate(rate)
            offset = self.offset if self.film else None
            broken, before = 0, 0 if self.film else self.sampler.broken
            stampless = 0
            for moment, claimed, came, frame in StreamFrames(container, track, name, self.film).read(packets):
                if self.stop.is_set():
                    return
                broken += frame is None
                self.sampler.broken = max(self.sampler.broken, before + broken)
                if frame is None:
                    continue
                if moment is None:
                    if self.film:
                        raise InputError(f"{name} has frames without timestamps: rewrite it as MP4")
                    stampless += 1
                    if stampless == 2:  # of the first frame of an RTSP camera FFmpeg knows none
                        logger.warning("%s: frames without time stamps are skipped", name)
                    continue
                self.held = (self.held or (came,))[0], came
                if offset is None:
                    self.begin = self.begin or came
                    offset = came - self.begin - moment
                    self.offset = offset if self.film else None
                self._hand_over(self.sampler.add(moment + offset, frame, claimed))

    def _hand_over(self, clips: Iterator[Clip]) -> None:
        for clip in clips:
            if self.max_clips is not None and self.count == self.max_clips:
                self.stop.set()
                return
            self._put(replace(clip, film=self.film))
            self.count += 1

    def _put(self, clip: Clip | None) -> None:
        """Queue a clip, waiting for room unless nobody is going to take it."""
        while True:
            try:
                return self.clips.put(clip, timeout=0.2)
            except queue.Full:
                if self.stop.is_set():
                    return None
