"""The process that perceives: it takes the clips of a pair's sessions in, and puts their keys and values into carriers.

It is told what to do, and tells when a clip has gone over, through a pipe: see `perception_client.py`.
"""

import collections
import inspect
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ..common.errors import InputError
from ..engine.device_event import DeviceEvent
from ..engine.kv_cache import PagedKVCache
from ..engine.step_runner import StepRunner
from ..engine.stream_state import StreamState
from ..timeline.variants import get_variant

TO_ALL = (signal.SIGINT, signal.SIGTERM)
"""Signals that may go to a whole group of processes, and are not for this one."""


def perceive(pipe: Connection, load: Callable) -> None:
    """Serve a Pair until it says stop, or is gone."""
    for number in TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    orders: queue.Queue = queue.Queue()
    closed = [0]

    def read() -> None:
        # In a thread of its own: the pipe never fills up while a clip is taken in.
        while True:
            try:
                order = pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            except Exception as error:  # memory that it cannot open
                order = "fault", None, error
            if order[0] == "close":
                closed[0] = order[1]
            orders.put(order)

    threading.Thread(target=read, daemon=True).start()
    try:
        model = load()
    except InputError as error:
        pipe.send(("refused", str(error)))
        return
    except BaseException as error:
        pipe.send(("fault", f"could not load its model ({_line(error)})"))
        return
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
        torch.set_num_threads(1)  # the CPU only keeps the books: many threads would be in each other's way
    pipe.send(("loaded",))
    try:
        PerceptionWorker(model, orders, closed, pipe).serve()
    except BaseException as error:
        pipe.send(("fault", f"failed ({_line(error)})"))


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class PerceptionWorker:
    """This side of a pair's sessions, one after the other."""

    def __init__(self, model, orders: queue.Queue, closed: list[int], pipe: Connection):
        """`closed` holds the newest session that was closed, before its order's turn comes."""
        self.model, self.orders, self.closed, self.pipe = model, orders, closed, pipe
        self.sizes = self.passes = self.batch_slot = self.staged = None
        self.kv_buffers: list[Tensor] = []
        self.pixel_buffers: list[Tensor] = []
        self.pinned: list[Tensor] = []
        """On a GPU, a copy of each tray that it can read by itself."""
        self.empty: collections.deque[int] = collections.deque()
        self.clips: collections.deque[tuple] = collections.deque()
        """Those that have arrived and were not begun."""
        self.leaving: collections.deque[tuple[int, int, DeviceEvent]] = collections.deque()
        """Those under way: session, carrier, and when it is full."""

    def serve(self) -> None:
        while True:
            if self.orders.empty():
                self._tell(0)
            kind, session, *what = self.orders.get()
            if kind == "stop":
                return
            if kind == "fault":
                raise what[0]
            if kind == "carriers":
                handles, self.pixel_buffers = what
                self.kv_buffers = [self._opened(*handle) for handle in handles]
                if self.model.device.type == "cuda":
                    self.pinned = [
                        torch.empty_like(pixel_buffer, pin_memory=True) for pixel_buffer in self.pixel_buffers
                    ]
            elif kind == "close":
                self.clips.clear()
                self._tell(0)
                self.pipe.send(("closed", session))
            elif session > self.closed[0]:
                if kind == "open":
                    self._open(*what)
                elif kind == "empty":
                    self.empty += what
                else:
                    self.clips.append((session, *what))
            while self.clips and self.empty and self.clips[0][0] > self.closed[0]:
                self._take_in(*self.clips.popleft())

    def _opened(self, rebuild: Callable, arguments: tuple) -> Tensor:
        """A carrier of the other process, from what `reduce_tensor` says of it. One that lies on another device is
        opened from this one, where devices can reach each other: work given to the other, however little, would take
        turns with what that is at."""
        named, mine = inspect.signature(rebuild).bind(*arguments), self.model.device
        home = named.arguments.get("storage_device", mine.index)
        if home != mine.index and torch.cuda.can_device_access_peer(mine, home):
            named.arguments |= {"storage_device": mine.index, "event_sync_required": False}
        return rebuild(*named.args, **named.kwargs)

    def _open(self, name: str, template, layout, clips: int, chunk: int | None, window) -> None:
        variant = get_variant(name)
        visual, text = StepRunner.token_capacity(layout, clips, 1, window)
        sizes = layout.grid, layout.tail, PagedKVCache.blocks_needed(visual, text), text, chunk, window is None
        if self.sizes != sizes:
            self.passes = self.batch_slot = self.sizes = None  # their memory goes before that of others comes
            self.passes = StepRunner.single(self.model, layout, clips, 1, chunk, 1.0, window, chunk_counts=[1])
            self.passes.warm_up(sample=False)
            self.passes.vision_encoder.capture(layout.grid, [1])
            self.sizes = sizes
        if self.batch_slot is not None:
            self.passes.release(self.batch_slot)
        self.batch_slot = self.passes.acquire(template, layout, clips, 1, window)
        self.passes.prefill(self.batch_slot, StreamState.prompt(variant, template, layout, window))
        self.sight = StreamState(variant, template, layout, window)
        self.empty = collections.deque(range(len(self.kv_buffers)))
        near = self.kv_buffers[0].device == self.model.device
        self.staged = None if near else self.passes.new_kv_buffer(layout)
        """Where a clip's keys and values are put together before they go at once to a device out of reach."""

    def _take_in(
        self, session: int, pixel_buffer: int, shape, dtype: torch.dtype, last: bool, counts: list[int]
    ) -> None:
        """Begin with a clip, and say so of those before it."""
        raw = self.pixel_buffers[pixel_buffer][: shape.numel() * dtype.itemsize]
        if self.pinned:
            raw = self.pinned[pixel_buffer][: len(raw)].copy_(raw)
        clip = raw.view(dtype).view(shape)
        self.passes.set_clip_features(
            self.batch_slot, *self.passes.vision_encoder.encode([clip], [self.sight.stream.layout])
        )
        self.sight.stream.counts[:] = counts
        due = self.sight.feed_clip(last)
        due = due[due.rows.visual]
        self.passes.prefill(self.batch_slot, due)
        kv_buffer = self.empty.popleft()
        self.passes.copy_out(self.batch_slot, due, self.kv_buffers[kv_buffer] if self.staged is None else self.staged)
        if self.staged is not None:
            self.kv_buffers[kv_buffer].copy_(self.staged, non_blocking=True)
        self.leaving.append((session, kv_buffer, DeviceEvent(self.model.device)))
        self._tell(1)

    def _tell(self, still: int) -> None:
        """That clips have gone over, once they have, but for those last begun."""
        while len(self.leaving) > still:
            session, kv_buffer, there = self.leaving.popleft()
            there.synchronize()
            self.pipe.send(("whole", session, kv_buffer))
