"""This process's side of a model process: starts it, sends without waiting, hands what it says to the event loop, and
starts it again if it is lost."""

import asyncio
import collections
import contextlib
import logging
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Protocol

from ..common.errors import InputError
from ..sessions.perception_client import group_signals_ignored
from .model_process import ModelSpec, run_model, run_process
from .pixel_buffers import PixelBuffers
from .record_copy import RecordCopy

logger = logging.getLogger(__name__)

SECONDS_TO_END = 5.0
RESTARTS, RESTART_SECONDS = 3, 600.0
"""A process that is lost more often than that within this time is not started again."""
PAUSE = 1.0
"""Seconds before a start, in which the memory of the lost process becomes free."""


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

    def __init__(self, spec: ModelSpec, threads: bool = False, device: Device | None = None):
        """`threads`: run the model in a thread of this process, for tests; it is not started again. `device`: given if
        workers share one."""
        self.spec, self.threads, self.device = spec, threads, device or Device()
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
        self.outbox: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self.process: SpawnProcess | None = None
        self.device.without_pool.add(self)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        pixels = PixelBuffers(self.spec.clip_bytes)
        connection, theirs = context.Pipe()
        if self.threads:
            self.connection, self.pixels = connection, pixels
            threading.Thread(target=run_model, args=(theirs, pixels, self.spec), daemon=True).start()
            return
        arguments = theirs, pixels, self.spec, os.getpid()
        process = context.Process(target=run_process, args=arguments, daemon=True)
        try:
            with group_signals_ignored():
                process.start()
        except BaseException:
            connection.close()
            raise
        finally:
            theirs.close()
            pixels.handed_over()
        self.connection, self.pixels, self.process = connection, pixels, process

    def expect(self, kind: str) -> tuple:
        """The next message while the model starts. Raises InputError if it cannot be served."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            message = ("refused", f"the process of model {self.spec.name} ended while it started: see the lines above")
        if message[0] != kind:
            raise InputError(message[1])
        return message

    def make_pool(self) -> tuple[int, int]:
        """Let the loaded model make its pool, in its share of the memory that is free on its device. Returns the room
        that it has: sessions and blocks. Raises InputError."""
        with self.device.lock:
            with contextlib.suppress(OSError):  # the process has ended, which `expect` reports
                self.connection.send(len(self.device.without_pool))
            _, batch_slots, blocks = self.expect("ready")
            self.device.without_pool.discard(self)
        return batch_slots, blocks

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver messages in `loop` from now on."""
        threading.Thread(target=self._run, args=(loop,), name=f"model {self.spec.name}", daemon=True).start()

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
        self.send("open", key, *what)

    def send(self, *message) -> None:
        """Send a message, in another thread."""
        self.outbox.put(message)

    def close(self) -> None:
        """End the process. Its sessions end with their records."""
        self.closing = True
        self.outbox.put(None)
        if self.lost and self.process is not None:  # it may be starting again
            self.process.kill()

    def join(self) -> None:
        process = self.process  # another thread may start it again
        if process is not None:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()

    # In threads

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver what the process says until it ends, and start it again when it is lost. Linux kills a process when
        the thread that has started it ends."""

        def deliver(*message) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._handle, message)

        outbox = self.outbox
        while True:
            try:
                sending = self.connection, self.pixels, self.process, outbox
                threading.Thread(target=self._send_all, args=sending, daemon=True).start()
                while True:
                    message = self.connection.recv()
                    self._copy(*message)
                    deliver(*message)
            except (EOFError, OSError):  # the process has ended
                pass
            except Exception:
                logger.exception("model %s: what it says could not be handled", self.spec.name)
                self._kill()
            if not self.closing:
                logger.error("model %s is lost", self.spec.name)
            reason = f"failed: the process of model {self.spec.name} was lost"
            recorded = {key for key, copy in self.copies.items() if copy.write(reason)}
            self.copies.clear()
            outbox.put(None)
            deliver("lost", recorded)
            if (room := self._restart()) is None:
                return deliver("given_up")
            outbox = queue.SimpleQueue()
            deliver("ready", outbox, *room)

    def _send_all(
        self, connection: Connection, pixels: PixelBuffers, process: SpawnProcess | None, outbox: queue.SimpleQueue
    ) -> None:
        """Send the messages in `outbox` until None; the pixels of clips through shared memory."""
        try:
            while True:
                message = outbox.get()
                if message is not None and message[0] == "clip":
                    kind, key, clip, *rest = message
                    message = kind, key, pixels.write(clip.pixels), tuple(clip.pixels.shape), clip.hash, *rest
                connection.send(message)
                if message is None:
                    return
        except (EOFError, OSError):
            pass  # the process has ended, which the receiver notices
        except Exception:
            if connection.closed:  # `_kill` has closed it, under `send` with a TypeError
                return
            logger.exception("model %s: a message could not be sent", self.spec.name)
            if process is not None:
                process.kill()

    def _copy(self, kind: str, *what) -> None:
        """Keep the copies of records up to date."""
        if kind == "opened":
            key, copy = what
            self.copies[key] = copy
        elif kind == "step":
            tokens, news = what
            for key, progress in news:
                self.copies[key].add(progress)
            for key, *token in tokens:
                self.copies[key].tokens.append(tuple(token))
        else:
            self.copies.pop(what[0], None)

    def _restart(self) -> tuple[int, int] | None:
        """Start the process again. Returns the room that it has, or None if the server ends or this is in vain."""
        name = self.spec.name
        if not self.threads:
            self.device.without_pool.add(self)
        while not (self.closing or self.threads):
            self._kill()
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
                self._start()
                if self.closing:  # since then, so that `close` has not killed this process
                    self._kill()
                    break
                self.expect("loaded")
                return self.make_pool()
            except (InputError, OSError) as error:
                if not self.closing:
                    logger.error("model %s did not start again: %s", name, error)
            except Exception:
                logger.exception("model %s did not start again", name)
        self.device.without_pool.discard(self)
        return None

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.connection.close()  # last: a message may be on its way

    # In the event loop

    def _handle(self, message: tuple) -> None:
        kind, *what = message
        if kind == "step":
            tokens, news = what
            for key, progress in news:
                self.listeners[key][0].begun(progress.slots)
            for key, *token in tokens:
                self.listeners[key][0].token(*token)
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
            self.lost, (self.outbox, self.batch_slots, self.blocks) = False, what
            self.on_change()
        elif kind == "given_up":
            self.given_up = True
            self.on_change()


def start_workers(specs: Sequence[ModelSpec], threads: bool = False) -> list[Worker]:
    """Load all models at once, then divide the memory of each device between its models. Raises InputError."""
    workers: list[Worker] = []
    devices: collections.defaultdict[str, Device] = collections.defaultdict(Device)
    try:
        for spec in specs:
            workers.append(Worker(spec, threads, devices[spec.device]))
            if threads:  # transformers does not load two models at once in one process
                workers[-1].expect("loaded")
        for worker in () if threads else workers:
            worker.expect("loaded")
        for worker in workers:
            worker.batch_slots, worker.blocks = worker.make_pool()
    except BaseException:
        for worker in workers:
            worker.connection.close()
            if worker.process is not None:
                worker.process.kill()
        raise
    return workers
