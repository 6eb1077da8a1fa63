"""The process that owns one model on one device: a session pool, and one loop that steps it.

Messages come through a pipe and are read in a thread; what they ask for is done between two steps. Nothing here waits
for a client: tokens go out in one message a step. Knows nothing about sockets and pictures.
"""

import functools
import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ..common.clock import now
from ..common.ending import die_with_parent, explain, leave, run_to_end
from ..common.errors import InputError
from ..common.progress import quiet_libraries
from ..live.figures import Course, figures, spoken_flags
from ..live.setup import WARM_UP_STEPS, load_on
from ..model.prompts import Template
from ..sessions import Session, SessionPool
from ..sessions.session import make_record
from ..sessions.session_pool import CHUNK_COUNTS, RESERVE, blocks_needed
from ..timeline.timeline import Layout
from ..timeline.variants import VARIANTS
from .pixel_buffers import PixelBuffers
from .record_copy import RecordCopy, Reporter

logger = logging.getLogger(__name__)

ADVICE = "use fewer --sessions, a smaller --window or fewer --max-clips, or free memory"
SWITCH_SECONDS = 1e-3
"""How long a thread may keep Python's lock from others: each part of a clip that is read needs it."""
FAILURES = 3
"""Steps in a row that may fail; then the process ends."""


@dataclass(frozen=True)
class ModelSpec:
    """What a process loads, and for how many sessions."""

    name: str
    path: str
    variant: str
    device: str
    dtype: torch.dtype
    weights: str | None
    sessions: int
    window: tuple[int, int] | None
    max_clips: int
    max_new_tokens: int
    tokens_after_end: int
    """Tokens written at most once the last clip has come."""
    template: Template
    largest: Layout
    """The layout with the longest prompt and the largest clips of a stream."""
    clip_tokens: int
    """Visual tokens of the largest clips, those of short recordings."""
    clip_bytes: int
    """Of the pixels of such a clip."""
    common: tuple[Layout, ...]
    """Layouts of common sources, the first of which a chunk of the pool is made for."""

    def blocks(self, layout: Layout, limits: dict) -> int:
        """Blocks of keys and values of a session with `limits`."""
        return blocks_needed(layout, **limits)

    @property
    def limits(self) -> dict:
        """Those of a stream."""
        return {"max_clips": self.max_clips, "max_new_tokens": self.max_new_tokens, "window": self.window}

    @property
    def mode(self) -> str:
        return "fused" if VARIANTS[self.variant].parallel else "serial"


@dataclass
class Stream:
    """One viewer's session."""

    session: Session
    reporter: Reporter
    completed: list[float] = field(default_factory=list)
    """When each clip was complete."""
    cancelled: bool = False


def run_model(connection: Connection, pixels: PixelBuffers, spec: ModelSpec, parent: int | None = None) -> None:
    """Load the model and serve until None comes or the pipe is closed. `parent` is given in a process of its own, which
    then ends with that process and leaves signals to it."""
    if parent is not None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(parent)
        quiet_libraries()
    try:
        _serve(connection, pixels, spec)
    finally:
        connection.close()


def _serve(connection: Connection, pixels: PixelBuffers, spec: ModelSpec) -> None:
    try:
        model = load_on(spec.path, spec.device, spec.dtype, spec.weights)
        connection.send(("loaded",))
        pool = make_pool(model, spec, connection.recv())
    except EOFError:
        return
    except Exception as error:
        if (reason := explain(error, ADVICE, ADVICE)) is None:
            connection.send(("refused", f"model {spec.name} cannot be served ({type(error).__name__}: {error})"))
            raise
        connection.send(("refused", reason))
        return
    with pool:
        connection.send(("ready", len(pool.runner.free_slots), len(pool.runner.cache.free_blocks)))
        ModelLoop(connection, pixels, spec, pool).run()


def make_pool(model, spec: ModelSpec, sharing: int) -> SessionPool:
    """A pool in the memory that is free, if `sharing` models that are still to make theirs share it."""
    typical, memory = spec.common[0], None
    if model.device.type == "cuda":
        memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0] / sharing)
    pool = SessionPool(
        model,
        spec.sessions,
        spec.largest,
        memory=memory,
        **spec.limits,
        chunk=typical.tokens_per_clip + typical.tail,
        clip_tokens=spec.clip_tokens,
    )
    for grid in {layout.grid for layout in spec.common} - {spec.largest.grid}:
        pool.runner.vision_encoder.capture(grid, [count for count in CHUNK_COUNTS if count])
    patches = typical.tokens_per_clip * model.model.visual.spatial_merge_size**2
    clip = torch.zeros(patches, model.model.visual.patch_embed.proj.weight[0].numel())
    options = {"mode": spec.mode, "max_clips": 2, "max_new_tokens": 9, "window": None}
    with pool.open(VARIANTS[spec.variant], spec.template, typical, **options) as session:
        session.feed(clip)
        session.feed(clip, last=True)
        for _ in range(WARM_UP_STEPS):
            pool.step()
    return pool


