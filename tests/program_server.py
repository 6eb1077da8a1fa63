"""Runs programs without importing libraries again, which takes most of the time of a short one: each is a fork of a
server that has imported them, and nothing of the project.

A program is started as usual, from a shell or with subprocess, in an environment from `with_server`. Its interpreter
then imports startup/sitecustomize.py, which asks the server for a fork with the same arguments, environment, folder and
open files. Processes of a launcher are forks of it, as in forked.py.

What differs from an ordinary start: process ids, parents, process groups and limits, the hash seed, the libraries that
are imported already, and what they have read of the environment by then. Tests of these start programs in the ordinary
way, and so does each test on a machine with a GPU.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.process
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import forking
import numpy as np
import psutil
import torch

LIBRARIES = (
    "torch.distributed.run",
    "torchvision.transforms.functional",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "transformers.trainer",
    "transformers.integrations",
    "deepspeed",
    "peft",
    "qwen_vl_utils",
    "matplotlib.pyplot",
)
FROM_ENVIRONMENT = ("huggingface_hub.constants", "datasets.config")
"""Modules that read environment variables when they are imported."""
MOVED = 1000
"""File descriptors from here on are used to put received ones in their places."""
LAUNCHER = "qwen_vl_streaming.launch"
START = 300.0
"""Seconds that the server has to start."""
HERE = Path(__file__).parent


def with_server(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for programs that the server runs. Starts the server if there is none: one serves all tests.
    Elsewhere than on Linux, and where there is a GPU, programs start as usual."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return dict(environment)
    distributed = "PYTEST_XDIST_WORKER" in os.environ
    tests = os.getppid() if distributed else os.getpid()
    address = f"programs-{os.environ['PYTEST_XDIST_TESTRUNUID'] if distributed else tests}"
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(address):
            _start(address, tests)
    path = [str(HERE / "startup"), *filter(None, [environment.get("PYTHONPATH")])]
    server = f"{address} {os.path.realpath(sys.prefix)}"
    return {**environment, "PROGRAM_SERVER": server, "PYTHONPATH": os.pathsep.join(path)}


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as server:
        return server.connect_ex(f"\0{address}") == 0


def _start(address: str, tests: int) -> None:
    ours = ("HF_", "QWEN", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    main = f"import sys; sys.path.append({str(HERE)!r}); import program_server; program_server.main()"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", main, address, str(tests)],
            env={**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + START
        while not _answers(address):
            if server.poll() is not None or time.monotonic() > end:
                server.kill()
                log.seek(0)
                raise RuntimeError(f"the server has not started: {log.read()}")
            time.sleep(0.05)


def main() -> NoReturn:
    """Serve at the address that the command line names, an abstract one, as long as the process that it names runs."""
    address, tests = sys.argv[1], int(sys.argv[2])
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    sys.argv, sys.path[:] = [], [folder for folder in sys.path if folder not in ("", str(HERE))]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{address}")
        server.listen(64)
        server.settimeout(1)
        while psutil.pid_exists(tests):
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                if not os.fork():
                    server.close()
                    keep(connection)
                connection.close()
    sys.exit()


def keep(connection: socket.socket) -> NoReturn:
    """Fork the program that the other end asks for, pass signals on to it, and report how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    length, received, _, _ = socket.recv_fds(connection, 8, 250)
    data, total = b"", int.from_bytes(length, "big")
    while len(data) < total and (part := connection.recv(1 << 20)):
        data += part
    if not data or len(data) < total:  # the other end only looked whether a server answers, or was killed
        os._exit(0)
    request = json.loads(data)
    if not (program := os.fork()):
        try:
            become(request, received)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    for number in received:
        os.close(number)
    ended = os.pidfd_open(program)
    while ended not in select.select([connection, ended], [], [])[0]:
        # Nothing comes if the other end was killed.
        for number in connection.recv(100) or [signal.SIGKILL]:
            os.kill(program, number)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def become(request: dict, received: list[int]) -> NoReturn:
    """Run the requested program in this process."""
    forking.reset_signals()
    os.setsid()
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, MOVED) for number in received]
    os.closerange(0, MOVED)
    for number, wanted in zip(moved, request["files"], strict=True):
        os.dup2(number, wanted)
        os.close(number)
    os.chdir(request["folder"])
    multiprocessing.process.ORIGINAL_DIR = request["folder"]  # where a spawned process looks for the program
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    np.random.seed()
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    for name in FROM_ENVIRONMENT:
        if name in sys.modules:
            importlib.reload(sys.modules[name])
    words = request["words"]
    sys.orig_argv = [sys.executable, *words]
    if words[:2] == ["-m", LAUNCHER]:
        subprocess.Popen._execute_child = forking.fork_instead
    forking.run_words(words)
