"""The processes of one run, on one machine or several: which video is whose, how far they are, and who was lost.

A video belongs to the process that asks for the next one first; the count is kept in a key-value store, torch's
TCPStore, on machine 0. Nothing else passes between processes, so none ever waits for another, and one that dies takes
nothing along but the videos it was working on. Knows nothing about models, videos and result files.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess

from qwen_vl_streaming.common.ending import explain, kill_workers, leave, let_workers_end, name, status_of
from qwen_vl_streaming.common.errors import InputError
from torch.distributed import DistError, TCPStore

POLL = 0.5
"""Seconds between two looks at the processes."""
LOST = 25.0
"""A machine that was not heard of for so many seconds is lost."""
GPU = "lower --batch-size, --memory or --max-pixels-per-video"
HOST = "lower --workers or --batch-size, or give it more memory"
"""What to do where memory runs out."""
LONGEST = 20_000
"""Characters of a traceback, which nobody reads from the pipe before its process has ended."""
PATIENCE = 600.0
"""Seconds that machine 0 has to be there, and to say what is to be done."""


class LostRun(Exception):
    """The run cannot go on here; the message is one line."""


@dataclass(frozen=True)
class Place:
    """Where a process stands: it is process `local` of machine `node`."""

    node: int = 0
    local: int = 0

    @property
    def name(self) -> str:
        return f"{self.node}-{self.local}"


class Crew:
    """The processes of this machine. They are forked at once, before this process has threads, files or a GPU that
    they would inherit, and wait for `work`. Leaving the context ends those that are left.

    With several machines, the crew on each is given the same `address` and `port` of machine 0.
    """

    def __init__(self, processes: int, nodes: int = 1, node: int = 0, address: str = "127.0.0.1", port: int = 0):
        self.nodes, self.node = nodes, node
        listening = None
        if node == 0:
            listening = _listen(port, to_others=nodes > 1)
            address, port = "127.0.0.1", listening.getsockname()[1]
        self.address, self.port = address, port
        context = get_context("fork")
        self.processes: list[tuple[Place, BaseProcess, connection.Connection]] = []
        """Those that have not ended."""
        try:
            for local in range(processes):
                ours, theirs = context.Pipe()
                place = Place(node, local)
                process = context.Process(target=_run, args=(place, os.getpid(), theirs, listening, address, port))
                self.processes.append((place, process, ours))
                process.start()
                theirs.close()
            if node:
                self._wait_for_machine_0()
            number = listening.detach() if listening else None
            self.store = TCPStore(address, port, is_master=node == 0, wait_for_workers=False, master_listen_fd=number)
        except BaseException:
            self.end()
            raise

    def _wait_for_machine_0(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return socket.create_connection((self.address, self.port), timeout=POLL).close()
            except OSError as error:
                if time.monotonic() > end:
                    raise InputError(
                        f"machine 0 cannot be reached at {self.address}, port {self.port} ({error.strerror}): "
                        "check MASTER_ADDR and MASTER_PORT, and start the same command there"
                    ) from None
                time.sleep(POLL)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def end(self) -> None:
        """End every process that is left, and those that it has started."""
        for _, process, _ in self.processes:
            if process.pid:
                _end(process)
        self.processes.clear()

    def announce(self, plan: dict) -> None:
        """Machine 0 says to the others what is to be done."""
        self.store.set("plan", json.dumps(plan))

    def plan(self) -> dict:
        """What machine 0 has announced. Waits for it; raises LostRun where machine 0 has ended."""
        with self._machine_0():
            while not self.store.check(["plan"]):  # unlike `get`, this can be interrupted
                time.sleep(POLL)
            return json.loads(self.store.get("plan"))

    def work(self, function: Callable[..., None], *arguments: object, count: int, moved: Callable[[int], object]):
        """Have every process call `function(*arguments, place, claims, tell)` and wait for all, on machine 0 for those
        of the other machines too. `claims` yields 0, 1, 2 …, each number in one process of all, of which the first
        `count` are to be worked on; `tell()` is to be called when that is done, and on machine 0 `moved` is called with
        the sum of that every now and then.

        Returns a line for each process that was lost. Raises InputError, when all have ended, with what one of this
        machine's processes has raised; LostRun where machine 0 has ended.
        """
        for _, _, pipe in self.processes:
            with contextlib.suppress(BrokenPipeError):  # it has died already, and that will be seen
                pipe.send((function, arguments))
        with self._machine_0():
            lost, refused = self._follow(count, moved)
        if refused:
            raise InputError(refused)
        return lost

    def _follow(self, count: int, moved: Callable[[int], object]) -> tuple[list[str], str]:
        lost, refused = [], ""
        others = {node: (0, time.monotonic()) for node in range(1, self.nodes)} if self.node == 0 else {}
        while self.processes or others:
            time.sleep(POLL)
            for one in [one for one in self.processes if _has_ended(one[1])]:
                place, process, pipe = one
                _end(process)
                self.processes.remove(one)
                line, trace = _last_words(pipe)
                if process.exitcode == 2:
                    refused = refused or line
                elif process.exitcode:
                    if not lost and trace:  # that of one is enough: the others have mostly met the same
                        print(trace, file=sys.stderr)
                    lost.append(_obituary(place, process.exitcode, self.nodes) + (line and f" ({line})"))
            if self.node:
                self.store.add(f"beat {self.node}", 1)
                continue
            done = self.store.add("done", 0)
            moved(done)
            lost += self._look_after(others, done == count)
        if self.node:
            self.store.set(f"ended {self.node}", json.dumps(lost + [refused] * bool(refused)))
        return lost, refused

    def _look_after(self, others: dict[int, tuple[int, float]], complete: bool) -> list[str]:
        """Take machines that have ended or are lost out of `others`, and where the work is `complete` those that never
        came; returns a line for each process lost there."""
        lost, now = [], time.monotonic()
        for node, (beats, when) in list(others.items()):
            if self.store.check([f"ended {node}"]):
                lost += json.loads(self.store.get(f"ended {node}"))
                del others[node]
            elif (heard := self.store.add(f"beat {node}", 0)) != beats:
                others[node] = heard, now
            elif now - when > LOST:
                if beats or not complete:
                    lost.append(f"machine {node} did not answer for {LOST:.0f} s")
                del others[node]
        return lost

    @contextlib.contextmanager
    def _machine_0(self) -> Iterator[None]:
        try:
            yield
        except DistError as error:
            raise LostRun("machine 0, which leads the run, has ended") from error


def _listen(port: int, to_others: bool) -> socket.socket:
    """A listening socket: for other machines at `port`, else for this one alone at any that is free."""
    if not to_others:
        return socket.create_server(("127.0.0.1", 0))
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", port), **both)
    except OSError as error:
        raise InputError(f"port {port} cannot be listened to ({error.strerror}): give another MASTER_PORT") from None


def _run(place: Place, parent: int, pipe: connection.Connection, listening, address: str, port: int) -> None:
    """A process of the crew, from its beginning to its end."""
    os.setsid()  # by its group it is ended together with the processes that decode for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if listening:
        listening.close()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        function, arguments = pipe.recv()
    except EOFError:  # whoever leads the run has ended, and says why
        leave(1)
    try:
        store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        claims = iter(lambda: store.add("claimed", 1) - 1, None)
        function(*arguments, place, claims, lambda: store.add("done", 1))
    except DistError:  # here too
        leave(1)
    except Exception as error:
        let_workers_end()
        line = explain(error, GPU, HOST)
        trace = "" if line else "".join(traceback.format_exception(error))[-LONGEST:]
        with contextlib.suppress(OSError):
            pipe.send((line or name(error), trace))
        leave(status_of(error))
    kill_workers()


def _end_with(parent: int) -> None:
    """A parent that is killed cannot end its children."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os.killpg(0, signal.SIGKILL)


def _has_ended(process: BaseProcess) -> bool:
    # Its sentinel would be held open by the processes that decode for it; and its number stays its own until `_end`.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: BaseProcess) -> None:
    """End a process, if it has not, and those that it has started."""
    with contextlib.suppress(ProcessLookupError):  # it has no group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _last_words(pipe: connection.Connection) -> tuple[str, str]:
    """Why a process has ended, in a line, and its traceback where that is not known; empty where it has not said."""
    try:
        return pipe.recv() if pipe.poll() else ("", "")
    except (EOFError, OSError):
        return "", ""


def _obituary(place: Place, code: int, nodes: int) -> str:
    where = f" of machine {place.node}" if nodes > 1 else ""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"process {place.local}{where} {how}"
