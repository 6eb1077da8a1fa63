"""Clips of a network stream or a webcam. Handles dropped connections, stalls, restarts and sources without timestamps.

Frames are sampled by the same rule as in frames.py. Does not depend on models or text.
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
from av.error import ExitError, FFmpegError

from ..common.clock import now
from ..common.errors import InputError
from ..common.redact import Redacting, redacted
from .container import check_stamps, demux, film_track, last_gap
from .formats import STREAM
from .frames import FRAMES_PER_CLIP, SLACK, resize_frame, too_short
from .pixel_budget import PixelBudget
from .readers import upright
from .sources import Clip
from .stream_frames import StreamFrames, slow_rate
from .wholeness import claims, shortfall

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())

CLIPS_WAITING = 256  # size of the queue for a slow consumer; when it is full, reading from the source stops
STALLED_SECONDS = 5.0  # time without data after which a connection counts as dropped
CLOSING_SECONDS = 2.0  # time to wait for the source to be closed; it is, once its next frame has come
PAUSES = 0.2, 5.0  # seconds before reconnecting: initial, doubled after each attempt, and maximum
PLAYLISTS = ("hls", "dash")  # formats whose size is that of the playlist, not of the video
GAPS = 10_000  # number of gaps between frames kept to estimate the duration of the last frame
LOOK_AHEAD = 32  # packets used to measure the frame rate of a recording


def stream_clips(
    source: str,
    *,
    fps: float = 2.0,
    budget: PixelBudget | None = None,
    reconnect_seconds: float = 10.0,
    max_clips: int | None = None,
) -> Iterator[Clip]:
    """Yield the clips of a network stream, such as RTSP or HTTP, or of a webcam such as "/dev/video0". A separate
    thread reads the source.

    A stream that drops, or a live stream that ends, is reopened for up to `reconnect_seconds` of total downtime. The
    downtime is reset after a connection that lasted for `reconnect_seconds`. Until frames of a live stream arrive
    again, its last frame stays on screen and its time follows the wall clock. The last frame also stays on screen in
    place of a frame that is damaged or does not decode.

    A recording, whose size or length is known, stops at its end and is sampled at the same times as a file. When it is
    reopened, frames that were already read are skipped.

    FilmClock handles discontinuities in timestamps. In a source whose format has no timestamps, such as MJPEG, a frame
    is shown when it arrives. The first sampled frame determines the size of all frames. Yields at most `max_clips`
    clips.

    Raises InputError if the source cannot be opened, has no frames or cannot be read as one video, and if a recording
    is shorter than one clip or has frames without timestamps. Stops when the source cannot be reopened.
    """
    reader = _StreamReader(source, Sampler(fps, budget or PixelBudget()), reconnect_seconds, max_clips)
    thread = threading.Thread(target=reader.run, name=f"frames of {redacted(source)}", daemon=True)
    thread.start()
    try:
        while (clip := reader.clips.get()) is not None:
            yield clip
    finally:
        reader.stop.set()
        thread.join(CLOSING_SECONDS)  # so that a camera is free again for the next who opens it
    if reader.fault is not None:
        raise reader.fault


class Sampler:
    """Samples frames at a fixed rate and groups them into clips."""

    def __init__(self, fps: float, budget: PixelBudget):
        self.fps, self.budget = fps, budget
        self.size: tuple[int, int] | None = None
        self.shown: av.VideoFrame | None = None
        self.seconds: float | None = None  # per clip, if the source's own rate is kept
        self.moment: float | None = None  # time of the newest frame
        self.claimed = self.longest = 0.0  # stated duration of the newest frame; longest gap so far
        self.gaps: collections.deque[float] = collections.deque(maxlen=GAPS)
        self.targets = 0  # sampling times reached so far
        self.waiting: list[tuple[torch.Tensor, float]] = []
        self.broken = 0

    def keep_rate(self, fps: float) -> None:
        """Sample at the source's own rate."""
        self.fps, self.seconds = fps, FRAMES_PER_CLIP / fps

    def add(self, moment: float, frame: av.VideoFrame, claimed: float = 0.0) -> Iterator[Clip]:
        """Add the frame that is shown from `moment` on and yield the clips that this completes. `claimed` is the
        duration in seconds that the source states, or 0. A frame that is not later than the newest one is dropped."""
        if self.moment is not None and moment <= self.moment:
            return
        yield from self._meet(moment - SLACK)
        if self.moment is not None:
            self.gaps.append(moment - self.moment)
            self.longest = max(self.longest, self.gaps[-1])
        self.shown, self.moment, self.claimed = frame, moment, claimed

    def end(self) -> float:
        """Time in seconds at which the newest frame ends if no other frame follows."""
        usual = float(np.median(self.gaps)) if self.gaps else 0.0
        return (self.moment or 0.0) + last_gap(self.claimed, usual, self.longest)

    def finish(self) -> Iterator[Clip]:
        """Yield the remaining clips. As in a file, the last frame is shown for its duration and is repeated to fill its
        clip."""
        if self.shown is None:
            return
        yield from self._meet(self.end() - SLACK)
        if self.waiting:
            yield from self._put(*self.waiting[-1])

    def _meet(self, until: float) -> Iterator[Clip]:
        """Sample the frame on screen at each target time before `until`."""
        moment, picture = self.moment, None
        while self.shown is not None and moment is not None and self.targets / self.fps < until:
            if picture is None:
                picture = self._resized(self.shown)
            self.targets += 1
            yield from self._put(picture, moment)

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
    """Reads a stream in its own thread, so that a slow consumer does not block the source while the queue has room."""

    def __init__(self, source: str, sampler: Sampler, reconnect_seconds: float, max_clips: int | None):
        self.source, self.sampler = source, sampler
        self.reconnect_seconds, self.max_clips = reconnect_seconds, max_clips
        self.clips: queue.Queue[Clip | None] = queue.Queue(CLIPS_WAITING)
        self.stop = threading.Event()
        self.fault: Exception | None = None
        self.begin: float | None = None  # wall-clock time of the first frame
        self.held: tuple[float, float] | None = None
        """Wall-clock arrival times of the first and the newest frame of the current connection."""
        self.film = False
        self.offset: float | None = None
        """Seconds to add to the timestamps of a recording. Kept when the recording is reopened."""
        self.claimed: dict[str, float] = {}
        """Lengths that a recording states, see `claims`; empty if the server reports its size."""
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
        except Exception as error:  # raised again in stream_clips; an error in a thread would go unnoticed
            self.fault = error
        self._put(None)

    def _read_until_gone(self) -> None:
        lost, since, (pause, longest) = 0.0, None, PAUSES
        while not self.stop.is_set():
            try:
                self._read_once()
                if self.film or self.stop.is_set():
                    break
                reason = "the stream ended"
            except (FFmpegError, OSError) as error:
                if error.errno == errno.EIO and self._is_complete():
                    break
                reason = error.strerror or type(error).__name__
                if isinstance(error, ExitError):
                    reason = f"no data for {STALLED_SECONDS:g} s"
                if self.begin is None:
                    raise InputError(f"source {self.source} cannot be opened ({reason}): check its address") from error
            if self.begin is None:
                raise InputError(f"source {self.source} has no frames: check its address")
            at = now()
            if self.held is not None:
                first, newest = self.held
                lost += first - (since or first)
                if newest - first >= self.reconnect_seconds:
                    lost, pause = 0.0, PAUSES[0]
                since = at
                if (left := self.reconnect_seconds - lost) > 0:
                    logger.warning(
                        "%s: connection dropped (%s); reconnecting for up to %.3g s", self.source, reason, left
                    )
            if since is not None and lost + at - since >= self.reconnect_seconds:
                break
            self.stop.wait(pause)
            pause = min(2 * pause, longest)
        logger.info("%s has ended", self.source)

    def _is_complete(self) -> bool:
        """Whether a recording was read to its stated end. If the server does not report its size, FFmpeg reports an
        error at the end."""
        length = self.sampler.end()
        return bool(self.claimed) and not shortfall(self.claimed, length, length - (self.offset or 0.0), 0.0)

    def _read_once(self) -> None:
        """Read one connection to its end. The first frame of a live connection is placed at its wall-clock time. A
        recording keeps its timeline across connections, and frames that were already read are skipped."""
        self.held = None
        webcam = self.source.startswith("/dev/")
        options = {} if webcam else dict(STREAM)
        options["fpsprobesize"] = "0"  # otherwise opening waits for 20 frames to measure a frame rate that is not used
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
                    if stampless == 2:  # FFmpeg has no timestamp for the first frame of an RTSP camera
                        logger.warning("%s: skipping frames without timestamps", name)
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
        """Queue a clip. Waits for room unless the consumer has stopped."""
        while True:
            try:
                return self.clips.put(clip, timeout=0.2)
            except queue.Full:
                if self.stop.is_set():
                    return None
