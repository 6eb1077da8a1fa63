"""torchrun, whose exit status says what went wrong: 2 where a process refused its input with one plain line.

SIGTERM is handed on to the processes, which save and end, however long that takes: torchrun would give them 30 seconds.
"""

import contextlib
import logging
import signal
import sys

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

STOPPED = 128 + signal.SIGTERM.value  # as in keeping.py, which would import too much here


def hand_on(number: int, frame) -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            child.send_signal(number)


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, hand_on)
    try:
        main(["--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except DistError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"error: no place to meet ({reason}): check MASTER_ADDR, or give another MASTER_PORT", file=sys.stderr)
        sys.exit(2)
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failure: failure[1].timestamp)
        if first.exitcode in (2, STOPPED):
            sys.exit(first.exitcode)
        print(f"error: process {rank} ended with status {first.exitcode}", file=sys.stderr)
        sys.exit(1)
