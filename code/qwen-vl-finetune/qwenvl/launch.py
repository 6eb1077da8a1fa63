"""torchrun, whose exit status says what went wrong: 2 where a process refused its input with one plain line.

SIGTERM is handed on to the processes, which save and end, however long that takes: torchrun would give them 30 seconds.
When the launcher is killed they are killed with it.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .stopping import LAUNCHER, STOPPED

asked_to_stop = threading.Event()


def hand_on(signals: socket.socket) -> None:
    """Hand SIGTERM on for ever; end at once with STOPPED where there is no process yet, or none any more."""
    while number := signals.recv(1):
        if number[0] != signal.SIGTERM:
            continue
        asked_to_stop.set()
        children = psutil.Process().children()
        if not children:
            print("stopped by SIGTERM while waiting for the other machines", file=sys.stderr, flush=True)
            os._exit(STOPPED)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                child.send_signal(signal.SIGTERM)


def watch_for_sigterm() -> None:
    """Have a thread see SIGTERM: the main one may wait for other machines where Python runs no handler."""
    signals, ours = socket.socketpair()
    ours.setblocking(False)
    signal.set_wakeup_fd(ours.detach())
    threading.Thread(target=hand_on, args=(signals,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: None)


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    watch_for_sigterm()
    try:
        main(["--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except DistError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"error: no place to meet ({reason}): check MASTER_ADDR, or give another MASTER_PORT", file=sys.stderr)
        sys.exit(2)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}: the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failure: failure[1].timestamp)
        if asked_to_stop.is_set() and first.exitcode == -signal.SIGTERM:  # before training began, or after its end
            sys.exit(STOPPED)
        if first.exitcode in (2, STOPPED):
            sys.exit(first.exitcode)
        print(f"error: process {rank} ended with status {first.exitcode}", file=sys.stderr)
        sys.exit(1)
