"""Runs the launcher of code/launch.sh without importing anything again: it is a fork of a server that has imported
everything, and the processes that it starts are forks of it. All else is as when they are started from a shell: they
are the launcher's children, in sessions of their own, with their own environment, arguments and signal handlers.

A launcher that restarts replaces itself with a new interpreter, whose processes are then started in the ordinary way.
"""

import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NoReturn

import psutil
from forking import fork_instead, rename, run_words
from torch.distributed.elastic.multiprocessing.api import PContext
from training import fork_server

LAUNCHER = "qwen_vl_streaming.launch"


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


def _launch(arguments: list[str], log: Path, environment: dict[str, str]) -> NoReturn:
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    rename(environment["NAME"])
    os.environ.update(environment)
    subprocess.Popen._execute_child = fork_instead
    if grace := os.environ.get("GRACE"):
        close = PContext.close
        PContext.close = lambda context, how=None, timeout=30: close(context, how, min(timeout, int(grace)))
    sys.orig_argv = [sys.executable, "-m", LAUNCHER, *arguments]  # with which it restarts
    run_words(["-m", LAUNCHER, *arguments])
