"""The loop of a model process: does between two steps what messages ask for, and reports what the step has written.

Messages come through a pipe and are read in a thread. Nothing here waits for a client: tokens go out in one message a
step. Knows nothing about sockets and pictures.
"""

import collections
import contextlib
import logging
import math
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ..common.clock import now
from ..common.ending import explain
from ..common.errors import InputError
from ..live.figures import figures
from ..model.prompts import Template
from ..sessions import Session, SessionPool
from ..sessions.session import make_record
from ..timeline.timeline import Layout
from ..timeline.variants import VARIANTS
from .model_spec import ModelSpec
from .pixel_buffers import PixelBuffers
from .record_copy import RecordCopy, Reporter

logger = logging.getLogger(__name__)

ADVICE = "use fewer --sessions, a smaller --window or fewer --max-clips, or free memory"
FAILURES = 3
"""Steps in a row that may fail; then the process ends."""
ALIVE = ("alive",)
"""The message that a process which works sends every BEAT seconds."""
BEAT = 1.0
STEP_SECONDS = 600.0
"""A step, or what one message asks for, that takes longer hangs: compilation takes minutes at most."""


@dataclass
class Stream:
    """One viewer's session."""

    session: Session
    reporter: Reporter
    completed: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    """When each clip was complete in the server, and when this process had its pixels."""


