"""Clips as they happen: a file at real time, a webcam, an RTSP or HTTP stream, or a synthetic scene.

The same clips as video.py's, by the same rule, each with the wall-clock time at which it was complete. Knows nothing
about models or text.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch

from .clock import now
from .errors import InputError
from .redact import Redacting, redacted
from .video import FRAMES_PER_CLIP, SLACK, PixelBudget, Video, read_video, resize_frame
from .video_readers import upright

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())

FRAMES_TO_BUDGET_FOR = 60  # a live source does not say how long it will be: shared as in 30 s at 2 fps
CLIPS_WAITING = 256  # read ahead of a slow consumer before the source itself has to wait
STALLED_SECONDS = 5.0  # without a byte before a connection counts as dropped
PAUSES = 0.2, 5.0  # seconds before a stream that broke off is tried again: at first, doubled each time, and at most
PLAYLISTS = ("hls", "dash")  # formats whose size is not that of the film


@dataclass(frozen=True)
class Clip:
    """Two sampled frames, which is one second at 2 fps."""

    index: int
    """Counts from 0."""
    frames: torch.Tensor
    """(2, 3, H, W) uint8, resized."""
    timestamps: np.ndarray
    """(2,) float64 seconds from the source's first frame: when each frame is first shown."""
    completed: float
    """Wall-clock time, as of `clock.now`, at which its last frame was there."""
    last: bool = False
    """No clip comes after it. A stream seldom knows that of a clip: it may end without having said so."""
    broken: int = 0
    """Frames of the source so far that could not be decoded, and are left out."""
    film: bool = False
    """Of a stream that is a film, whose size or length is known: it comes as it is asked for, and can wait."""


def file_clips(path: str | Path, *, speed: float = 1.0, **options) -> Iterator[Clip]:
    """The clips of `path`, each no earlier than a viewer at `speed` times real time would have seen it.

    `options` are those of read_video. A consumer that is late gets a clip at once, with the time at which it was due.
    Raises InputError.
    """
    yield from paced_clips(read_video(path, **options), speed)


def paced_clips(video: Video, speed: float = 1.0) -> Iterator[Clip]:
    """As `file_clips`, of a video that was read before."""
    if not speed > 0:
        raise InputError(f"speed {speed} must be above 0")
    begin = now()
    for index in range(video.clips):
        rows = slice(index * FRAMES_PER_CLIP, (index + 1) * FRAMES_PER_CLIP)
        due = begin + (rows.stop - 1) / video.fps / speed
        time.sleep(max(0.0, due - now()))
        yield Clip(index, video.frames[rows], video.timestamps[rows], due, last=index == video.clips - 1)


