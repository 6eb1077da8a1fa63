"""How a training process fails: it reports the cause to the launcher, and exits without waiting for other processes.

The launcher prints the cause of the process that failed first, since the others mostly fail as a consequence. Without
a launcher, a process prints its own.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from qwen_vl_streaming.common.ending import explain, let_workers_end, name, run_to_end, say, status_of
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write
from torch.distributed import DistError

from .signals import GO_ON, LAUNCHER, is_local_main

EXIT_TIMEOUT = 12
"""Seconds that a process has to exit after it has reported a failure."""
EXIT_TIMEOUT_SUCCESS = 120
"""The same after success, when a logger may still upload."""
PEER_DELAY = 3
"""Seconds that a process which has lost its connection waits, so that the launcher sees the other one's exit first."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable that torchrun sets: the file for the cause of a failure."""
GPU = (
    "lower --per_device_train_batch_size or --max_pixels_per_video, use more GPUs, or set "
    "DEEPSPEED_CONFIG=zero3_offload.json, with another --output_dir if a checkpoint has been saved"
)
HOST = (
    "lower --dataloader_num_workers or give the run more memory, then run the same command to resume from the newest "
    "checkpoint"
)
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited", "NCCL error")


def lost_peer(error: BaseException) -> bool:
    """Whether `error` may be a consequence of another process's exit."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PEER_GONE)
    )


reported = False


def report_failure(error: BaseException) -> None:
    """Write why this process fails to the launcher's error file, the first time it is called. Does nothing without a
    launcher.

    What the process does afterwards may block in a collective, so SIGALRM ends it after EXIT_TIMEOUT.
    """
    global reported
    if reported or LAUNCHER not in os.environ:
        return
    reported = True
    let_workers_end()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(EXIT_TIMEOUT)
    line, peer = explain(error, GPU, HOST), lost_peer(error)
    message = name(error) if line is None else line
    if peer and line is None:
        message = f"the connection to another process was lost or could not be established ({name(error)})"
    unexpected = line is None and isinstance(error, Exception)
    content = {
        "message": message + GO_ON if line is None else message,
        "errorCode": status_of(error),
        "lost_peer": peer,
        "extraInfo": {
            "py_callstack": "".join(traceback.format_exception(error)) if unexpected else "",
            "timestamp": str(int(time.time())),
        },
    }
    try:
        atomic_write(Path(os.environ[ERROR_FILE]), json.dumps({"message": content}))
    except OSError:  # that disk is full, too
        if not isinstance(error, SystemExit | KeyboardInterrupt):
            say(error, line)


def run_rank(main: Callable[[], None]) -> None:
    """Call `main`, and exit as soon as it raises, without Python's own cleanup. SystemExit, with which a stopped run
    ends, exits normally."""
    run_to_end(main, on_failure)
    if LAUNCHER in os.environ:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_TIMEOUT_SUCCESS)


def on_failure(error: BaseException) -> None:
    report_failure(error)
    if LAUNCHER in os.environ:
        if lost_peer(error):
            time.sleep(PEER_DELAY)
    elif not isinstance(error, SystemExit | KeyboardInterrupt) and _prints(error):
        say(error, explain(error, GPU, HOST), GO_ON)


def _prints(error: BaseException) -> bool:
    """Whether this process prints `error`: of a user error that all processes raise, only one does."""
    return is_local_main() or not isinstance(error, InputError) or getattr(error, "one_process", False)
