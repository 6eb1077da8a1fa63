"""How a process ends when something goes wrong: at once, with one line that names the cause, and its children with it.

Python's own exit waits for child processes and threads, and each of those may wait for something that never comes.
Knows nothing about any of the programs.
"""

import contextlib
import ctypes
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from .errors import InputError

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "a file is too large"}


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when `parent`, the process id of its parent, ends in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL.value)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def start_worker(parent: int) -> None:
    """Called first in a data worker, a process that a DataLoader of the process `parent` has started.

    It ignores SIGTERM: SLURM signals every process of a job, and it is for `parent` to decide what that means. So it
    does not end when multiprocessing terminates it either; it ends with `parent`.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(parent)


def lost_worker(error: BaseException | None) -> str | None:
    """How a data worker ended, where that is what `error` says; None where it is another error."""
    found = None
    while error is not None:
        text = str(error)
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in text:
            found = "ended unexpectedly"
            if number := _signal_named(text):
                return f"was killed by {number.name}"
            if status := re.search(r"with exit code (\d+)", text):
                return f"ended with status {status[1]}"
        error = error.__cause__ or error.__context__
    return found


def _signal_named(text: str) -> signal.Signals | None:
    named = re.search(r"killed by signal: (.*?)\. ?", text)
    return next((s for s in signal.valid_signals() if named and signal.strsignal(s) == named[1]), None)


def explain(error: BaseException, gpu: str, host: str) -> str | None:
    """One line for an `error` that is not a mistake in the program: what ran out or was killed, and what to do, which
    is `gpu` where it is a GPU's memory, and `host` where it is this machine's. None for any other error."""
    import torch  # here, since a process is to see the end of its parent before it imports what takes seconds

    first = next(iter(str(error).splitlines()), "").rstrip(".")
    if isinstance(error, InputError):
        return str(error)
    if how := lost_worker(error):
        if "SIGBUS" in how:
            return (
                f"a data worker {how}: the shared memory (/dev/shm) is full: {host}, or give the container more of it"
            )
        why = " (Linux does that when memory is short)" if "SIGKILL" in how or "unexpectedly" in how else ""
        return f"a data worker {how}{why}: {host}"
    if isinstance(error, torch.OutOfMemoryError):
        # PyTorch's line goes on with the allocator's figures and settings.
        return f"out of GPU memory ({first.partition(' Including non-PyTorch memory')[0]}): {gpu}"
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return f"out of memory ({_last_line(text) or 'MemoryError'}): {host}"
    if isinstance(error, RuntimeError) and "out of memory" in text and ("CUDA" in text or "NCCL" in text):
        return f"out of GPU memory ({first}): {gpu}"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{FULL[error.errno]} ({first}): make room, and give the same command again"
    return None


def name(error: BaseException) -> str:
    """Any error in one line."""
    text = str(error)
    inside = re.match(r"Caught \w+ in DataLoader worker process", text)
    line = f"in a data worker: {_last_line(text)}" if inside else next(iter(text.splitlines()), "")
    return f"{type(error).__name__}: {line:.300}" if line and not inside else line or type(error).__name__


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def status_of(error: BaseException) -> int:
    """The exit status of a program that `error` ends."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def let_workers_end() -> None:
    """From now on a worker that ends raises no error here, as a DataLoader would at any moment, again and again."""
    while threading.current_thread() is threading.main_thread():
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return
        except RuntimeError:
            continue


def kill_workers() -> None:
    """Kill the processes that this one has started through multiprocessing."""
    let_workers_end()
    for child in multiprocessing.active_children():
        child.kill()


def leave(status: int) -> NoReturn:
    """End this process now and its workers with it. Nothing is waited for: no thread, no other process."""
    kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


def say(error: BaseException, line: str | None, then: str = "") -> None:
    """Print why the program ends: `line`, or a traceback and `error` in one line, with what to do `then`."""
    with contextlib.suppress(OSError, ValueError):
        if line is None:
            traceback.print_exception(error)
            line = name(error) + then
        print(f"error: {line}", file=sys.stderr, flush=True)


def run_to_end(main: Callable[[], object], failed: Callable[[BaseException], object]) -> None:
    """Call `main`. Whatever it raises ends the program with `status_of` that, once `failed` has been called with it: at
    once, but after SystemExit as Python does, which cleans up and waits for threads."""
    try:
        main()
    except BaseException as error:
        try:
            let_workers_end()
        except RuntimeError:  # one more has just ended
            let_workers_end()
        failed(error)
        if not isinstance(error, SystemExit):
            leave(status_of(error))
        kill_workers()
        raise
    kill_workers()
