"""Perception in a process of its own: it takes clips in and hands over their keys and values, each clip's in one
transfer, while this process writes.

Orders and news go through a pipe, keys and values through a process group of the two. A transfer begins only after its
news, so that a process that has died is noticed at the pipe, and nothing waits for it.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor, distributed

from .errors import InputError
from .feed import Feed
from .passes import AHEAD, Passes
from .session import Session, Word
from .variants import get_variant

HOST = "127.0.0.1"
LOADING = 900
"""Seconds that a model may take to load."""


class PerceptionLost(RuntimeError):
    """The process that perceives has gone, or has failed: the message is one plain line."""


class Pair:
    """This process and one that perceives. It serves one session after the other, and is closed at the end."""

    def __init__(self, load: Callable[[], torch.nn.Module], patience: float = 60.0):
        """`load` makes the model in the other process, on its device; it has to be picklable. `patience` is how many
        seconds a clip, or its transfer, may take. Raises PerceptionLost, or InputError where `load` does."""
        context = multiprocessing.get_context("spawn")
        self.patience, self.sessions, self.current, self.owed = patience, 0, None, False
        self.why_lost: str | None = None
        self.pipe, theirs = context.Pipe()
        store = distributed.TCPStore(HOST, 0, 2, True, timedelta(seconds=patience), wait_for_workers=False)
        self.process = context.Process(target=_perceive, args=(theirs, store.port, load, patience), daemon=True)
        self.process.start()
        theirs.close()
        self.orders: queue.Queue = queue.Queue()
        threading.Thread(target=self._send_orders, daemon=True).start()
        if (said := self.hear(LOADING)) is None:
            raise self._lost(f"has loaded no model for {LOADING} s")
        if said[0] == "refused":
            self.process.join()
            raise InputError(said[1])
        self.group = _group(store, 0, said[1], patience)

    def order(self, *message) -> None:
        if self.why_lost:
            raise PerceptionLost(self.why_lost)
        self.orders.put(message)

    def _send_orders(self) -> None:
        # In a thread of its own: a process that does not read must not hold this one up.
        with contextlib.suppress(OSError):  # gone: whoever listens for news hears of it
            while (message := self.orders.get()) is not None:
                self.pipe.send(message)

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
        self.owed = message[0] == "whole"
        return message

    def receive(self, carrier: Tensor) -> None:
        """What was announced by "whole", into `carrier`."""
        try:
            self.group.recv([carrier], 1, 0).wait()
        except RuntimeError as error:
            raise self._lost() from error
        self.owed = False

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

    def open(self, *what) -> int:
        if self.why_lost or not self.process.is_alive():
            raise InputError(self.why_lost or str(self._lost()))
        if self.current is not None:
            raise InputError("another session runs on this pair: close it first")
        self.sessions += 1
        self.current = self.sessions
        self.order("open", self.current, *what)
        return self.current

    def finish(self, session: int, carrier: Tensor) -> None:
        """End `session`: what is still on its way goes into `carrier`, unseen. Says nothing where all is lost."""
        if session != self.current:
            return
        self.current = None
        try:
            if self.owed:
                self.receive(carrier)
            self.order("close", session)
            while (said := self.hear(self.patience)) != ("closed", session):
                if said is None:
                    raise self.silent()
                self.receive(carrier)
        except PerceptionLost:
            return

    def close(self) -> None:
        """Stop the other process."""
        if self.process.is_alive() and not self.why_lost:
            self.order("stop")
            self.process.join(5)
        self.process.kill()
        self.process.join()
        self.orders.put(None)
        self.group.shutdown()  # its threads, left to the interpreter's end, sometimes abort it
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
        self.sent: collections.deque[bool] = collections.deque()
        """Of each clip that was sent and has not come over, whether it is the last."""
        self.whole: collections.deque[bool] = collections.deque()
        """The same of each clip that has come over and that no slot has begun with."""
        self.carrier = self.passes.carrier(self.layout)
        self.number = self.pair.open(
            self.variant.name, self.template, self.layout, self.max_clips, self.chunk, self.window
        )

    def feed(self, clip: Tensor, last: bool = False) -> None:
        super().feed(clip, last)
        with self.whatever_happens():
            self._send()

    def step(self) -> Word | None:
        word = super().step()
        if word is None and not self.closed and not self.coming and not self._may_speak() and self.sent:
            with self.whatever_happens():
                if not self.whole and not self._receive(self.pair.patience):
                    raise self.pair.silent()
        return word

    def looks_due(self) -> list:
        return []

    def _clips_to_come(self) -> bool:
        return super()._clips_to_come() or bool(self.sent or self.whole)

    def _send(self) -> None:
        """Let perception have what it can place: where a clip's positions depend on what slots write, and that is not
        agreed beforehand, only when the slot before it begins. No more than a window has room for."""
        held = self.greedy and self.variant.count == "rounds"
        most = 1 if held else float("inf") if self.window is None else AHEAD
        while self.waiting and not self.done and (ahead := len(self.sent) + len(self.whole)) < most:
            if held:
                counts = [*self.counts]
            else:
                slots = len(self.counts) + ahead
                counts = [0 if self.greedy else self._quota(slot + 1) for slot in range(slots)]
            clip, last = self.waiting.popleft()
            self.sent.append(last)
            raw = clip.to(self.model.dtype).cpu().contiguous().view(torch.uint8).numpy()
            self.pair.order("clip", self.number, raw, last, counts)

    def _receive(self, seconds: float) -> bool:
        """Take what has come over, waiting for at most `seconds`. Returns whether anything has."""
        if self.pair.hear(seconds) is None:
            return False
        self.pair.receive(self.carrier)
        last = self.sent.popleft()
        self.passes.copy_in(self.seat, self.sight.clip(last), self.carrier)
        self.whole.append(last)
        return True

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
        self.pair.finish(self.number, self.carrier)


def _group(store, rank: int, device: str, patience: float):
    """The two processes' own process group, beside any that the program has."""
    seconds = timedelta(seconds=patience)
    if device == "cuda":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = seconds
        return distributed.ProcessGroupNCCL(store, rank, 2, options)
    return distributed.ProcessGroupGloo(store, rank, 2, seconds)


