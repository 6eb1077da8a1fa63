"""How processes that were launched together end together. Imports nothing heavy."""

import ctypes
import os
import signal
import sys

STOPPED = 128 + signal.SIGTERM.value
"""Exit status of a run that SIGTERM has stopped: the same command goes on from what was saved."""
LAUNCHER = "QWENVL_LAUNCHER"
"""Environment variable: the launcher's process id."""
GO_ON = ": the same command goes on from the newest checkpoint"
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def speaks() -> bool:
    """Whether this is the process of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher is killed, so that the same command finds the folder free."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL.value)
    if os.getppid() != int(launcher):  # killed before that
        sys.exit(1)
