"""How processes that were launched together end together. Imports only light modules."""

import os
import signal

from ..common.ending import die_with_parent

STOPPED = 128 + signal.SIGTERM.value
"""Exit status of a run that SIGTERM stopped: the same command resumes from what was saved."""
LAUNCHER = "QWENVL_LAUNCHER"
"""Environment variable: process id of the launcher."""
RESUMES = ": the same command resumes from what was saved"


def is_local_main_process() -> bool:
    """Whether this process prints messages that are the same in all processes of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher ends, so that a new run can use the same output folder."""
    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))
