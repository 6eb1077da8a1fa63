"""Runs torchrun and ends all processes together: when one fails, all end within seconds, and one line names the cause.

Exit status: 0 on success, 2 if a process rejected its input, 128 + N if signal N stopped the run, 1 for other failures.

SIGTERM is forwarded to the processes. They save and exit without a time limit; torchrun would allow 30 seconds. If the
launcher is killed, its processes are killed too.

With torchrun's `--max_restarts N` on a single node, a process that is killed, for example by Linux when memory is short
or by a crash in native code, does not end the run: all processes are restarted, at most N times. A process that raises
an error is not restarted, because it would raise the same error again.
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

from ..common.ending import leave, print_error
from ..common.errors import first_line
from .nodes import Nodes
from .signals import LAUNCHER, RESUMES, STOPPED

CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals after which the processes can be restarted."""
RESTARTS = "QWENVL_RESTARTS"
"""Environment variable: how many times this launcher has restarted its processes."""
GRACE = 10
"""Seconds that the other processes have to exit by themselves after one has failed."""
GRACE_AFTER_PEER = 3
"""Replaces GRACE if the failed process lost its connection to another one: it has then already waited."""
MEMORY = " (Linux does this when it runs out of memory)"


@dataclass(frozen=True)
class Failure:
    """How the first process that failed has ended."""

    rank: int
    exit_code: int
    """Exit code of the process; -N if signal N killed it."""
    report: dict
    """The report that the process wrote, see `failing.report`; empty if it wrote none."""

    @property
    def killed(self) -> str:
        """A message for a process that a signal has killed."""
        killer = signal.Signals(-self.exit_code)
        return f"process {self.rank} was killed by {killer.name}{MEMORY if killer == signal.SIGKILL else ''}"

    @property
    def status(self) -> int:
        """Exit status of the launcher."""
        status = self.report.get("errorCode", self.exit_code)
        return status if status in (2, STOPPED) else 1

    @property
    def crashed(self) -> bool:
        """Whether the process was killed from outside or crashed in native code, without reporting an error."""
        return not self.report and -self.exit_code in CRASHES

    @property
    def line(self) -> str:
        """The error in one line; empty if the process was stopped, or rejected its input and printed the reason."""
        if self.report:
            refused = self.status == 2
            return self.report["message"] if refused else f"process {self.rank}: {self.report['message']}"
        if self.exit_code < 0:
            killer = signal.Signals(-self.exit_code)
            if killer == signal.SIGALRM:  # see `failing.CLEANUP_TIMEOUT`
                return f"process {self.rank} finished but did not exit; its results are saved"
            return f"{self.killed}{RESUMES}"
        return f"process {self.rank} ended with status {self.exit_code}{RESUMES}" if self.status == 1 else ""


