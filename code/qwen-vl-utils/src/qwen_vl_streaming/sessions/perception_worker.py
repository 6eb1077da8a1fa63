"""The perception process: computes the clips of a client's sessions, and writes their keys and values into KV transfer
buffers.

Receives messages through a pipe, and reports through it when a session is open or closed, and when a clip has been
transferred: see `perception_client.py`.
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

from ..common.errors import InputError, first_line
from ..engine.device_event import DeviceEvent
from ..engine.kv_cache import PagedKVCache
from ..engine.step_request import BatchSlot
from ..engine.step_runner import StepRunner
from ..engine.stream_state import StreamState
from ..timeline.variants import get_variant

GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that may be sent to the whole process group, and that this process ignores."""


def perceive(pipe: Connection, load: Callable) -> None:
    """Serve a PerceptionClient until it sends "stop" or dies."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.Queue = queue.Queue()
    closed = [0]

    def read() -> None:
        # In a thread: the pipe must not fill up while a clip is computed.
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            except Exception as error:  # shared memory that cannot be opened
                message = "fault", 0, error
            if message[0] == "close":
                closed[0] = message[1]
            inbox.put(message)

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
        torch.set_num_threads(1)  # the CPU only launches work; more threads would compete
    pipe.send(("loaded",))
    try:
        PerceptionWorker(model, inbox, closed, pipe).serve()
    except BaseException as error:
        pipe.send(("fault", f"failed ({_line(error)})"))


def _line(error: BaseException) -> str:
    return first_line(error)


class PerceptionWorker:
    """Computes the clips of one session after another."""

    def __init__(self, model, inbox: queue.Queue, closed: list[int], pipe: Connection):
        """`closed` holds the newest session that was closed, ahead of its "close" message in `inbox`."""
        self.model, self.inbox, self.closed, self.pipe = model, inbox, closed, pipe
        self.sizes: tuple | None = None
        self.runner: StepRunner | None = None
        self.batch_slot: BatchSlot | None = None
        self.staging: Tensor | None = None
        self.kv_buffers: list[Tensor] = []
        self.pixel_buffers: list[Tensor] = []
        self.pinned: list[Tensor] = []
        """On a GPU, a pinned copy of each pixel buffer."""
        self.free: collections.deque[int] = collections.deque()
        """KV transfer buffers that may be written."""
        self.clips: collections.deque[tuple] = collections.deque()
        """Clips that have arrived and were not begun."""
        self.transfers: collections.deque[tuple[int, int, DeviceEvent]] = collections.deque()
        """Clips under way: session, KV transfer buffer, and the event after which it is full."""

    def serve(self) -> None:
        while True:
            if self.inbox.empty():
                self._report(0)
            kind, session, *what = self.inbox.get()
            if kind == "stop":
                return
            if kind == "fault":
                raise what[0]
            if kind == "buffers":
                handles, self.pixel_buffers = what
                self.kv_buffers = [self._open_buffer(*handle) for handle in handles]
                if self.model.device.type == "cuda":
                    self.pinned = [torch.empty_like(each, pin_memory=True) for each in self.pixel_buffers]
            elif kind == "close":
                self.clips.clear()
                self._report(0)
                self.pipe.send(("closed", session))
            elif session > self.closed[0]:
                if kind == "open":
                    self._open(*what)
                    self.pipe.send(("opened", session))
                elif kind == "empty":
                    self.free += what
                else:
                    self.clips.append((session, *what))
            while self.clips and self.free and self.clips[0][0] > self.closed[0]:
                self._compute(*self.clips.popleft())

    def _open_buffer(self, rebuild: Callable, arguments: tuple) -> Tensor:
        """A buffer of the other process, from what `reduce_tensor` returns for it. If it is on another device that this
        one can access, it is opened from this one: work launched on the other device, however little, would delay what
        runs there."""
        named, mine = inspect.signature(rebuild).bind(*arguments), self.model.device
        home = named.arguments.get("storage_device", mine.index)
        if home != mine.index and torch.cuda.can_device_access_peer(mine, home):
            named.arguments |= {"storage_device": mine.index, "event_sync_required": False}
        return rebuild(*named.args, **named.kwargs)

    def _open(self, name: str, template, layout, clips: int, chunk: int | None, window) -> None:
        variant = get_variant(name)
        visual, text = StepRunner.token_capacity(layout, clips, 1, window)
        sizes = layout.grid, layout.tail, PagedKVCache.blocks_needed(visual, text), text, chunk, window is None
        runner = self.runner
        if runner is None or self.sizes != sizes:
            runner = self.runner = self.batch_slot = self.sizes = None  # frees memory before new memory is taken
            runner = self.runner = StepRunner.single(self.model, layout, clips, 1, chunk, 1.0, window, chunk_counts=[1])
            runner.warm_up(sample=False)
            runner.vision_encoder.capture(layout.grid, [1])
            self.sizes = sizes
        if self.batch_slot is not None:
            runner.release(self.batch_slot)
        self.batch_slot = runner.acquire(template, layout, clips, 1, window)
        runner.prefill(self.batch_slot, StreamState.prompt(variant, template, layout, window))
        self.visual = StreamState(variant, template, layout, window)
        self.free = collections.deque(range(len(self.kv_buffers)))
        near = self.kv_buffers[0].device == self.model.device
        self.staging = None if near else runner.cache.new_kv_buffer(layout.tokens_per_clip + layout.tail)
        """Where a clip's keys and values are gathered before one copy to another device."""

    def _compute(
        self, session: int, pixel_buffer: int, shape, dtype: torch.dtype, last: bool, counts: list[int]
    ) -> None:
        """Launch a clip, and report those before it."""
        raw = self.pixel_buffers[pixel_buffer][: shape.numel() * dtype.itemsize]
        if self.pinned:
            raw = self.pinned[pixel_buffer][: len(raw)].copy_(raw)
        clip = raw.view(dtype).view(shape)
        runner, batch_slot = self.runner, self.batch_slot
        assert runner is not None and batch_slot is not None  # "open" comes before the first clip
        (features,) = runner.vision_encoder.encode([clip], [self.visual.stream.layout])
        runner.set_clip_features(batch_slot, features)
        self.visual.stream.counts[:] = counts
        due = self.visual.feed_clip(last)
        due = due[due.visual]
        runner.prefill(batch_slot, due)
        kv_buffer = self.free.popleft()
        gathered = self.kv_buffers[kv_buffer] if self.staging is None else self.staging
        runner.cache.copy_out(batch_slot.visual_index(due), gathered)
        if self.staging is not None:
            self.kv_buffers[kv_buffer].copy_(self.staging, non_blocking=True)
        self.transfers.append((session, kv_buffer, DeviceEvent(self.model.device)))
        self._report(1)

    def _report(self, unfinished: int) -> None:
        """Report the clips that have been transferred, except the newest `unfinished` ones. Waits for them."""
        while len(self.transfers) > unfinished:
            session, kv_buffer, full = self.transfers.popleft()
            full.synchronize()
            self.pipe.send(("transferred", session, kv_buffer))
