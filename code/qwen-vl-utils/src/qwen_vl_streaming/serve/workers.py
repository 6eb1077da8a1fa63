"""This process's side of a model process: starts it, sends without waiting, hands what it says to the event loop."""

import asyncio
import logging
import multiprocessing
import os
import pickle
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ..common.errors import InputError
from .model_process import ModelSpec, run_model, run_process

logger = logging.getLogger(__name__)

SECONDS_TO_END = 5.0


class Listener(Protocol):
    """A response, as a worker sees it."""

    def token(self, token: int, slot: int, time: float) -> None: ...

    def begun(self, slots: int) -> None: ...

    def done(self, how: str, figures: dict | None) -> None: ...


class Worker:
    """One model on one device."""

    def __init__(self, spec: ModelSpec, threads: bool = False):
        """`threads`: run the model in a thread of this process, for tests."""
        self.spec, self.lost, self.closing = spec, False, False
        self.batch_slots = self.blocks = 0
        """How many sessions, and how many blocks of their keys and values, still have room."""
        self.listeners: dict[str, tuple[Listener, int]] = {}
        """By the session's key, with the blocks that it takes."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when room has become free, or the process is lost."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = None
        if threads:
            threading.Thread(target=run_model, args=(theirs, spec), daemon=True).start()
        else:
            self.process = context.Process(target=run_process, args=(theirs, spec, os.getpid()), daemon=True)
            self.process.start()
            theirs.close()
        self.outbox: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()

    def expect(self, kind: str) -> tuple:
        """The next message while the model starts. Raises InputError if it cannot be served."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            message = ("refused", f"the process of model {self.spec.name} ended while it started: see the lines above")
        if message[0] != kind:
            raise InputError(message[1])
        return message

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver messages in `loop` from now on."""
        threading.Thread(target=self._receive_all, args=(loop,), daemon=True).start()
        threading.Thread(target=self._send_all, daemon=True).start()

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
            self._handle(("done", key, "failed", None))
        self.send("open", key, *what)

    def send(self, *message) -> None:
        """Send a message, in another thread."""
        self.outbox.put(message)

    def close(self) -> None:
        """End the process. Its sessions end with their records."""
        self.closing = True
        self.outbox.put(None)

    def join(self) -> None:
        if self.process is not None:
            self.process.join(SECONDS_TO_END)
            if self.process.is_alive():
                self.process.kill()

    def _send_all(self) -> None:
        try:
            while True:
                self.connection.send_bytes(pickle.dumps(self.outbox.get(), pickle.HIGHEST_PROTOCOL))
        except OSError:
            pass  # the process has ended, which the receiver reports

    def _receive_all(self, loop: asyncio.AbstractEventLoop) -> None:
        message: tuple = ()
        while message != ("lost",):
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                message = ("lost",)
            try:
                loop.call_soon_threadsafe(self._handle, message)
            except RuntimeError:  # the loop is closed: the server has ended
                return

    def _handle(self, message: tuple) -> None:
        kind, *what = message
        if kind == "step":
            tokens, begun = what
            for key, slots in begun:
                self.listeners[key][0].begun(slots)
            for key, *token in tokens:
                self.listeners[key][0].token(*token)
        elif kind == "done":
            key, *how = what
            listener, blocks = self.listeners.pop(key)
            listener.done(*how)
            self.free(blocks)
        else:
            if not self.closing:
                logger.error("model %s is lost", self.spec.name)
            self.lost = True
            for key in [*self.listeners]:
                self._handle(("done", key, "failed", None))
            self.on_change()


def start_workers(specs: Sequence[ModelSpec], threads: bool = False) -> list[Worker]:
    """Load all models at once, then divide the memory of each device between its models. Raises InputError."""
    workers: list[Worker] = []
    try:
        for spec in specs:
            workers.append(Worker(spec, threads))
            if threads:  # transformers does not load two models at once in one process
                workers[-1].expect("loaded")
        for worker in () if threads else workers:
            worker.expect("loaded")
        for index, worker in enumerate(workers):
            others = [other for other in workers[index:] if other.spec.device == worker.spec.device]
            worker.connection.send(len(others))
            _, worker.batch_slots, worker.blocks = worker.expect("ready")
    except BaseException:
        for worker in workers:
            worker.connection.close()
            if worker.process is not None:
                worker.process.kill()
        raise
    return workers
