"""Perception in a process of its own: it takes clips in and hands over their keys and values, each clip's in one
transfer, while this process writes.

Orders and news go through a pipe, pixels through trays of shared memory. Keys and values go into carriers that lie on
this process's device and that both have open: on GPUs a peer copy, between two or within one, on CPUs shared memory.
News of a clip comes when its carrier is full, so that nothing here ever waits for a transfer, and a process that has
died is noticed at the pipe.
"""

import collections
import contextlib
import functools
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from .clock import now
from .errors import InputError
from .feed import Feed
from .mark import Mark
from .passes import AHEAD
from .perception import perceive
from .session import Session, Word

LOADING = 900
"""Seconds that a model may take to load."""
CARRIERS = 3
"""Clips that may have come over and not be laid into pages yet."""
TRAYS = CARRIERS + 1
"""Clips that may be on their way: one is being taken in for each carrier, and one waits."""
GLANCE = 0.2
"""Seconds that a step waits for a clip, so that whoever calls it may stop meanwhile."""


class PerceptionLost(RuntimeError):
    """The process that perceives has gone, or has failed: the message is one plain line."""


class Pair:
    """This process and one that perceives. It serves one session after the other, and is closed at the end."""

    def __init__(self, load: Callable[[], torch.nn.Module], patience: float = 60.0):
        """`load` makes the model in the other process, on its device; it has to be picklable. `patience` is how many
        seconds a clip, or its transfer, may take. Raises PerceptionLost, or InputError where `load` does."""
        context = multiprocessing.get_context("spawn")
        self.patience, self.sessions, self.current = patience, 0, None
        self.why_lost: str | None = None
        self.carriers: list[Tensor] = []
        self.trays: list[Tensor] = []
        """Bytes of clips, which take them in turn: one comes free when the clip in it has been taken in."""
        self.pipe, theirs = context.Pipe()
        self.closing: int | None = None
        """A session that is over, of which the other process has not said so yet."""
        self.process = context.Process(target=perceive, args=(theirs, load), daemon=True)
        with _deaf():
            self.process.start()
        theirs.close()
        self.orders: queue.Queue = queue.Queue()
        threading.Thread(target=self._send_orders, daemon=True).start()
        if (said := self.hear(LOADING)) is None:
            raise self._lost(f"has loaded no model for {LOADING} s")
        if said[0] == "refused":
            self.process.join()
            raise InputError(said[1])

    def order(self, *message, before: Callable[[], object] = lambda: None) -> None:
        """Send a message, once `before` has been called in the thread that sends."""
        if self.why_lost:
            raise PerceptionLost(self.why_lost)
        self.orders.put((before, ForkingPickler.dumps(message)))

    def _send_orders(self) -> None:
        # In a thread of its own: a process that does not read must not hold this one up, nor a large clip.
        with contextlib.suppress(OSError):  # gone: whoever listens for news hears of it
            while (order := self.orders.get()) is not None:
                before, message = order
                before()
                self.pipe.send_bytes(message)

    def hear(self, seconds: float) -> tuple | None:
        """The next message, or None where there is none within `seconds`. Raises PerceptionLost."""
        if self.why_lost:
            raise PerceptionLost(self.why_lost)
        ready = wait([self.pipe, self.process.sentinel], seconds)
        if not ready:
            return None
        try:
            if self.pipe not in ready:
                raise EOFError
            message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if message[0] == "fault":
            raise self._lost(message[1])
        return message

    def _lost(self, fault: str = "") -> PerceptionLost:
        if not fault:
            self.process.join(1)
            code = self.process.exitcode
            if code is None:
                fault = "does not answer"
            else:
                fault = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self.why_lost = f"the process that perceives ({self.process.pid}) {fault}: start a new pair"
        return PerceptionLost(self.why_lost)

    def silent(self) -> PerceptionLost:
        """It lives, but says nothing for longer than it may."""
        return self._lost(f"has said nothing for {self.patience:g} s")

    def open(self, carrier: Tensor, largest: int, *what) -> int:
        """Begin a session, whose clips, of `largest` bytes at most, come over in carriers like `carrier`."""
        if self.why_lost or not self.process.is_alive():
            raise InputError(self.why_lost or str(self._lost()))
        if self.current is not None:
            raise InputError("another session runs on this pair: close it first")
        while self.closing is not None:
            if (said := self.hear(self.patience)) is None:
                raise self.silent()
            if said == ("closed", self.closing):
                self.closing = None
        if not self.carriers or _kind(self.carriers[0]) != _kind(carrier) or len(self.trays[0]) < largest:
            self.carriers = [torch.empty_like(carrier) for _ in range(CARRIERS)]
            self.trays = [torch.empty(largest, dtype=torch.uint8).share_memory_() for _ in range(TRAYS)]
            self.order("carriers", None, [reduce_tensor(carrier) for carrier in self.carriers], self.trays)
        self.sessions += 1
        self.current = self.sessions
        self.order("open", self.current, *what)
        return self.current

    def finish(self, session: int) -> None:
        """End `session`: what is still on its way is never seen. Says nothing where all is lost, and waits for
        nothing."""
        if session == self.current:
            self.current = None
            with contextlib.suppress(PerceptionLost):
                self.order("close", session)
                self.closing = session

    def close(self) -> None:
        """Stop the other process."""
        if self.process.is_alive() and not self.why_lost:
            self.order("stop", None)
            self.process.join(5)
        self.process.kill()
        self.process.join()
        self.orders.put(None)
        self.why_lost = self.why_lost or "this pair was closed: start a new one"
        self.pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class PipelinedSession(Session):
    """Generation's side of a session. A clip is seen once its slot begins, and it must have come over whole."""

    way = "pipelined"
    joins = True

    def __init__(self, *args, pair: Pair | None = None, **options):
        if pair is None:
            raise InputError("a pipelined session needs a pair: start a pipeline.Pair and give it as `pair`")
        self.pair = pair
        super().__init__(*args, **options)

    def _open(self) -> None:
        super()._open()
        self.sight = Feed(self.variant, self.template, self.layout, self.window)
        """Where what comes over belongs."""
        self.begun = 0
        """How many clips were sent."""
        self.sent: collections.deque[bool] = collections.deque()
        """Of each clip that was sent and has not come over, whether it is the last."""
        self.whole: collections.deque[bool] = collections.deque()
        """The same of each clip that has come over and that no slot has begun with."""
        self.leaving: collections.deque[tuple[int, Mark]] = collections.deque()
        """Carriers out of which keys and values are being laid into pages, and when that is done."""
        self.heard = 0.0
        """When a clip last came over, or was the first to be sent."""
        self.number = self.pair.open(
            self.passes.carrier(self.layout),
            max(torch.float32.itemsize * rows * columns for rows, columns in self._shapes),
            self.variant.name,
            self.template,
            self.layout,
            self.max_clips,
            self.chunk,
            self.window,
        )

    def feed(self, clip: Tensor, last: bool = False) -> None:
        super().feed(clip, last)
        with self.whatever_happens():
            self._send()

    def step(self) -> Word | None:
        word = super().step()
        if word is None and not self.closed and not self.coming and not self._may_speak() and self.sent:
            with self.whatever_happens():
                silent = not self.whole and not self._receive(GLANCE)
                if silent and now() - self.heard > self.pair.patience:
                    raise self.pair.silent()
        return word

    def looks_due(self) -> list:
        return []

    def _waits_for_words(self) -> bool:
        while self.sent and self.coming and not self.word_there:
            if self._receive(0):
                return False
        return True

    def _clips_to_come(self) -> bool:
        return super()._clips_to_come() or bool(self.sent or self.whole)

    def _send(self) -> None:
        """Let perception have what it can place: where a clip's positions depend on what slots write, and that is not
        agreed beforehand, only when the slot before it begins. No more than there are carriers for, and one that is
        under way; or than a window has room for."""
        held = self.greedy and self.variant.count == "rounds"
        most = 1 if held else TRAYS if self.window is None else AHEAD
        while self.waiting and not self.done and (ahead := len(self.sent) + len(self.whole)) < most:
            if held:
                counts = [*self.counts]
            else:
                slots = len(self.counts) + ahead
                counts = [0 if self.greedy else self._quota(slot + 1) for slot in range(slots)]
            clip, last = self.waiting.popleft()
            if not self.sent:
                self.heard = now()
            self.sent.append(last)
            fed = (clip if clip.dtype == torch.float32 else clip.to(self.model.dtype)).cpu().contiguous()
            raw, tray = fed.flatten().view(torch.uint8).numpy(), self.begun % TRAYS
            room = self.pair.trays[tray].numpy()[: len(raw)]
            put = functools.partial(np.copyto, room, raw)
            self.pair.order("clip", self.number, tray, fed.shape, fed.dtype, last, counts, before=put)
            self.begun += 1

    def _receive(self, seconds: float) -> bool:
        """Take what has come over, waiting for at most `seconds`. Returns whether anything has."""
        self._give_back(wait=seconds > 0)
        if (said := self.pair.hear(seconds)) is None:
            return False
        self.heard = now()
        _, _, carrier = said
        last = self.sent.popleft()
        self.passes.copy_in(self.seat, self.sight.clip(last), self.pair.carriers[carrier])
        self.leaving.append((carrier, Mark(self.model.device)))
        self.whole.append(last)
        return True

    def _give_back(self, wait: bool) -> None:
        """Carriers that are empty again."""
        while self.leaving and (wait or self.leaving[0][1].passed):
            carrier, there = self.leaving.popleft()
            there.wait()
            self.pair.order("empty", self.number, carrier)

    def _advance(self) -> None:
        self._send()
        while self.sent and self._receive(0):
            pass
        if self.whole and not len(self.lead) and self._wants_clip():
            lead = self._begin_slot(self.whole.popleft())
            self.lead = lead[lead.rows.text]
            self._send()
        if not (self.waiting or self.sent or self.whole):
            self._begin_tail()

    def _let_go(self) -> None:
        super()._let_go()
        for _, there in self.leaving:
            there.wait()  # the next session's clips come over in the same
        self.pair.finish(self.number)


@contextlib.contextmanager
def _deaf():
    """What is started meanwhile is deaf to Ctrl-C, which goes to a terminal's whole group, from its first moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device
