"""Clips of a source, read in a thread of their own and made ready for a model. Knows nothing of sessions and words."""

import collections
import logging
import queue
import threading
from collections.abc import Callable, Iterator

from torch import Tensor

from ..common.clock import now
from ..model.prompts import clip_pixels
from ..video.sources import Clip

logger = logging.getLogger(__name__)

ROOM = 256
"""Clips that wait at most; then their source has to wait."""


class Intake:
    """Reads a source from `start` to `stop`. What has come is in `waiting`, from which `take` takes."""

    def __init__(
        self,
        clips: Callable[[], Iterator[Clip]],
        processor,
        skip: bool = False,
        pace: float | None = None,
        count: int | None = None,
    ):
        """`clips` opens the source. `skip`: only the newest clip waits. `pace`: wall-clock seconds between its clips,
        and `count` of them, where that is known."""
        self.clips, self.processor, self.skip = clips, processor, skip
        self.pace, self.count = pace, count
        self.waiting: collections.deque[tuple[Clip, Tensor | None]] = collections.deque()
        """With their pixels where these are made: those of a clip that finds others waiting may never be wanted."""
        self.completed: list[float] = []
        """Of each clip of the source that has come, the wall-clock time at which it was complete."""
        self.before = 0
        """Clips that came before `begin`, and are left out."""
        self.broken = 0
        self.over = False
        """The source has ended, and all of it has come."""
        self.fault: Exception | None = None
        """Why it ended, where that was no plain end."""
        # Of all queues this one may be put into by a signal handler while its thread is in `get`.
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._change, self._begun, self._stopped, self._full = threading.Condition(), True, False, False
        self._thread = threading.Thread(target=self._read, name="intake", daemon=True)

    def start(self, begun: bool = True) -> None:
        """Until `begin`, where it has not `begun`, only the newest clip of what is no film waits."""
        self._begun = begun
        self._thread.start()

    def begin(self) -> None:
        """From here on clips count."""
        with self._change:
            self._begun = True
            self.before = self.waiting[0][0].index if self.waiting else len(self.completed)

    def stop(self) -> None:
        """Read no more. A source that gives nothing is left to itself."""
        with self._change:
            self._stopped = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(2)

    def wake(self) -> None:
        """End a `wait`. May be called from a signal handler."""
        self._news.put(None)

    def wait(self) -> None:
        """Until there is something new, or `wake` is called. May also return without."""
        if not self.over:
            self._news.get()

    def peek(self) -> Clip | None:
        """The clip that `take` would take."""
        with self._change:
            return self.waiting[0][0] if self.waiting else None

    def take(self) -> tuple[Clip, Tensor]:
        """The clip that has waited longest, and its pixels (patches, pixels of a patch) float32."""
        with self._change:
            clip, pixels = self.waiting.popleft()
            self._change.notify()
        return clip, self._pixels(clip) if pixels is None else pixels

    def due(self) -> int:
        """Clips that the source has completed, those that it could not be read for yet among them."""
        come = len(self.completed)
        if self.over or not come or self.pace is None:
            return come
        passed = int((now() - self.completed[0]) / self.pace) + 1
        return max(come, min(passed, self.count or passed))

    def add(self, clip: Clip) -> None:
        """A clip has come. Waits for room, unless it is to stop."""
        pixels = None if self.waiting else self._pixels(clip)
        with self._change:
            newest_only = self.skip or not (self._begun or clip.film)
            if newest_only:
                self.waiting.clear()
            while len(self.waiting) >= ROOM and not self._stopped:
                if self._begun and self.pace is None and not (clip.film or self._full):
                    self._full = True
                    logger.warning("%d clips wait, and there is room for no more: the source has to wait", ROOM)
                self._change.wait()
            self.waiting.append((clip, pixels))
            self.completed.append(clip.completed)
            self.broken = clip.broken
        self._tell()

    def end(self, fault: Exception | None = None) -> None:
        """No more clips come."""
        self.fault, self.over = fault, True
        self._tell()

    def _tell(self) -> None:
        if self._news.empty():  # else whoever waits is told already, and has not looked yet
            self.wake()

    def _pixels(self, clip: Clip) -> Tensor:
        return clip_pixels(self.processor, clip.frames)[0][0]

    def _read(self) -> None:
        try:
            for clip in self.clips():
                self.add(clip)
                if self._stopped:
                    return
        except Exception as error:  # told where the clips are taken, for no one looks at a thread
            self.end(error)
            return
        self.end()
