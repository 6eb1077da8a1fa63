"""How a process of a run fails: it reports the cause to the launcher, and exits without waiting for the others.

The launcher prints the cause of the process that failed first, since the others mostly fail because of it. A process
without a launcher prints its own.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed import DistError

from ..common.ending import explain, let_workers_end, name, run_to_end, say, status_of
from ..common.errors import InputError
from .signals import LAUNCHER, RESUMES, speaks

LEAVING = 12
"""Seconds that a process has to end once it has told why."""
AT_EXIT = 120
"""The same after a success, when a log may still have to be sent away."""
AFTER_PEER = 3
"""Seconds that one which has lost the connection to another leaves to the launcher, to see that one's end first."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable that torchrun sets: where a process writes why it failed."""
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited", "NCCL error")


def lost_peer(error: BaseException) -> bool:
    """Whether `error` may come from the end of another process."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_GONE)
    )


told = False
advice = ("", "")
"""What to do where a GPU's memory runs out, and where the machine's does."""


def tell(error: BaseException) -> None:
    """Tell the launcher, the first time, that `error` ends this process; returns at once where there is no launcher.

    What is still to be done may wait for other processes: when it takes LEAVING seconds, SIGALRM ends this process.
    """
    global told
    if told or LAUNCHER not in os.environ:
        return
    told = True
    let_workers_end()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LEAVING)
    line, peer = explain(error, *advice), lost_peer(error)
    message = name(error) if line is None else line
    if peer and line is None:
        message = f"the connection to another process was lost, or could not be made ({name(error)})"
    unforeseen = line is None and isinstance(error, Exception)
    message = {
        "message": message + RESUMES if line is None else message,
        "errorCode": status_of(error),
        "lost_peer": peer,
        "extraInfo": {
            "py_callstack": "".join(traceback.format_exception(error)) if unforeseen else "",
            "timestamp": str(int(time.time())),
        },
    }
    try:
        file = Path(os.environ[ERROR_FILE])
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps({"message": message}))
        beside.replace(file)
    except OSError:  # the disk is full there too
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            say(error, line)


def run_rank(main: Callable[[], None], gpu: str, host: str) -> None:
    """Call `main`, and end this process as soon as it raises. `gpu` and `host` say what to do where a GPU's memory runs
    out, and where the machine's does. What Python would clean up at its exit is left out then,
    but for SystemExit, with which a run ends that was stopped."""
    global advice
    advice = gpu, host
    run_to_end(main, failed)
    if LAUNCHER in os.environ:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(AT_EXIT)


def failed(error: BaseException) -> None:
    tell(error)
    if LAUNCHER in os.environ:
        if lost_peer(error):
            time.sleep(AFTER_PEER)
    elif not isinstance(error, SystemExit | KeyboardInterrupt) and _is_to_say(error):
        say(error, explain(error, *advice), RESUMES)


def _is_to_say(error: BaseException) -> bool:
    """Whether this process prints `error` itself: of those that meet the same mistake of the user only one does."""
    return speaks() or not isinstance(error, InputError) or getattr(error, "of_one", False)
