"""Runs the launcher of code/launch.sh without importing anything again: it is a fork of a server that has imported
everything, and the processes that it starts are forks of it. All else is as when they are started from a shell: they
are the launcher's children, in sessions of their own, with their own environment, arguments and signal handlers.

A launcher that restarts replaces itself with a new interpreter, whose processes are then started in the ordinary way.
"""

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
import zlib
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import PContext
from training import fork_server

LAUNCHER = "qwen_vl_streaming.launch"
PR_SET_NAME = 15


class Launched:
    """A launcher with the methods of subprocess.Popen and of multiprocessing's processes that tests use."""

    def __init__(self, arguments: list, log: Path, **environment: str):
        """`python -m qwen_vl_streaming.launch ARGUMENTS` with this environment on top of that of the tests, and its
        output in `log`. If it has GRACE, processes have only so many seconds to exit after another has failed."""
        given = list(map(str, arguments)), log, {"NAME": name_of(log), **environment}
        self.process = fork_server().Process(target=_launch, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode

    def join(self, seconds: float | None = None) -> None:
        self.process.join(seconds)

    def wait(self, seconds: float) -> int:
        self.join(seconds)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(LAUNCHER, seconds)
        return self.exitcode


def name_of(log: Path) -> str:
    """The name of a launcher with this `log`. Those of its processes, and of their workers, begin with it."""
    return f"~{zlib.crc32(str(log).encode()):x}"


def rank_of(process: psutil.Process) -> str | None:
    """The rank of a process of the launcher. Of a fork, /proc shows the environment of the server."""
    name = process.name()
    return name.partition(".")[2] if name.startswith("~") else process.environ().get("RANK")


def _rename(name: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def _launch(arguments: list[str], log: Path, environment: dict[str, str]) -> NoReturn:
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    _rename(environment["NAME"])
    os.environ.update(environment)
    subprocess.Popen._execute_child = _fork
    if grace := os.environ.get("GRACE"):
        close = PContext.close
        PContext.close = lambda context, how=None, timeout=30: close(context, how, min(timeout, int(grace)))
    sys.orig_argv = [sys.executable, "-m", LAUNCHER, *arguments]  # with which it restarts
    _run(["-m", LAUNCHER, *arguments])


execute = subprocess.Popen._execute_child


def _fork(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
    """Popen._execute_child for a process of the launcher; other programs are executed."""
    if not isinstance(args, tuple | list) or args[0] != sys.executable:
        return execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
    self.pid = os.fork()
    self._child_created = True
    if self.pid:
        return None
    try:
        signal.set_wakeup_fd(-1)
        for number in {*signal.Signals} - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in {*map(int, os.listdir("/proc/self/fd"))} - {0, 1, 2, null}:
            # Such as the store that the launcher listens on. What still knows a number may close it, but no other file.
            with contextlib.suppress(OSError):
                os.fstat(number)
                os.dup2(null, number)
        _rename(f"{os.environ['NAME']}.{env['RANK']}")
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
        _run([word for word in args[1:] if word != "-u"])
    finally:
        os._exit(70)


def _run(words: list[str]) -> NoReturn:
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
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)
