"""One model on one device, as the server sees it: its sessions, the room for more, and its process, which is started
again when it is lost."""

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..common.errors import InputError
from .model_spec import ModelSpec
from .process_handle import SECONDS_TO_END, ProcessHandle
from .record_copy import RecordCopy

logger = logging.getLogger(__name__)

RESTARTS, RESTART_SECONDS = 3, 600.0
"""A process that is lost more often than that within this time is not started again."""
PAUSE = 1.0
"""Seconds before a start, in which the memory of the lost process becomes free."""
START_SECONDS = 1800.0
"""A model that loads again, or a pool that is made, takes less than this. The first loading may be a download."""


class Listener(Protocol):
    """A response, as a worker sees it."""

    def token(self, token: int, slot: int, time: float) -> None: ...

    def begun(self, slots: int) -> None: ...

    def done(self, how: str, figures: dict | None, recorded: bool) -> None: ...


class Device:
    """Divides the memory of one device between its models."""

    def __init__(self):
        self.without_pool: set[Worker] = set()
        """Those that start and have not made their pools yet."""
        self.lock = threading.Lock()
        """Held while one of them makes its pool."""


class Worker:
    """One model on one device."""

    def __init__(self, spec: ModelSpec, device: Device):
        self.spec, self.device = spec, device
        self.lost, self.given_up, self.closing = False, False, False
        """No process runs now; none is started again; the server ends."""
        self.batch_slots = self.blocks = 0
        """How many sessions, and how many blocks of their keys and values, still have room."""
        self.listeners: dict[str, tuple[Listener, int]] = {}
        """By the session's key, with the blocks that it takes."""
        self.copies: dict[str, RecordCopy] = {}
        """By the session's key; only the receiving thread uses them."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when room has become free, or the process is lost."""
        self.losses: list[float] = []
        self.device.without_pool.add(self)
        self.newest = self.process = ProcessHandle.start(spec)
        """The process that was started last, and the one to which messages go."""
        self.receiver: threading.Thread | None = None

    def make_pool(self) -> tuple[int, int]:
        """Let the loaded model make its pool, in its share of the memory that is free on its device. Returns the room
        that it has: sessions and blocks. Raises InputError."""
        with self.device.lock:
            with contextlib.suppress(OSError):  # the process has ended, which `expect` reports
                self.newest.connection.send(len(self.device.without_pool))
            _, batch_slots, blocks = self.newest.expect("ready", START_SECONDS)
            self.device.without_pool.discard(self)
        return batch_slots, blocks

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver messages in `loop` from now on."""
        self.receiver = threading.Thread(target=self._run, args=(loop,), name=f"model {self.spec.name}", daemon=True)
        self.receiver.start()

    def has_room(self, blocks: int) -> bool:
        return not self.lost and self.batch_slots > 0 and self.blocks >= blocks

    def reserve(self, blocks: int) -> None:
        self.batch_slots, self.blocks = self.batch_slots - 1, self.blocks - blocks

    def free(self, blocks: int) -> None:
        self.batch_slots, self.blocks = self.batch_slots + 1, self.blocks + blocks
        self.on_change()

    def open(self, key: str, listener: Listener, blocks: int, *what) -> None:
        """Open a session, for which `reserve` was called."""
        self.listeners[key] = listener, blocks
        if self.lost:
            self._handle(("done", key, "failed", None, False))
        self.process.send("open", key, *what)

    def send(self, *message) -> None:
        """Send a message, in another thread."""
        self.process.send(*message)

    def send_clip(self, *clip) -> None:
        """Send a clip, in this thread if that needs no wait."""
        self.process.send_clip(*clip)

    def close(self) -> None:
        """End the process. Its sessions end with their records."""
        self.closing = True
        self.process.end()
        if self.lost and self.newest.process is not None:  # it may be starting again
            self.newest.process.kill()

    def join(self) -> None:
        """Wait until the process has ended, and kill it if it does not; then its records are written here."""
        process = self.newest.process  # another thread may start it again
        if process is not None:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
        if self.receiver is not None:
            self.receiver.join(SECONDS_TO_END)

    # In a thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver what the process says until it ends or hangs, and start it again."""

        def deliver(*message) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._handle, message)

        name = self.spec.name
        while True:
            try:
                for message in self.newest.messages():
                    try:
                        deliver(*message)  # first: a viewer need not wait for the copy of the record
                    finally:
                        self._copy(*message)
            except Exception:
                logger.exception("model %s: what it says could not be handled", name)
            self.newest.kill()  # before the records are written: one that hangs could go on
            if not self.closing:
                logger.error("model %s is lost", name)
            reason = f"failed: the process of model {name} was lost"
            recorded = {key for key, copy in self.copies.items() if copy.write(reason)}
            self.copies.clear()
            deliver("lost", recorded)
            if (room := self._restart()) is None:
                return deliver("given_up")
            deliver("ready", self.newest, *room)

    def _copy(self, kind: str, *what) -> None:
        """Keep the copies of records up to date."""
        if kind == "opened":
            key, copy = what
            self.copies[key] = copy
        elif kind == "step":
            for key, progress in what[0]:
                self.copies[key].add(progress)
        else:
            self.copies.pop(what[0], None)

    def _restart(self) -> tuple[int, int] | None:
        """Start the process again. Returns the room that it has, or None if the server ends or this is in vain."""
        name = self.spec.name
        self.device.without_pool.add(self)
        while not self.closing:
            at = time.monotonic()
            self.losses = [*(loss for loss in self.losses if at - loss < RESTART_SECONDS), at]
            if len(self.losses) > RESTARTS:
                logger.error(
                    "model %s was lost %d times within %.0f minutes, and is not started again: restart the server",
                    name,
                    len(self.losses),
                    RESTART_SECONDS / 60,
                )
                break
            logger.warning("model %s is started again", name)
            time.sleep(PAUSE)
            if self.closing:
                break
            try:
                self.newest = ProcessHandle.start(self.spec)
                if not self.closing:  # otherwise since then, so that `close` has not killed this process
                    self.newest.expect("loaded", START_SECONDS)
                    return self.make_pool()
            except (InputError, OSError) as error:
                if not self.closing:
                    logger.error("model %s did not start again: %s", name, error)
            except Exception:
                logger.exception("model %s did not start again", name)
            self.newest.kill()
        self.device.without_pool.discard(self)
        return None

    # In the event loop

    def _handle(self, message: tuple) -> None:
        kind, *what = message
        if kind == "step":
            for key, progress in what[0]:
                listener, _ = self.listeners[key]
                listener.begun(progress.slots)
                for token in progress.tokens:
                    listener.token(*token)
        elif kind == "done":
            key, *how = what
            listener, blocks = self.listeners.pop(key)
            listener.done(*how)
            self.free(blocks)
        elif kind == "lost":
            (recorded,) = what
            self.lost = True
            for key in [*self.listeners]:
                self._handle(("done", key, "lost", None, key in recorded))
        elif kind == "ready":
            logger.warning("model %s runs again", self.spec.name)
            self.lost, (self.process, self.batch_slots, self.blocks) = False, what
            self.on_change()
        elif kind == "given_up":
            self.given_up = True
            self.on_change()


def start_workers(specs: Sequence[ModelSpec]) -> list[Worker]:
    """Load all models at once, then divide the memory of each device between its models. Raises InputError."""
    workers: list[Worker] = []
    devices: collections.defaultdict[str, Device] = collections.defaultdict(Device)
    try:
        for spec in specs:
            workers.append(Worker(spec, devices[spec.device]))
        for worker in workers:
            worker.newest.expect("loaded")
        for worker in workers:
            worker.batch_slots, worker.blocks = worker.make_pool()
    except BaseException:
        for worker in workers:
            worker.newest.kill()
        raise
    return workers
