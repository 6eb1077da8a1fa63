"""How a process of a run fails: it reports the error to the launcher and exits without waiting for other processes.

The launcher prints the error of the process that failed first, because the others usually fail as a consequence. A
process without a launcher prints its own error.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed import DistError

from ..common.ending import explain, name, print_error, reset_sigchld, run_to_end, status_of
from ..common.errors import InputError
from .signals import LAUNCHER, RESUMES, is_local_main_process

EXIT_TIMEOUT = 12
"""Seconds that a process has to exit after it has reported its error."""
CLEANUP_TIMEOUT = 120
"""Seconds that a process has to exit after success: logs may still have to be uploaded."""
PEER_DELAY = 3
"""Seconds that a process waits after it lost its connection to another: the launcher should see the other end first."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable that torchrun sets: the file to which a process writes its error."""
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited", "NCCL error")


def lost_peer(error: BaseException) -> bool:
    """Whether `error` may have been caused by the end of another process."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_GONE)
    )


reported = False
advice = ("", "")
"""What to do when GPU memory runs out, and when host memory does."""


def report(error: BaseException) -> None:
    """Report to the launcher that `error` ends this process. Only the first call has an effect, and only if there is a
    launcher.

    Also sets an alarm: SIGALRM kills this process after EXIT_TIMEOUT seconds, because its cleanup may wait for other
    processes.
    """
    global reported
    if reported or LAUNCHER not in os.environ:
        return
    reported = True
    reset_sigchld()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(EXIT_TIMEOUT)
    line, peer = explain(error, *advice), lost_peer(error)
    message = name(error) if line is None else line
    if peer and line is None:
        message = f"the connection to another process was lost or could not be established ({name(error)})"
    unexpected = line is None and isinstance(error, Exception)
    message = {
        "message": message + RESUMES if line is None else message,
        "errorCode": status_of(error),
        "lost_peer": peer,
        "extraInfo": {
            "py_callstack": "".join(traceback.format_exception(error)) if unexpected else "",
            "timestamp": str(int(time.time())),
        },
    }
    try:
        file = Path(os.environ[ERROR_FILE])
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps({"message": message}))
        beside.replace(file)
    except OSError:  # for example a full disk
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            print_error(error, line)


def run_rank(main: Callable[[], None], gpu: str, host: str) -> None:
    """Call `main`. If it raises, report the error and exit immediately, without Python's cleanup at exit.

    SystemExit, which a stopped run raises, is an exception: it exits with Python's cleanup. After success, the process
    has CLEANUP_TIMEOUT seconds to exit if it has a launcher. `gpu` and `host` say what to do when GPU memory or host
    memory runs out.
    """
    global advice
    advice = gpu, host
    run_to_end(main, failed)
    if LAUNCHER in os.environ:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CLEANUP_TIMEOUT)


def failed(error: BaseException) -> None:
    report(error)
    if LAUNCHER in os.environ:
        if lost_peer(error):
            time.sleep(PEER_DELAY)
    elif not isinstance(error, SystemExit | KeyboardInterrupt) and _prints(error):
        print_error(error, explain(error, *advice), RESUMES)


def _prints(error: BaseException) -> bool:
    """Whether this process prints `error` itself. A user error that all processes raise is printed by only one."""
    return is_local_main_process() or not isinstance(error, InputError) or getattr(error, "of_one", False)