# The other process


def _perceive(pipe: Connection, port: int, load: Callable, patience: float) -> None:
    """Serve a Pair until it says stop, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it will say when to stop
    orders: queue.Queue = queue.Queue()
    closed = [0]

    def read() -> None:
        # In a thread of its own: the pipe never fills up while a transfer waits for the other side.
        while True:
            try:
                order = pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            if order[0] == "close":
                closed[0] = order[1]
            orders.put(order)

    threading.Thread(target=read, daemon=True).start()
    try:
        model = load()
    except InputError as error:
        pipe.send(("refused", str(error)))
        return
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    pipe.send(("loaded", model.device.type))
    try:
        store = distributed.TCPStore(HOST, port, 2, False, timedelta(seconds=patience))
        group = _group(store, 1, model.device.type, patience)
        _serve(model, orders, closed, pipe, group)
    except BaseException as error:
        lines = str(error).splitlines()
        pipe.send(("fault", f"failed ({lines[0] if lines else type(error).__name__})"))
        raise


def _serve(model, orders: queue.Queue, closed: list[int], pipe: Connection, group) -> None:
    sizes, passes, seat, sight = None, None, None, None
    sending: collections.deque = collections.deque()
    """Transfers under way, and what they carry: while one is waited for, the next clip is taken in."""
    carriers: list[Tensor] = []
    while (order := orders.get())[0] != "stop":
        kind, session, *what = order
        if kind == "close":
            while sending:
                sending.popleft().wait()
            pipe.send(("closed", session))
        elif session <= closed[0]:
            continue
        elif kind == "open":
            name, template, layout, clips, chunk, window = what
            if sizes != (layout, clips, chunk, window):
                passes = Passes.single(model, layout, clips, 1, chunk, 1.0, window)
                passes.warm_up()
                passes.tower.record(layout.grid, [1])
                carriers, sizes, seat = [passes.carrier(layout) for _ in range(2)], (layout, clips, chunk, window), None
            if seat is not None:
                passes.release(seat)
            seat = passes.take(template, layout, clips, 1, window)
            passes.feed(seat, Feed.prompt(get_variant(name), template, layout, window))
            sight = Feed(get_variant(name), template, layout, window)
        else:
            raw, last, counts = what
            clip = torch.from_numpy(raw).view(model.dtype)
            passes.show(seat, *passes.tower.look([clip], [layout]))
            sight.stream.counts[:] = counts
            due = sight.clip(last)
            due = due[due.rows.visual]
            passes.feed(seat, due)
            if len(sending) == len(carriers):
                sending.popleft().wait()
            carriers.append(carriers.pop(0))
            passes.copy_out(seat, due, carriers[-1])
            if model.device.type == "cuda":
                there = torch.cuda.Event()
                there.record()
                there.synchronize()  # a transfer that was announced must not wait
            pipe.send(("whole", session, len(counts) + 1))
            sending.append(group.send([carriers[-1]], 0, 0))
