"""Runs a function of somebody else's making with bounds on its time and memory. Knows nothing about what it does."""

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
"""Of processor time, so that a busy machine does not count."""
WALL_SECONDS = 60.0
MEMORY = 1 << 30  # bytes, beyond what this process has
TEXT = 1 << 20  # characters of a result


class OutOfBounds(Exception):
    """The function took more time or memory than it may, or wrote too long a text."""


def bounded_text(function: Callable[[], str]) -> str:
    """The text that `function` returns, run in a forked process that is killed beyond CPU_SECONDS or MEMORY.

    The process may only compute: it has no other thread, and must not use a GPU, or leave anything behind. Raises
    OutOfBounds, and ValueError with the first line of what the function raises.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            _compute(function, sender)
        finally:
            os._exit(1)  # nothing of the process that was forked is cleaned up here
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
    except ValueError:  # it was killed, by RLIMIT_CPU or here
        raise OutOfBounds(f"it takes more than {CPU_SECONDS} s, or a text of more than {TEXT} characters") from None
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
        answer = {"text": text} if len(text) <= TEXT else {"error": "its text is too long", "bounds": True}
    except MemoryError:
        answer = {"error": f"it takes more than {MEMORY >> 20} MiB", "bounds": True}
    except Exception as error:  # handed on to who asked
        lines = str(error).splitlines()
        answer = {"error": (lines[0] if lines else type(error).__name__)[:500], "bounds": False}
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(sender, data) :]


def _receive(receiver: int) -> bytes:
    """All that is sent, or what was until there is too much of it or it takes too long."""
    data, end = b"", time.monotonic() + WALL_SECONDS
    while len(data) <= 12 * TEXT and select.select([receiver], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (piece := os.read(receiver, 1 << 16)):
            return data
        data += piece
    return b""
