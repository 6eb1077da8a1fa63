"""Runs an untrusted function with limits on its time and memory. Independent of what the function does."""

import contextlib
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

CPU_SECONDS = 5
"""Limit on processor time. It does not depend on how busy the machine is."""
WALL_SECONDS = 60.0
"""Limit on elapsed time."""
MEMORY = 1 << 30  # bytes on top of what this process already uses
TEXT = 1 << 20  # maximum length of a result, in characters


class OutOfBounds(Exception):
    """The function exceeded its limit on time, memory or length of the result."""


def bounded_text(function: Callable[[], str]) -> str:
    """Runs `function` in a forked process and returns its text.

    The limits are CPU_SECONDS, WALL_SECONDS, MEMORY (where the system has /proc) and TEXT. The process has a single
    thread. `function` must only compute: it must not use a GPU, and its side effects are not cleaned up. Raises
    OutOfBounds if a limit is exceeded, and ValueError with the first line of any other error in `function`.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            _compute(function, sender)
        finally:
            os._exit(1)  # skip the cleanup handlers inherited from the parent process
    os.close(sender)
    try:
        data = _receive(receiver)
    finally:
        os.close(receiver)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        answer = json.loads(data)
    except ValueError:  # no complete answer: killed by RLIMIT_CPU or by the parent
        raise OutOfBounds(f"rendering takes more than {CPU_SECONDS} s or returns more than {TEXT} characters") from None
    if "text" in answer:
        return answer["text"]
    raise (OutOfBounds if answer["bounds"] else ValueError)(answer["error"])


def _compute(function: Callable[[], str], sender: int) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (statm := Path("/proc/self/statm")).exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    try:
        text = function()
        answer = {"text": text} if len(text) <= TEXT else {"error": "the text is too long", "bounds": True}
    except MemoryError:
        answer = {"error": f"rendering takes more than {MEMORY >> 20} MiB", "bounds": True}
    except Exception as error:  # reported to the parent, which raises ValueError
        lines = str(error).splitlines()
        answer = {"error": (lines[0] if lines else type(error).__name__)[:500], "bounds": False}
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(sender, data) :]


def _receive(receiver: int) -> bytes:
    """Returns all data up to the end of the stream, or no data if it is too long or takes more than WALL_SECONDS."""
    data, end = b"", time.monotonic() + WALL_SECONDS
    while len(data) <= 12 * TEXT and select.select([receiver], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (piece := os.read(receiver, 1 << 16)):
            return data
        data += piece
    return b""
