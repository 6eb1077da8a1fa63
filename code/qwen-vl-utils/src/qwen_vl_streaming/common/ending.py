"""Ends a process on an error: immediately, with its child processes, after one line that states the cause.

The normal exit of Python waits for child processes and threads, which can block forever. Independent of the programs
that use it.
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
    """Makes Linux kill this process when its parent process, with the process id `parent`, ends for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL.value)
    if os.getppid() != parent:  # the parent ended before prctl took effect
        os._exit(1)


def start_worker(parent: int) -> None:
    """Sets up a data worker, a process started by a DataLoader of the process `parent`. Call it first in the worker.

    The worker ignores SIGTERM, because SLURM signals every process of a job and only `parent` handles the signal. It
    therefore also ignores `terminate` of multiprocessing. On Linux it is killed when `parent` ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(parent)


def lost_worker(error: BaseException | None) -> str | None:
    """Describes how a data worker ended, if `error` or one of its causes reports that. Returns None otherwise."""
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
    """Explains in one line an `error` that is not a bug: the message of an InputError, a lost data worker, or a lack of
    memory or disk space, and what to do.

    The advice is `gpu` if GPU memory ran out, and `host` if a data worker was lost or host memory ran out. Returns None
    for any other error.
    """
    import torch  # imported here: it takes seconds, and `die_with_parent` must run first

    first = next(iter(str(error).splitlines()), "").rstrip(".")
    if isinstance(error, InputError):
        return str(error)
    if how := lost_worker(error):
        if "SIGBUS" in how:
            return f"a data worker {how}: shared memory (/dev/shm) is full: {host}, or give the container more of it"
        why = " (Linux does this when it runs out of memory)" if "SIGKILL" in how or "unexpectedly" in how else ""
        return f"a data worker {how}{why}: {host}"
    if isinstance(error, torch.OutOfMemoryError):
        # Cut off the allocator statistics and settings that PyTorch adds to the line.
        return f"out of GPU memory ({first.partition(' Including non-PyTorch memory')[0]}): {gpu}"
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return f"out of memory ({_last_line(text) or 'MemoryError'}): {host}"
    if isinstance(error, RuntimeError) and "out of memory" in text and ("CUDA" in text or "NCCL" in text):
        return f"out of GPU memory ({first}): {gpu}"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{FULL[error.errno]} ({first}): free some space and run the same command again"
    return None


def name(error: BaseException) -> str:
    """Describes any error in one line."""
    text = str(error)
    inside = re.match(r"Caught \w+ in DataLoader worker process", text)
    line = f"in a data worker: {_last_line(text)}" if inside else next(iter(text.splitlines()), "")
    return f"{type(error).__name__}: {line:.300}" if line and not inside else line or type(error).__name__


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def status_of(error: BaseException) -> int:
    """Returns the exit status of a program that ends with `error`."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def reset_sigchld() -> None:
    """Resets the SIGCHLD handler. The handler of a DataLoader raises an error whenever a worker ends unexpectedly.

    Does nothing outside the main thread, which alone can set signal handlers.
    """
    while threading.current_thread() is threading.main_thread():
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return
        except RuntimeError:  # raised by the old handler
            continue


def kill_workers() -> None:
    """Kills the processes that this process started with multiprocessing."""
    reset_sigchld()
    for child in multiprocessing.active_children():
        child.kill()


def leave(status: int) -> NoReturn:
    """Ends this process and its workers immediately, without waiting for threads or other processes."""
    kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader closed the stream
            stream.flush()
    os._exit(status)


def print_error(error: BaseException, line: str | None, then: str = "") -> None:
    """Prints why the program ends: `line` if given, else a traceback and `error` in one line with the advice `then`."""
    with contextlib.suppress(OSError, ValueError):
        if line is None:
            traceback.print_exception(error)
            line = name(error) + then
        print(f"error: {line}", file=sys.stderr, flush=True)


def run_to_end(main: Callable[[], object], failed: Callable[[BaseException], object]) -> None:
    """Calls `main`. If it raises an exception, calls `failed` with it and ends the program with its `status_of`.

    Exits immediately, except after SystemExit, which is raised again: Python then cleans up and waits for threads.
    """
    try:
        main()
    except BaseException as error:
        try:
            reset_sigchld()
        except RuntimeError:  # the handler ran once more before it was reset
            reset_sigchld()
        failed(error)
        if not isinstance(error, SystemExit):
            leave(status_of(error))
        kill_workers()
        raise
    kill_workers()
