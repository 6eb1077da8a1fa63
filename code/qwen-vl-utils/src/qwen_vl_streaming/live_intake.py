"""Clips of a source, read and made ready for a model in a thread of their own. Knows nothing of sessions and words."""

import collections
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .live_source import Clip
from .prompts import clip_pixels

ROOM = 64
"""Clips that wait ready at most; then their source has to wait."""


@dataclass(frozen=True)
class Arrival:
    """A clip that is ready for the model."""

    clip: Clip
    pixels: Tensor
    """(patches, pixels of a patch) float32."""
    grid: tuple[int, int]


class Intake:
    """Reads a source from `start` to `stop`. `look` brings what has arrived into `waiting`, which is the caller's."""

    def __init__(self, clips: Callable[[], Iterator[Clip]], processor):
        """`clips` opens the source."""
        self.clips, self.processor = clips, processor
        self.waiting: collections.deque[Arrival] = collections.deque()
        self.completed: list[float] = []
        """Of each clip of the source that has arrived, the wall-clock time at which it was complete."""
        self.broken = 0
        self.over = False
        """The source has ended, and all of it has arrived."""
        self.fault: Exception | None = None
        """Why it ended, where that was no plain end."""
        # Of all queues this one may be put into by a signal handler while its thread is in `get`.
        self._news: queue.SimpleQueue[Arrival | Exception | bool] = queue.SimpleQueue()
        self._room, self._stopped = threading.Semaphore(ROOM), False
        self._thread = threading.Thread(target=self._read, name="intake", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Read no more. A source that gives nothing is left to itself."""
        self._stopped = True
        self._room.release()
        if self._thread.is_alive():
            self._thread.join(2)

    def wake(self) -> None:
        """End a `look` that waits. May be called from a signal handler."""
        self._news.put(False)

    def look(self, wait: bool = False) -> None:
        """`wait` until there is something new, or `wake` is called."""
        wait = wait and not self.over
        while wait or not self._news.empty():
            news, wait = self._news.get(), False
            if isinstance(news, Arrival):
                self.waiting.append(news)
                self.completed.append(news.clip.completed)
                self.broken = news.clip.broken
            elif isinstance(news, Exception):
                self.fault = news
            elif news:
                self.over = True

    def take(self) -> Arrival:
        """The clip that has waited longest."""
        self._room.release()
        return self.waiting.popleft()

    # The thread

    def _read(self) -> None:
        try:
            for clip in self.clips():
                self._room.acquire()
                if self._stopped:
                    return
                pixels, grid = clip_pixels(self.processor, clip.frames)
                self._news.put(Arrival(clip, pixels[0], grid))
        except Exception as error:  # told where the clips are taken, for no one looks at a thread
            self._news.put(error)
        finally:
            self._news.put(True)
