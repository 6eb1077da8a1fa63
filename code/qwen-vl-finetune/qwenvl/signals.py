"""How the processes of one launch stop together. Imports nothing that takes long."""

import os
import signal

from qwen_vl_streaming.common.ending import die_with_parent

STOPPED = 128 + signal.SIGTERM.value
"""Exit status of a run that saved and stopped on SIGTERM; the same command resumes it."""
LAUNCHER = "QWENVL_LAUNCHER"
"""Environment variable with the launcher's process id."""
GO_ON = ": run the same command to resume from the newest checkpoint"


def is_local_main() -> bool:
    """Whether this is the first process of its node, which prints what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def die_with_launcher() -> None:
    """Have Linux kill this process when its launcher is killed, so that it does not keep the output folder locked."""
    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))
