"""torchrun, which ends as a whole: whatever ends one process ends all within seconds, one line says why, and the exit
status is 2 where a process refused its input, 128 + N after signal N, and else 1.

SIGTERM is handed on to the processes, which save and end, however long that takes: torchrun would give them 30 seconds.
When the launcher is killed they are killed with it.

With torchrun's `--max_restarts N` on a single node, a process that was killed, by Linux for memory or by a crash in C,
does not end the run: all processes start again, at most N times. One that raised an error would raise it again.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import NoReturn

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import PContext, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from ..common.ending import leave, say
from .nodes import Nodes
from .signals import LAUNCHER, RESUMES, STOPPED

CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals after which a process may start again."""
RESTARTS = "QWENVL_RESTARTS"
"""Environment variable: how often this launcher has started its processes again."""
GRACE = 10
"""Seconds that the others have to end by themselves when one process has failed."""
GRACE_AFTER_PEER = 3
"""The same where that one has waited for them already."""
MEMORY = " (Linux does that when memory is short)"


@dataclass(frozen=True)
class Failure:
    """How a process ended that was the first to fail."""

    rank: int
    exit_code: int
    """Of the process; -N where signal N has killed it."""
    told: dict
    """What it has told, see `failing.tell`; empty where it had no time to."""

    @property
    def killed(self) -> str:
        """For a process that a signal has killed."""
        killer = signal.Signals(-self.exit_code)
        return f"process {self.rank} was killed by {killer.name}{MEMORY if killer == signal.SIGKILL else ''}"

    @property
    def status(self) -> int:
        """For the launcher to end with."""
        status = self.told.get("errorCode", self.exit_code)
        return status if status in (2, STOPPED) else 1

    @property
    def crashed(self) -> bool:
        """Whether the process was killed from outside or by a fault in C, and not by an error that it reported."""
        return not self.told and -self.exit_code in CRASHES

    @property
    def line(self) -> str:
        """Empty where there is nothing to say: it was stopped, or has refused its input in words of its own."""
        if self.told:
            refused = self.status == 2
            return self.told["message"] if refused else f"process {self.rank}: {self.told['message']}"
        if self.exit_code < 0:
            killer = signal.Signals(-self.exit_code)
            if killer == signal.SIGALRM:  # see `failing.AT_EXIT`
                return f"process {self.rank} was done, but did not end: what it was to save is saved"
            return f"{self.killed}{RESUMES}"
        return f"process {self.rank} ended with status {self.exit_code}{RESUMES}" if self.status == 1 else ""