class Launcher:
    """State of a run. `end` is the only method that exits the launcher."""

    def __init__(self, node: int, nodes: int, address: str, port: int):
        self.stop_requested = threading.Event()
        self.first: Failure | None = None
        self.logs = tempfile.TemporaryDirectory(prefix="qwenvl_", ignore_cleanup_errors=True)
        """Folder in which the processes report their errors."""
        self.lock = threading.Lock()
        """Acquired once, by the thread that ends or restarts this process, and never released."""
        self.nodes = Nodes(node, nodes, address, port, self.end_after_other_node)

    def record_failure(self, context: SubprocessContext) -> None:
        """Record the first failure, if there is one, before torchrun ends the remaining processes.

        A process that only lost its connection to another one is recorded only if no other process has failed.
        """
        failures = []
        for local, handler in context.subprocess_handlers.items():
            if handler.proc.returncode:
                report = {}
                with contextlib.suppress(OSError, ValueError), open(context.error_files[local]) as file:
                    report = json.load(file)["message"]
                failures.append(Failure(int(context.envs[local]["RANK"]), handler.proc.returncode, report))
        if self.first or not failures:
            return
        first = self.first = min(failures, key=lambda failure: failure.report.get("lost_peer", False))
        if not self.stopped and not first.report.get("lost_peer"):
            where = "" if first.status == 2 else f"node {self.nodes.node}, "
            line = f"{where}{first.line or 'another node rejected its input'}"
            self.nodes.fail(first.status, line, started=True)

    @property
    def stopped(self) -> bool:
        """Whether the run has ended because of SIGTERM."""
        first = self.first
        early = self.stop_requested.is_set() and first and first.exit_code == -signal.SIGTERM  # or after its last step
        return bool(first and (early or first.report.get("errorCode", first.exit_code) == STOPPED))

    def end_after_other_node(self, status: int, line: str) -> None:
        """End the run on this node: its processes could wait forever for those of the node that has failed."""
        self.end(status, f"error: {line}")

    def end(self, status: int, *lines: str) -> NoReturn:
        """Kill the processes of this node, notify the other nodes, and exit with `status`."""
        self.lock.acquire()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
        self.kill(*lines)
        if status in (0, STOPPED):
            self.nodes.end()
        else:
            self.nodes.fail(1, f"node {self.nodes.node} ended with status {status}{RESUMES}")
        self.logs.cleanup()
        leave(status)

    def kill(self, *lines: str) -> None:
        """Print `lines` and kill the remaining processes."""
        with contextlib.suppress(OSError):  # stderr may be closed
            for line in filter(None, lines):
                print(line, file=sys.stderr, flush=True)
        for child in psutil.Process().children():
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)

    def restart(self, first: Failure, restarts: int) -> NoReturn:
        """Restart the run after failure `first`. The new launcher replaces this process and keeps its process id."""
        self.lock.acquire()
        self.kill(f"{first.killed}: restarting")
        self.logs.cleanup()
        os.environ[RESTARTS] = str(restarts + 1)
        os.execv(sys.executable, sys.orig_argv)

    def forward_signals(self, signals: socket.socket) -> None:
        """Forward SIGTERM to the processes, in a loop. If none is running, exit immediately with STOPPED."""
        while number := signals.recv(1):
            if number[0] != signal.SIGTERM:
                continue
            self.stop_requested.set()
            children = psutil.Process().children()
            if not children:
                waiting = " while waiting for the other nodes" if self.nodes.nodes > 1 else ""
                self.end(STOPPED, f"stopped by SIGTERM{waiting}")
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):  # it may have just ended
                    child.send_signal(signal.SIGTERM)

    def watch_for_sigterm(self) -> None:
        """Receive SIGTERM in a thread: Python runs no handler while the main thread waits for other nodes."""
        signals, ours = socket.socketpair()
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.detach())
        threading.Thread(target=self.forward_signals, args=(signals,), daemon=True).start()
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def run(self, arguments: list[str]) -> NoReturn:
        """Launch the processes and exit when they have ended."""

        def close(context: SubprocessContext, death_sig: signal.Signals | None = None, timeout: int = GRACE) -> None:
            self.record_failure(context)
            others = GRACE_AFTER_PEER if self.first and self.first.report.get("lost_peer") else GRACE
            PContext.close(context, death_sig, min(timeout, others))

        # torchrun has no option for how long it waits. Only the name of the first parameter differs.
        SubprocessContext.close = close  # pyright: ignore[reportAttributeAccessIssue]
        given = parse_args(["--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT", "--log_dir", self.logs.name, *arguments])
        most, given.max_restarts = given.max_restarts, 0  # torchrun would restart after any failure
        restarts = int(os.environ.get(RESTARTS, 0))
        try:
            run(given)
        except DistError as error:
            reason = first_line(error)
            self.end(2, f"error: cannot connect the processes ({reason}): check MASTER_ADDR, or change MASTER_PORT")
        except SignalException as error:
            self.end(128 + error.sigval, f"stopped by {error.sigval.name}{RESUMES}")
        except KeyboardInterrupt:  # no process has been started yet
            self.end(128 + signal.SIGINT, "stopped by SIGINT")
        except ChildFailedError:
            first = self.first
            assert first is not None  # torchrun has called `close`, and with it `record_failure`
            if self.stopped:
                early = first.exit_code == -signal.SIGTERM  # it had not started the program yet
                self.end(STOPPED, "" if first.report else f"stopped by SIGTERM{'' if early else RESUMES}")
            if first.crashed and restarts < most and self.nodes.nodes == 1 and not self.stop_requested.is_set():
                self.restart(first, restarts)
            if first.report.get("lost_peer"):
                self.nodes.wait_for_failure()
            trace = first.report.get("extraInfo", {}).get("py_callstack", "").rstrip()
            self.end(first.status, trace, first.line and f"error: {first.line}")
        except Exception as error:
            print_error(error, None)
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