class ModelLoop:
    def __init__(self, connection: Connection, pixels: PixelBuffers, spec: ModelSpec, pool: SessionPool):
        self.connection, self.pixels, self.spec, self.pool = connection, pixels, spec, pool
        self.streams: dict[str, Stream] = {}
        self.inbox: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self.failures = 0
        self.read_error: Exception | None = None
        """Why messages can no longer be read."""

    def run(self) -> None:
        """Serve until the pipe is closed; then all sessions end, each with its record."""
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
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

    def _read(self) -> None:
        pinned = self.spec.device.startswith("cuda")
        try:
            # Not after the end: the pipe is closed then, and its number may be given to another one.
            while (message := self.connection.recv()) is not None:
                if message[0] == "clip":
                    kind, key, number, shape, *rest = message
                    message = kind, key, self.pixels.read(number, shape, self.spec.dtype, pinned), *rest
                self.inbox.put(message)
        except (EOFError, OSError):  # the server has ended
            pass
        except Exception as error:  # of CUDA, for example
            logger.exception("model %s: a message could not be read", self.spec.name)
            self.read_error = error
        finally:
            self.inbox.put(None)

    def _take_messages(self) -> bool:
        """Do what has been asked for; block if there is nothing else to do. Returns False at the end."""
        while True:
            try:
                message = self.inbox.get(block=self.pool.idle)
            except queue.Empty:
                return True
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
                if key in self.streams and (self.streams[key].cancelled or self.streams[key].session.done):
                    self._finish(key)

    def _open(self, key: str, template: Template, layout: Layout, options: dict) -> None:
        variant = VARIANTS[self.spec.variant]
        session = self.pool.open(variant, template, layout, mode=self.spec.mode, **options)
        self.streams[key] = Stream(session, Reporter(session))
        self.connection.send(("opened", key, RecordCopy(options["record"], make_record(session, "running"))))

    def _clip(self, stream: Stream, pixels: Tensor, known_hash: str, completed: float, last: bool) -> None:
        stream.session.feed(pixels, last, known_hash)
        if last:
            stream.session.limit(self.spec.tokens_after_end)
        stream.completed.append(completed)

    def _end(self, stream: Stream) -> None:
        stream.session.end()
        stream.session.limit(self.spec.tokens_after_end)

    def _cancel(self, stream: Stream, why: str) -> None:
        stream.session.log.about["end"] = why
        stream.cancelled = True

    def _step(self) -> None:
        try:
            written = self.pool.step()
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
        keys = {id(stream.session): key for key, stream in self.streams.items()}
        tokens = [(keys[id(session)], token.token, token.slot, token.time) for session, token in written]
        news = [(key, news) for key, stream in self.streams.items() if (news := stream.reporter.news()) is not None]
        if tokens or news:
            self.connection.send(("step", tokens, news))
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
        self.connection.send(("done", key, code, None, recorded))

    def _finish(self, key: str, report: bool = True) -> None:
        """Close a session with its figures and its record."""
        stream = self.streams.pop(key)
        session, ended = stream.session, "cancelled" if not stream.session.done else "completed"
        try:
            while session.rounds.pending:
                session.rounds.collect(True)
            begun = len(session.counts)
            course = Course(
                completed=stream.completed,
                fed=range(len(stream.completed)),
                visible=session.log.visible[:begun],
                slots=[token.slot for token in session.written],
                times=[token.time for token in session.written],
                closed=session.scheduler.complete,
                greedy=session.greedy,
                spoken=spoken_flags([token.token for token in session.written], session.template.end_of_slot),
            )
            found = figures(course)
            session.log.about.update(figures=found, completed=stream.completed, closed=now())
            session.close()
        except Exception as error:
            logger.error("model %s: a session's record: %s", self.spec.name, error)
            ended, found = "failed", None
        if report:
            self.connection.send(("done", key, ended, found, found is not None))


def run_process(connection: Connection, pixels: PixelBuffers, spec: ModelSpec, parent: int) -> None:
    """The main function of a process. Ends it at once: Python's own end takes seconds."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.setswitchinterval(SWITCH_SECONDS)
    run = functools.partial(run_model, connection, pixels, spec, parent)
    run_to_end(run, lambda error: logger.exception("model %s", spec.name))
    leave(0)