def synthetic_clips(
    clips: int, *, speed: float = 1.0, fps: float = 2.0, size: tuple[int, int] = (280, 504)
) -> Iterator[Clip]:
    """A white square that crosses a dark ground once in ten seconds, without any file; `size` is (height, width)."""
    if not (speed > 0 and fps > 0):
        raise InputError(f"speed {speed} and fps {fps} must be above 0")
    height, width = size
    side = height // 4
    begin = now()
    for index in range(clips):
        times = (index * FRAMES_PER_CLIP + np.arange(FRAMES_PER_CLIP)) / fps
        frames = torch.full((FRAMES_PER_CLIP, 3, height, width), 32, dtype=torch.uint8)
        for frame, moment in zip(frames, times, strict=True):
            left = int(moment % 10 / 10 * (width - side))
            frame[:, side : 2 * side, left : left + side] = 255
        due = begin + float(times[-1]) / speed
        time.sleep(max(0.0, due - now()))
        yield Clip(index, frames, times, due, last=index == clips - 1)


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
    So it does in place of a frame that cannot be decoded. A film, whose size or length its server tells, is over at its
    end. Frames are sized once, by the first. Raises InputError where the source cannot be opened at all; ends when it
    cannot be opened again.
    """
    reader = _StreamReader(source, _Sampler(fps, budget or PixelBudget()), reconnect_seconds, max_clips)
    thread = threading.Thread(target=reader.run, name=f"frames of {redacted(source)}", daemon=True)
    thread.start()
    try:
        while (clip := reader.clips.get()) is not None:
            yield clip
    finally:
        reader.stop.set()
    if reader.fault is not None:
        raise reader.fault


class _Sampler:
    """Frames with their times in, clips out."""

    def __init__(self, fps: float, budget: PixelBudget):
        self.fps, self.budget = fps, budget
        self.size: tuple[int, int] | None = None
        self.shown: av.VideoFrame | None = None
        self.times: list[float] = []  # of the frames received, the last two
        self.targets = 0  # met so far
        self.waiting: list[tuple[torch.Tensor, float]] = []
        self.broken = 0

    def add(self, moment: float, frame: av.VideoFrame) -> Iterator[Clip]:
        """Take the frame shown from `moment` on; yield the clips that are complete now that it is known."""
        if self.times and moment <= self.times[-1]:
            return
        yield from self._meet(moment - SLACK)
        self.shown, self.times = frame, [*self.times[-1:], moment]

    def finish(self) -> Iterator[Clip]:
        """Yield what is left: the last frame stays for as long as the one before it, and fills its clip."""
        if self.shown is None:
            return
        gap = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        yield from self._meet(self.times[-1] + gap - SLACK)
        if self.waiting:
            yield from self._put(*self.waiting[-1])

    def _meet(self, until: float) -> Iterator[Clip]:
        """Put the frame on screen at each target time before `until`."""
        picture = None
        while self.shown is not None and self.targets / self.fps < until:
            if picture is None:
                picture = self._resized(self.shown)
            self.targets += 1
            yield from self._put(picture, self.times[-1])

    def _put(self, picture: torch.Tensor, moment: float) -> Iterator[Clip]:
        self.waiting.append((picture, moment))
        if len(self.waiting) == FRAMES_PER_CLIP:
            pictures, moments = zip(*self.waiting, strict=True)
            self.waiting = []
            index = -(-self.targets // FRAMES_PER_CLIP) - 1
            yield Clip(index, torch.stack(pictures), np.array(moments, np.float64), now(), broken=self.broken)

    def _resized(self, frame: av.VideoFrame) -> torch.Tensor:
        image = upright(frame)
        if self.size is None:
            self.size = self.budget.size(*image.shape[:2], FRAMES_TO_BUDGET_FOR)
        return resize_frame(image, self.size)


class _StreamReader:
    """Reads a stream in its own thread, so that a slow consumer never holds up the source."""

    def __init__(self, source: str, sampler: _Sampler, reconnect_seconds: float, max_clips: int | None):
        self.source, self.sampler = source, sampler
        self.reconnect_seconds, self.max_clips = reconnect_seconds, max_clips
        self.clips: queue.Queue[Clip | None] = queue.Queue(CLIPS_WAITING)
        self.stop = threading.Event()
        self.fault: Exception | None = None
        self.begin: float | None = None  # wall-clock time of the first frame
        self.held: tuple[float, float] | None = None
        """When the first and the newest frame of the connection came."""
        self.film = False
        self.count = 0

    def run(self) -> None:
        try:
            self._read_until_gone()
            if not self.stop.is_set():
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
                reason = error.strerror or type(error).__name__
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

    def _read_once(self) -> None:
        """Read one connection to its end. Its own clock starts where the wall clock stands at its first frame."""
        webcam = self.source.startswith("/dev/")
        options = {"fpsprobesize": "0"}  # else it opens 20 frames late, to learn a frame rate that nobody asks for
        if self.source.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        with av.open(
            self.source,
            format="v4l2" if webcam else None,
            options=options,
            timeout=(STALLED_SECONDS, STALLED_SECONDS),
            metadata_errors="replace",
        ) as container:
            if not container.streams.video:
                raise InputError(f"source {self.source} has no video stream: check its address")
            self.film = bool(container.duration or (container.size > 0 and container.format.name not in PLAYLISTS))
            offset = None
            for frame in self._frames(container):
                if self.stop.is_set():
                    return
                if frame.time is None:
                    continue
                came = now()
                self.held = (self.held or (came,))[0], came
                if offset is None:
                    self.begin = self.begin or came
                    offset = came - self.begin - frame.time
                self._hand_over(self.sampler.add(frame.time + offset, frame))

    def _frames(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """What decodes of a connection: one broken frame is no reason to give it up."""
        for packet in container.demux(video=0):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.sampler.broken += 1
                logger.debug("%s: a broken frame", self.source)
                continue
            yield from frames

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
