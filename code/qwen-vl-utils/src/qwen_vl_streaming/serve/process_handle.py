"""The server's handle of one model process: starts it, sends without waiting, receives, and notices that it hangs."""

import contextlib
import logging
import multiprocessing
import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess

from ..common.errors import InputError
from ..sessions.perception_client import group_signals_ignored
from .frames import PreparedClip
from .model_loop import ALIVE
from .model_process import run_process
from .model_spec import ModelSpec
from .pixel_buffers import PixelBuffers

logger = logging.getLogger(__name__)

SECONDS_TO_END = 5.0
SILENT_SECONDS = 30
"""A process that says nothing for so long hangs."""
UNHASHED = 4
"""Clips that wait for their hashes, at most: a session whose hashes have not come holds up others when it ends."""


class ProcessHandle:
    """One model process, from its start to its end."""

    def __init__(self, name: str, connection, pixels: PixelBuffers, process: SpawnProcess | None):
        """`connection`: this end of a pipe, whose other end the process has."""
        self.name, self.connection, self.pixels, self.process = name, connection, pixels, process
        self.outbox: queue.Queue[tuple | None] = queue.Queue()
        self.unhashed: queue.Queue[PreparedClip | None] = queue.Queue(UNHASHED)
        """Clips that were sent."""
        self.hashing = threading.Thread(target=self._sender, args=(self._send_hashes,), daemon=True)
        self.sending, self.sending_clip = threading.Lock(), threading.Lock()
        """Held while a message is written to the pipe; from a clip's pixels to its place in `unhashed`."""

    @classmethod
    def start(cls, spec: ModelSpec) -> "ProcessHandle":
        """Start a process. Linux kills it when the thread that has started it ends."""
        context = multiprocessing.get_context("spawn")
        pixels = PixelBuffers(spec.clip_bytes, spec.dtype)
        connection, theirs = context.Pipe()
        process = context.Process(target=run_process, args=(theirs, pixels, spec, os.getpid()), daemon=True)
        try:
            with group_signals_ignored():
                process.start()
        except BaseException:
            connection.close()
            raise
        finally:
            theirs.close()
            pixels.handed_over()
        return cls(spec.name, connection, pixels, process)

    def expect(self, kind: str, seconds: float | None = None) -> tuple:
        """The next message while the model starts. Raises InputError if it cannot be served, or if none comes within
        `seconds`."""
        try:
            if not self.connection.poll(seconds):
                raise InputError(f"the process of model {self.name} has not started within {seconds:g} s")
            message = self.connection.recv()
        except (EOFError, OSError):
            message = ("refused", f"the process of model {self.name} ended while it started: see the lines above")
        if message[0] != kind:
            raise InputError(message[1])
        return message

    def send(self, *message) -> None:
        """Send a message, in another thread."""
        self.outbox.put(message)

    def send_clip(self, *clip) -> None:
        """Send a clip in this thread, whose processor has its pixels at hand; as `send` if that would have to wait for
        other messages, a buffer or hashes."""
        if self.sending_clip.acquire(blocking=False):
            try:
                if not self.outbox.unfinished_tasks and self.pixels.any_free and not self.unhashed.full():
                    return self._sender(self._send_clip, *clip)
            finally:
                self.sending_clip.release()
        self.send("clip", *clip)

    def end(self) -> None:
        """Let the process end its sessions with their records, and then itself."""
        self.outbox.put(None)

    def messages(self) -> Iterator[tuple]:
        """What the process says, until it has ended or hangs. From now on, messages are sent to it."""
        self.hashing.start()
        threading.Thread(target=self._sender, args=(self._send_all,), daemon=True).start()
        arrived = select.poll()
        arrived.register(self.connection, select.POLLIN)
        silent = 0
        # Seconds are counted one by one, so that those in which this process was stopped as well do not count.
        while silent < SILENT_SECONDS:
            if not arrived.poll(1000):
                silent += 1
                continue
            try:
                message = self.connection.recv()
            except (EOFError, OSError):  # the process has ended
                return
            silent = 0
            if message != ALIVE:
                yield message
        logger.error("model %s has said nothing for %d s: its process hangs and is killed", self.name, SILENT_SECONDS)

    def _send_all(self) -> None:
        """Send what is in the outbox until None, the pixels of clips through shared memory."""
        try:
            while (message := self.outbox.get()) is not None:
                if message[0] == "clip":
                    with self.sending_clip:
                        self._send_clip(*message[1:])
                else:
                    self._send(*message)
                self.outbox.task_done()
        finally:
            with self.sending_clip:  # after the hash of a clip that another thread is sending
                self._queue_hash(None)
        self.hashing.join()
        self.connection.send(None)

    def _send_clip(self, key: str, clip: PreparedClip, *what) -> None:
        number, shape = self.pixels.write(clip.halves)
        self._send("clip", key, number, shape, *what)
        self._queue_hash(clip)

    def _queue_hash(self, clip: PreparedClip | None) -> None:
        """Put `clip` in the queue, once there is room, if its thread still runs."""
        while self.hashing.is_alive():
            with contextlib.suppress(queue.Full):
                return self.unhashed.put(clip, timeout=1)

    def _send_hashes(self) -> None:
        """Send the hashes of the clips that were sent, in their order. Clips hardly ever wait for them: only the record
        needs them."""
        while (clip := self.unhashed.get()) is not None:
            self._send("hash", clip.hash)

    def _send(self, *message) -> None:
        with self.sending:
            self.connection.send(message)

    def _sender(self, send: Callable[..., None], *arguments) -> None:
        """Run `send` until the process has ended."""
        try:
            send(*arguments)
        except (EOFError, OSError):
            pass  # the process has ended, which the receiver notices
        except Exception:
            if self.connection.closed:  # `kill` has closed it, under `send` with a TypeError
                return
            logger.exception("model %s: a message could not be sent", self.name)
            if self.process is not None:
                self.process.kill()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(SECONDS_TO_END)  # one that hangs in a driver may never end
        self.outbox.put(None)
        self.connection.close()  # last: a message may be on its way