class Launcher:
    """What this launcher knows of its run, and the one place where it ends."""

    def __init__(self, node: int, nodes: int, address: str, port: int):
        self.asked_to_stop = threading.Event()
        self.first: Failure | None = None
        self.logs = tempfile.TemporaryDirectory(prefix="qwenvl_", ignore_cleanup_errors=True)
        """Where processes tell why they fail."""
        self.lock = threading.Lock()
        """Whoever holds it ends this process."""
        self.nodes = Nodes(node, nodes, address, port, self.another_failed)

    def saw(self, context: SubprocessContext) -> None:
        """Processes are about to be ended: if that is because some have failed, keep in mind which was the first."""
        failures = []
        for local, handler in context.subprocess_handlers.items():
            if handler.proc.returncode:
                told = {}
                with contextlib.suppress(OSError, ValueError), open(context.error_files[local]) as file:
                    told = json.load(file)["message"]
                failures.append(Failure(int(context.envs[local]["RANK"]), handler.proc.returncode, told))
        if self.first or not failures:
            return
        self.first = min(failures, key=lambda failure: failure.told.get("lost_peer", False))
        if not self.stopped and not self.first.told.get("lost_peer"):
            where = "" if self.first.status == 2 else f"machine {self.nodes.node}, "
            self.nodes.fail(self.first.status, f"{where}{self.first.line or 'another machine has refused its input'}")

    @property
    def stopped(self) -> bool:
        """Whether the run has ended as SIGTERM has asked it to."""
        first = self.first
        early = self.asked_to_stop.is_set() and first and first.exit_code == -signal.SIGTERM  # or after its last step
        return bool(first and (early or first.told.get("errorCode", first.exit_code) == STOPPED))

    def another_failed(self, status: int, line: str) -> None:
        """A process of this machine may wait for ever for one of the machine that has failed."""
        self.end(status, f"error: {line}")

    def end(self, status: int, *lines: str) -> NoReturn:
        """End this process with `status`, those that it has started, and this machine's part in the run."""
        self.lock.acquire()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
        self.kill(*lines)
        if status in (0, STOPPED):
            self.nodes.end()
        else:
            self.nodes.fail(1, f"machine {self.nodes.node} ended with status {status}{RESUMES}")
        self.logs.cleanup()
        leave(status)

    def kill(self, *lines: str) -> None:
        """Print `lines`, and kill the processes that are left."""
        with contextlib.suppress(OSError):  # nobody reads it any more
            for line in filter(None, lines):
                print(line, file=sys.stderr, flush=True)
        for child in psutil.Process().children():
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)

    def restart(self, restarts: int) -> NoReturn:
        """Start the run again, in this process, after its first failure."""
        self.lock.acquire()
        self.kill(f"{self.first.killed}: starting again")
        self.logs.cleanup()
        os.environ[RESTARTS] = str(restarts + 1)
        os.execv(sys.executable, sys.orig_argv)

    def hand_on(self, signals: socket.socket) -> None:
        """Hand SIGTERM on for ever; end at once with STOPPED where there is no process yet, or none any more."""
        while number := signals.recv(1):
            if number[0] != signal.SIGTERM:
                continue
            self.asked_to_stop.set()
            children = psutil.Process().children()
            if not children:
                waiting = " while waiting for the other machines" if self.nodes.nodes > 1 else ""
                self.end(STOPPED, f"stopped by SIGTERM{waiting}")
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                    child.send_signal(signal.SIGTERM)

    def watch_for_sigterm(self) -> None:
        """Have a thread see SIGTERM: the main one may wait for other machines where Python runs no handler."""
        signals, ours = socket.socketpair()
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.detach())
        threading.Thread(target=self.hand_on, args=(signals,), daemon=True).start()
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def run(self, arguments: list[str]) -> NoReturn:
        """Launch the processes, and end with them."""

        def close(context: SubprocessContext, death_sig: signal.Signals | None = None, timeout: int = GRACE) -> None:
            self.saw(context)
            others = GRACE_AFTER_PEER if self.first and self.first.told.get("lost_peer") else GRACE
            PContext.close(context, death_sig, min(timeout, others))

        SubprocessContext.close = close  # torchrun gives no other way to set how long it waits
        given = parse_args(["--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT", "--log_dir", self.logs.name, *arguments])
        most, given.max_restarts = given.max_restarts, 0  # torchrun would restart after every kind of failure
        restarts = int(os.environ.get(RESTARTS, 0))
        try:
            run(given)
        except DistError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self.end(2, f"error: no place to meet ({reason}): check MASTER_ADDR, or give another MASTER_PORT")
        except SignalException as error:
            self.end(128 + error.sigval, f"stopped by {error.sigval.name}{RESUMES}")
        except KeyboardInterrupt:  # before it has started processes
            self.end(128 + signal.SIGINT, "stopped by SIGINT")
        except ChildFailedError:
            first = self.first
            if self.stopped:
                early = first.exit_code == -signal.SIGTERM  # it had not begun
                self.end(STOPPED, "" if first.told else f"stopped by SIGTERM{'' if early else RESUMES}")
            if first.crashed and restarts < most and self.nodes.nodes == 1 and not self.asked_to_stop.is_set():
                self.restart(restarts)
            if first.told.get("lost_peer"):
                self.nodes.wait_for_news()
            trace = first.told.get("extraInfo", {}).get("py_callstack", "").rstrip()
            self.end(first.status, trace, first.line and f"error: {first.line}")
        except Exception as error:
            say(error, None)
            self.end(1)
        self.end(0)


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    given = parse_args(sys.argv[1:])
    nodes = int(given.nnodes.split(":")[-1])
    launcher = Launcher(given.node_rank, nodes, given.master_addr, given.master_port)
    launcher.watch_for_sigterm()
    launcher.run(sys.argv[1:])
