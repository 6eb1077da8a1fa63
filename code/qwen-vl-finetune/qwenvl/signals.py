"""How processes that were launched together end together. Imports nothing heavy."""

import os
import signal

from qwen_vl_streaming.common.ending import die_with_parent

STOPPED = 128 + signal.SIGTERM.value
"""Exit status of a run that SIGTERM has stopped: the same command goes on from what was saved."""
LAUNCHER = "QWENVL_LAUNCHER"
"""Environment variable: the launcher's process id."""
GO_ON = ": the same command goes on from the newest checkpoint"


def speaks() -> bool:
    """Whether this is the process of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher is killed, so that the same command finds the folder free."""
    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))
