"""A process that perceives, beside this one that writes: orders to it, its news, and where clips cross.

Orders and news go through a pipe, pixels through trays of shared memory. Keys and values go into carriers that lie on
this process's device and that both have open: on GPUs a peer copy, between two or within one, on CPUs shared memory.
News of a clip comes when its carrier is full, so that nothing here ever waits for a transfer, and a process that has
died is noticed at the pipe. Knows nothing of what is perceived when: see `pipelined.py` on this side,
`perception_worker.py` on the other.
"""

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..common.errors import InputError
from .perception_worker import TO_ALL, perceive

LOADING = 900
"""Seconds that a model may take to load."""
CARRIERS = 3
"""Clips that may have come over and not be laid into pages yet."""
PIXEL_BUFFERS = CARRIERS + 1
"""Clips that may be on their way: one is being taken in for each carrier, and one waits."""


class PerceptionLost(RuntimeError):
    """The process that perceives has gone, or has failed: the message is one plain line."""


class PerceptionClient:
    """This process and one that perceives. It serves one session after the other, and is closed at the end."""

    def __init__(self, load: Callable[[], torch.nn.Module], patience: float = 60.0):
        """`load` makes the model in the other process, on its device; it has to be picklable. `patience` is how many
        seconds a clip, or its transfer, may take. Raises PerceptionLost, or InputError where `load` does."""
        context = multiprocessing.get_context("spawn")
        self.patience, self.sessions, self.current = patience, 0, None
        self.why_lost: str | None = None
        self.kv_buffers: list[Tensor] = []
        self.pixel_buffers: list[Tensor] = []
        """Bytes of clips, which take them in turn: one comes free when the clip in it has been taken in."""
        self.pipe, theirs = context.Pipe()
        self.closing: int | None = None
        """A session that is over, of which the other process has not said so yet."""
        self.process = context.Process(target=perceive, args=(theirs, load), daemon=True)
        with _deaf():
            self.process.start()
        # Where nobody closes it: it is deaf to the signal with which Python would end it.
        self.at_exit = Finalize(self, self.process.kill, exitpriority=0)
        theirs.close()
        self.orders: queue.Queue = queue.Queue()
        threading.Thread(target=self._send_orders, daemon=True).start()
        try:
            if (said := self.hear(LOADING)) is None:
                raise self._lost(f"has loaded no model for {LOADING} s")
            if said[0] == "refused":
                raise InputError(said[1])
        except BaseException:
            self._give_up()
            raise

    def order(self, *message, before: Callable[[], object] = lambda: None) -> None:
        """Send a message, once `before` has been called in the thread that sends."""
        if self.why_lost:
            raise PerceptionLost(self.why_lost)
        self.orders.put((before, ForkingPickler.dumps(message)))

    def _send_orders(self) -> None:
        # In a thread of its own: a process that does not read must not hold this one up, nor a large clip.
        try:
            while (order := self.orders.get()) is not None:
                before, message = order
                before()
                self.pipe.send_bytes(message)
        except OSError:
            pass  # gone: whoever listens for news hears of it
        except Exception as error:
            self._lost(f"could not be sent a clip ({error})")

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

    def open(self, kv_buffer: Tensor, largest: int, *what) -> int:
        """Begin a session, whose clips, of `largest` bytes at most, come over in carriers like `kv_buffer`."""
        if self.why_lost or not self.process.is_alive():
            raise InputError(self.why_lost or str(self._lost()))
        if self.current is not None:
            raise InputError("another session runs on this pair: close it first")
        while self.closing is not None:
            if (said := self.hear(self.patience)) is None:
                raise self.silent()
            if said == ("closed", self.closing):
                self.closing = None
        if not self.kv_buffers or _kind(self.kv_buffers[0]) != _kind(kv_buffer) or len(self.pixel_buffers[0]) < largest:
            self._lay_out(kv_buffer, largest)
        self.sessions += 1
        self.current = self.sessions
        self.order("open", self.current, *what)
        return self.current

    def _lay_out(self, kv_buffer: Tensor, largest: int) -> None:
        """Make carriers and trays, and let the other process open them."""
        try:
            kv_buffers = [torch.empty_like(kv_buffer) for _ in range(CARRIERS)]
            pixel_buffers = [torch.empty(largest, dtype=torch.uint8).share_memory_() for _ in range(PIXEL_BUFFERS)]
            self.order("carriers", None, [reduce_tensor(each) for each in kv_buffers], pixel_buffers)
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            near = 0 if kv_buffer.is_cuda else CARRIERS * kv_buffer.nbytes
            raise InputError(
                f"/dev/shm has no room for {(PIXEL_BUFFERS * largest + near) / 2**20:.1f} MiB, in which clips go "
                "over to the process that perceives: make it larger, or give clips fewer pixels"
            ) from error
        self.kv_buffers, self.pixel_buffers = kv_buffers, pixel_buffers

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
        self._give_up()

    def _give_up(self) -> None:
        self.process.kill()
        self.process.join()
        self.orders.put(None)
        self.why_lost = self.why_lost or "this pair was closed: start a new one"
        self.pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def _deaf():
    """What is started meanwhile is deaf, from its first moment, to signals that go to a whole group: whoever started it
    will say when to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in TO_ALL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device
