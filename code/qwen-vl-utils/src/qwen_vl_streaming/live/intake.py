"""Reads the clips of a source in a thread, and prepares them for a model. Knows nothing of sessions and tokens."""

import collections
import logging
import queue
import threading
from dataclasses import replace

import torch
from torch import Tensor

from ..common.clock import now
from ..common.errors import InputError
from ..common.numbers import LARGEST, check_count, check_number
from ..model.prompts import clip_pixels
from ..video.frames import FRAMES_PER_CLIP
from ..video.opening import Source
from ..video.pixel_budget import SIDE_FACTOR
from ..video.sources import Clip

logger = logging.getLogger(__name__)

ROOM = 256
"""Clips that may wait; then the source is not read until one is taken."""

CLOSING_SECONDS = 4.0
"""Time to wait for the end of the thread: for a clip of a second, and for the source to be closed."""


class Intake:
    """Reads a source from `start` to `stop`. Clips that have come are in `waiting`, from which `take` takes."""

    def __init__(self, source: Source, processor, skip: bool = False, name: str = "the source"):
        """Args:
        processor: Prepares the clips' pixels.
        skip: Only the newest clip waits.
        name: Of the source, in messages.
        """
        self.source, self.processor, self.skip, self.name = source, processor, skip, name
        self.waiting: collections.deque[tuple[Clip, Tensor | None]] = collections.deque()
        """Clips with their pixels, or None for a clip that came while others waited: it may be skipped."""
        self.completed: list[float] = []
        """When each clip of the source was complete, wall-clock time."""
        self.before = 0
        """Clips that came before `begin`, which are not counted as skipped."""
        self.broken = 0
        self._newest = -1
        """The index of the newest clip that has come."""
        self.over = False
        """The source has ended, and all its clips have come."""
        self.fault: Exception | None = None
        """The error with which the source ended, if there was one."""
        self.wrong = False
        """The newest clip was refused."""
        # A SimpleQueue, because a signal handler may put into it while its own thread is in `get`.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._change, self._begun, self._stopped, self._full = threading.Condition(), True, False, False
        self._thread = threading.Thread(target=self._read, name="intake", daemon=True)

    def start(self) -> None:
        """Start reading. Only the newest clip of a live source waits until `begin` is called."""
        self._begun = False
        self._thread.start()

    def begin(self) -> None:
        """Clips count from here on. Starts reading, unless `start` was called."""
        with self._change:
            self._begun = True
            self.before = self.waiting[0][0].index if self.waiting else len(self.completed)
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """Stop reading, and wait until the source is closed, which is once its next clip has come. A source that is
        blocked in a read is left behind in its daemon thread."""
        with self._change:
            first, self._stopped = not self._stopped, True
            self._change.notify()
        if first and self._thread.is_alive():
            self._thread.join(CLOSING_SECONDS)

    def wake(self) -> None:
        """End a `wait`. Can be called from a signal handler."""
        self._news.put(None)

    def wait(self) -> None:
        """Block until there is news or `wake` is called. May return early."""
        if not self.over:
            self._news.get()

    def measure(self) -> tuple[tuple[int, int], float]:
        """The (height, width) of the frames and the seconds of a clip. Of a source that does not know its size, reading
        is started, and the first clip has it, which stays here. Raises InputError if none comes."""
        if self.source.size is not None:
            return self.source.size, self.source.seconds_per_clip
        self.start()
        while not (self.waiting or self.over):
            self.wait()
        with self._change:
            if not self.waiting:
                raise self.no_clip()
            clip = self.waiting[0][0]
        height, width = clip.frames.shape[-2:]
        return (height, width), clip.seconds or self.source.seconds_per_clip

    @property
    def lost(self) -> bool:
        """The source has ended because its connection was lost or it cannot be read on. Other faults are errors in the
        source itself."""
        unreadable = self.source.live and isinstance(self.fault, InputError) and not self.wrong
        return isinstance(self.fault, OSError) or unreadable

    @property
    def why(self) -> str:
        """The reason why the source has ended, in brackets; empty for its normal end."""
        kind = "" if isinstance(self.fault, OSError | InputError) else f"{type(self.fault).__name__}: "
        return f" ({kind}{self.fault})" if self.fault else ""

    def no_clip(self) -> Exception:
        """The error for a source that has ended without a clip."""
        if self.fault and not isinstance(self.fault, OSError):
            return self.fault
        return InputError(f"{self.name} gave no clip{self.why}: check the source, or give another one")

    def take(self) -> tuple[Clip, Tensor]:
        """The clip that has waited longest, and its pixels (patches, pixels of a patch) float32."""
        with self._change:
            clip, pixels = self.waiting.popleft()
            self._change.notify()
        return clip, self._pixels(clip) if pixels is None else pixels

    def due(self) -> int:
        """Clips that the source has completed, including those that were not read because too many wait."""
        come = len(self.completed)
        pace, count = self.source.pace, self.source.count
        if self.over or not come or pace is None:
            return come
        passed = int((now() - self.completed[0]) / pace) + 1
        return max(come, min(passed, count or passed))

    def add(self, clip: Clip) -> None:
        """Add a clip that has come. Blocks while ROOM clips wait, until `stop`. Raises InputError for frames of a wrong
        shape or type, and for a clip whose index is not above that of the clip before."""
        self._check(clip)
        # The pixels may be computed later, and the source may fill the same memory again for its next clip.
        clip = replace(clip, frames=clip.frames.clone())
        pixels = None if self.waiting else self._pixels(clip)
        with self._change:
            live = self.source.live and not clip.film
            newest_only = self.skip or (live and not self._begun)
            if newest_only:
                self.waiting.clear()
            while len(self.waiting) >= ROOM and not self._stopped:
                if self._begun and live and not self._full:
                    self._full = True
                    logger.warning("%d clips are waiting, the maximum: the source is not read until one is taken", ROOM)
                self._change.wait()
            self.waiting.append((clip, pixels))
            self.completed.append(clip.completed)
            self.broken = clip.broken
        self._notify()

    def end(self, fault: Exception | None = None) -> None:
        """No more clips come."""
        self.fault, self.over = fault, True
        self._notify()

    def _notify(self) -> None:
        if self._news.empty():  # otherwise there is news already that nobody has looked at
            self.wake()

    def _check(self, clip: object) -> None:
        if not isinstance(clip, Clip):
            raise InputError(f"{self.name} gave a {type(clip).__name__}: give a Clip, as help(Source) shows")
        index, frames, before = clip.index, clip.frames, self._newest
        after = f", after {before}," if before >= 0 else ""
        check_count(f"{self.name} gave a Clip whose index{after}", index, before + 1)
        check_number(f"clip {index + 1} of {self.name}: completed", clip.completed, -LARGEST)
        check_count(f"clip {index + 1} of {self.name}: broken", clip.broken, 0)
        if clip.seconds is not None:
            check_number(f"clip {index + 1} of {self.name}: seconds", clip.seconds)
        self._newest = index
        shape, kind = tuple(getattr(frames, "shape", ())), getattr(frames, "dtype", None)
        right = isinstance(frames, Tensor) and kind == torch.uint8 and shape[:-2] == (FRAMES_PER_CLIP, 3)
        if not right or any(side < 1 or side % SIDE_FACTOR for side in shape[-2:]):
            raise InputError(
                f"clip {index + 1} of {self.name} is a {type(frames).__name__} of shape {shape} and type {kind}: give "
                f"a torch.uint8 tensor of shape ({FRAMES_PER_CLIP}, 3, H, W), two RGB frames with values from 0 to 255 "
                f"and H and W divisible by {SIDE_FACTOR}"
            )

    def _pixels(self, clip: Clip) -> Tensor:
        return clip_pixels(self.processor, clip.frames)[0][0]

    def _read(self) -> None:
        try:
            for clip in self.source.clips():
                self.wrong = True  # unless it passes
                self.add(clip)
                self.wrong = False
                if self._stopped:
                    return
        except Exception as error:  # reported where the clips are taken: nobody joins this thread
            self.end(error)
            return
        self.end()