class ModelLoop:
    def __init__(self, connection: Connection, pixels: PixelBuffers, spec: ModelSpec, pool: SessionPool):
        self.connection, self.pixels, self.spec, self.pool = connection, pixels, spec, pool
        self.streams: dict[str, Stream] = {}
        self.inbox: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self.failures = 0
        self.busy_since = {"loop": math.inf, "inbox": math.inf}
        """When each of the two threads began what it does now, by the monotonic clock; inf while it waits."""
        self.hashes: collections.deque[Future[str]] = collections.deque()
        """Those to come, of the newest clips: they come after the clips, because only the record needs them."""
        self.sending = threading.Lock()
        self.read_error: Exception | None = None
        """Why messages can no longer be read."""

    def run(self) -> None:
        """Serve until the pipe is closed; then all sessions end, each with its record."""
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), name="beats", daemon=True)
        beats.start()
        try:
            while self._take_messages():
                self._step()
            if self.read_error is not None:
                for key in [*self.streams]:
                    self._fail(key, self.read_error)
        except (BrokenPipeError, ConnectionResetError):  # the server has ended
            pass
        finally:
            for key in [*self.streams]:
                self._finish(key, report=False)
            ended.set()
            beats.join()

    def _send(self, *message) -> None:
        with self.sending:
            self.connection.send(message)

    def _beat(self, ended: threading.Event) -> None:
        """Send ALIVE until `ended`, except while a thread hangs."""
        with contextlib.suppress(OSError):  # the server has ended
            while not ended.wait(BEAT):
                if time.monotonic() - min(self.busy_since.values()) < STEP_SECONDS:
                    self._send(*ALIVE)

    def _read(self) -> None:
        pinned = self.spec.device.startswith("cuda")
        try:
            # Not after the end: the pipe is closed then, and its number may be given to another one.
            while (message := self.connection.recv()) is not None:
                self.busy_since["inbox"] = time.monotonic()
                if message[0] == "hash":
                    self.hashes.popleft().set_result(message[1])
                elif message[0] == "clip":
                    kind, key, number, shape, *rest = message
                    pixels = self.pixels.read(number, shape, pinned)
                    self.hashes.append(known_hash := Future())
                    self.inbox.put((kind, key, pixels, known_hash, now(), *rest))
                    self.pixels.release(number)
                else:
                    self.inbox.put(message)
                self.busy_since["inbox"] = math.inf
        except (EOFError, OSError):  # the server has ended
            pass
        except Exception as error:  # of CUDA, for example
            logger.exception("model %s: a message could not be read", self.spec.name)
            self.read_error = error
        finally:
            self.busy_since["inbox"] = math.inf
            for known_hash in self.hashes:  # those that have not come never will
                known_hash.cancel()
            self.inbox.put(None)

    def _take_messages(self) -> bool:
        """Do what has been asked for; block if there is nothing else to do. Returns False at the end."""
        while True:
            self.busy_since["loop"] = math.inf
            try:
                message = self.inbox.get(block=self.pool.idle)
            except queue.Empty:
                return True
            finally:
                self.busy_since["loop"] = time.monotonic()
            if message is None:
                return False
            kind, key, *what = message
            try:
                if kind == "open":
                    self._open(key, *what)
                elif key in self.streams:
                    getattr(self, f"_{kind}")(self.streams[key], *what)
            except (InputError, RuntimeError, MemoryError) as error:
                self._fail(key, error)
            else:
                if key in self.streams and (kind == "cancel" or self.streams[key].session.done):
                    self._finish(key)

    def _open(self, key: str, template: Template, layout: Layout, options: dict) -> None:
        variant = VARIANTS[self.spec.variant]
        session = self.pool.open(variant, template, layout, mode=self.spec.mode, **options)
        self.streams[key] = Stream(session, Reporter(session))
        self._send("opened", key, RecordCopy(options["record"], make_record(session, "running")))

    def _clip(
        self, stream: Stream, pixels: Tensor, known_hash: Future[str], received: float, completed: float, last: bool
    ) -> None:
        stream.session.feed(pixels, last, known_hash)
        if last:
            stream.session.limit(self.spec.tokens_after_end)
        stream.received.append(received)
        stream.completed.append(completed)

    def _end(self, stream: Stream) -> None:
        stream.session.end()
        stream.session.limit(self.spec.tokens_after_end)

    def _cancel(self, stream: Stream, why: str) -> None:
        stream.session.log.about["end"] = why

    def _step(self) -> None:
        try:
            self.pool.step()
            self.failures = 0
        except Exception as error:  # an error in a step has ended all sessions, each with its record
            self.failures += 1
            for key in [*self.streams]:
                self._fail(key, error)
            if explain(error, ADVICE, ADVICE) is None:
                logger.exception("model %s: a step failed", self.spec.name)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            if self.failures == FAILURES:
                raise
            return
        news = [(key, news) for key, stream in self.streams.items() if (news := stream.reporter.news()) is not None]
        if news:
            self._send("step", news)
        for key, stream in [*self.streams.items()]:
            if stream.session.closed:  # its clip did not fit in memory
                self._fail(key, torch.OutOfMemoryError("the clip did not fit"))
            elif stream.session.done:
                self._finish(key)

    def _fail(self, key: str, error: Exception) -> None:
        """A session has failed, or could not be opened."""
        if (stream := self.streams.pop(key, None)) is not None and not stream.session.closed:
            try:
                stream.session.fail(error)
            except InputError as unwritten:
                logger.error("%s", unwritten)
        reason = explain(error, ADVICE, ADVICE)
        logger.error("model %s: a session has failed: %s", self.spec.name, reason or f"{type(error).__name__}: {error}")
        code = "out_of_memory" if reason and not isinstance(error, InputError) else "failed"
        path = None if stream is None else stream.session.log.path
        recorded = path is not None and os.path.exists(path)
        self._send("done", key, code, None, recorded)

    def _finish(self, key: str, report: bool = True) -> None:
        """Close a session with its figures and its record."""
        stream = self.streams.pop(key)
        session, ended = stream.session, "completed" if stream.session.done else "cancelled"
        try:
            while session.rounds.pending:
                session.rounds.collect(True)
            found = figures(make_record(session, ended), stream.completed, range(len(stream.completed)))
            times = {"completed": stream.completed, "received": stream.received, "closed": now()}
            session.log.about.update(figures=found, **times)
            session.close()
        except Exception as error:
            logger.error("model %s: a session's record: %s", self.spec.name, error)
            ended, found = "failed", None
        if report:
            self._send("done", key, ended, found, found is not None)
