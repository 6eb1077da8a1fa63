"""Forks in place of new Python processes, for programs whose libraries are imported already. Imports nothing of the
project."""

import atexit
import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from pathlib import Path
from typing import NoReturn

import torch

PR_SET_NAME = 15


def rename(name: str) -> None:
    """Give this process a name that `psutil` shows."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def reset_signals() -> None:
    """Handle signals as a new process does."""
    signal.set_wakeup_fd(-1)
    for number in {*signal.Signals} - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


execute = subprocess.Popen._execute_child


def fork_instead(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
    """Popen._execute_child for a process of the launcher; other programs are executed."""
    if not isinstance(args, tuple | list) or args[0] != sys.executable:
        return execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
    self.pid = os.fork()
    self._child_created = True
    if self.pid:
        return None
    try:
        reset_signals()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in {*map(int, os.listdir("/proc/self/fd"))} - {0, 1, 2, null}:
            # Such as the store that the launcher listens on. What still knows a number may close it, but no other file.
            with contextlib.suppress(OSError):
                os.fstat(number)
                os.dup2(null, number)
        if name := os.environ.get("NAME"):
            rename(f"{name}.{env['RANK']}")
        os.environ.clear()
        os.environ.update(env)
        # What the launcher would do at its end, this process must not.
        weakref.finalize._registry.clear()
        atexit._clear()
        atexit.register(logging.shutdown)
        atexit.register(multiprocessing.util._exit_function)
        multiprocessing.resource_tracker._resource_tracker._fd = None
        multiprocessing.set_start_method("fork", force=True)
        subprocess.Popen._execute_child = execute
        torch.set_num_threads(1)
        run_words([word for word in args[1:] if word != "-u"])
    finally:
        os._exit(70)


def run_words(words: list[str]) -> NoReturn:
    """Run these arguments of `python`, and exit as it does."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    try:
        if words[0] == "-m":
            sys.argv, sys.path[:0] = words[1:], [""]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)
