"""How processes that were launched together end together. Imports nothing heavy."""

import os
import signal

from ..common.ending import die_with_parent

STOPPED = 128 + signal.SIGTERM.value
"""Exit status of a run that SIGTERM stopped: the same command resumes from what was saved."""
LAUNCHER = "QWENVL_LAUNCHER"
"""Environment variable: the launcher's process id."""
RESUMES = ": the same command resumes from what was saved"


def speaks() -> bool:
    """Whether this is the process of its node that prints what all of them would print."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher is killed, so that the same command can use the folder."""
    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))
