"""The connection to the perception process: starts it, sends it messages, receives its messages, owns shared buffers.

Messages go through a pipe, pixels through shared memory (`pixel_buffers`). Keys and values come back in KV transfer
buffers on this process's device that both processes have open: on GPUs by a peer copy, between two or within one; on
CPUs in shared memory. A clip is reported when its buffer is full, so that this process never waits for a transfer. A
process that has died is noticed at the pipe. Knows nothing of what is computed when: see `pipelined.py` for this side,
`perception_worker.py` for the other.
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
from .perception_worker import GROUP_SIGNALS, perceive

LOAD_SECONDS = 900
"""How long a model may take to load, and a session to open, before which steps are compiled."""
KV_BUFFERS = 3
"""Clips that may have been received and not copied into the cache yet."""
PIXEL_BUFFERS = KV_BUFFERS + 1
"""Clips that may have been sent and not received: one for each KV transfer buffer, and one that waits."""


class PerceptionLost(RuntimeError):
    """The perception process has died or failed. The message is one plain line."""


class PerceptionClient:
    """Starts a perception process and connects to it. It serves one session after another, until it is closed."""

    def __init__(self, load: Callable[[], torch.nn.Module], patience: float = 60.0):
        """Args:
            load: Loads the model in the other process, on its device; must be picklable.
            patience: Seconds that a clip or its transfer may take, once the session is open.

        Raises PerceptionLost if the process dies, InputError if `load` raises one.
        """
        context = multiprocessing.get_context("spawn")
        self.patience, self.sessions, self.current = patience, 0, None
        self.why_lost: str | None = None
        self.kv_buffers: list[Tensor] = []
        self.pixel_buffers: list[Tensor] = []
        """Bytes of clips, used in turn: one is free again once the clip in it has been received."""
        self.pipe, theirs = context.Pipe()
        self.closing: int | None = None
        """A session that is over and that the other process has not confirmed as closed."""
        self.loaded = False
        self.opened = 0
        """The newest session that the other process has opened."""
        self.process = context.Process(target=perceive, args=(theirs, load), daemon=True)
        with group_signals_ignored():
            self.process.start()
        # If nobody closes it: the process ignores SIGTERM, by which Python would stop a daemon.
        self.at_exit = Finalize(self, self.process.kill, exitpriority=0)
        theirs.close()
        self.outbox: queue.Queue = queue.Queue()
        threading.Thread(target=self._send_all, daemon=True).start()
        try:
            if (message := self.receive(LOAD_SECONDS)) is None:
                raise self._lost(f"has not loaded its model within {LOAD_SECONDS} s")
            if message[0] == "refused":
                raise InputError(message[1])
            self.loaded = True
        except BaseException:
            self._kill()
            raise

    def send(self, *message, before: Callable[[], object] = lambda: None) -> None:
        """Send a message, after calling `before` in the sending thread."""
        if self.why_lost:
            raise PerceptionLost(self.why_lost)
        self.outbox.put((before, ForkingPickler.dumps(message)))

    def _send_all(self) -> None:
        # In a thread: neither a process that does not read nor a large clip may block this one.
        try:
            while (entry := self.outbox.get()) is not None:
                before, message = entry
                before()
                self.pipe.send_bytes(message)
        except OSError:
            pass  # the process has died, which `receive` reports
        except Exception as error:
            self._lost(f"could not be sent a clip ({error})")

    def receive(self, seconds: float) -> tuple | None:
        """The next message, or None if none comes within `seconds`. Raises PerceptionLost."""
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
                if code > 0 and not self.loaded:
                    fault += ' (a script must start it below `if __name__ == "__main__":`)'
        self.why_lost = f"the perception process ({self.process.pid}) {fault}: start a new PerceptionClient"
        return PerceptionLost(self.why_lost)

    def silent(self, seconds: float | None = None) -> PerceptionLost:
        """The error for a process that lives but has sent nothing for `seconds`; default: `patience`."""
        return self._lost(f"has sent nothing for {self.patience if seconds is None else seconds:g} s")

    def _wait_for(self, kind: str, session: int) -> None:
        """Wait until the other process reports that it has "opened" or "closed" a `session`. What it has sent of the
        session before is dropped."""
        message = None
        while message != (kind, session):
            seconds = self.patience if self.opened == session else LOAD_SECONDS
            if (message := self.receive(seconds)) is None:
                raise self.silent(seconds)
            if message[0] == "opened":
                self.opened = message[1]

    def open(self, kv_buffer: Tensor, clip_bytes: int, *what) -> int:
        """Begin a session, whose clips have `clip_bytes` bytes at most and come back in buffers like `kv_buffer`. Waits
        until the other process has opened it. Returns its number. Raises InputError if another session is open, or if
        shared memory is full."""
        if self.why_lost or not self.process.is_alive():
            raise InputError(self.why_lost or str(self._lost()))
        if self.current is not None:
            raise InputError("another session uses this PerceptionClient: close it first")
        if self.closing is not None:
            self._wait_for("closed", self.closing)
            self.closing = None
        fits = self.kv_buffers and _kind(self.kv_buffers[0]) == _kind(kv_buffer)
        if not fits or len(self.pixel_buffers[0]) < clip_bytes:
            self._make_buffers(kv_buffer, clip_bytes)
        self.sessions += 1
        self.current = self.sessions
        self.send("open", self.current, *what)
        try:
            self._wait_for("opened", self.current)
        except BaseException:
            self.finish(self.current)
            raise
        return self.current

    def _make_buffers(self, kv_buffer: Tensor, clip_bytes: int) -> None:
        """Allocate the shared buffers and let the other process open them."""
        try:
            kv_buffers = [torch.empty_like(kv_buffer) for _ in range(KV_BUFFERS)]
            pixel_buffers = [torch.empty(clip_bytes, dtype=torch.uint8).share_memory_() for _ in range(PIXEL_BUFFERS)]
            self.send("buffers", None, [reduce_tensor(each) for each in kv_buffers], pixel_buffers)
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            for_kv = 0 if kv_buffer.is_cuda else KV_BUFFERS * kv_buffer.nbytes
            raise InputError(
                f"/dev/shm has less than {(PIXEL_BUFFERS * clip_bytes + for_kv) / 2**20:.1f} MiB free, needed "
                "to send clips to the perception process: enlarge it, or use fewer pixels per clip"
            ) from error
        self.kv_buffers, self.pixel_buffers = kv_buffers, pixel_buffers

    def finish(self, session: int) -> None:
        """End `session`; clips that are under way are dropped. Does not wait, and does not raise if the process is
        lost."""
        if session == self.current:
            self.current = None
            with contextlib.suppress(PerceptionLost):
                self.send("close", session)
                self.closing = session

    def close(self) -> None:
        """Stop the process."""
        if self.process.is_alive() and not self.why_lost:
            self.send("stop", None)
            self.process.join(5)
        self._kill()

    def _kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.outbox.put(None)
        self.why_lost = self.why_lost or "this PerceptionClient was closed: start a new one"
        self.pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def group_signals_ignored():
    """A process started inside ignores signals to the whole process group from its first moment: this process decides
    when it stops."""
    if threading.current_thread() is not threading.main_thread():  # which alone can set handlers
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in GROUP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device
