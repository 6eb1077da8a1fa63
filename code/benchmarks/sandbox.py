"""A process that tries one input after another and watches what each does.

The process has its own home and temporary folder, no network, and limits on memory and on file sizes. While it tries an
input, it records which files are opened for writing or removed, and which processes are started, outside its folder.
Does not depend on what is tried.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from qwen_vl_streaming.common.errors import run

CODE = Path(__file__).resolve().parents[1]
STARTUP_SECONDS = 300
MAX_ADDRESS_SPACE, MAX_FILE_SIZE = 6 << 30, 1 << 28
"""Bytes that the process may map in addition to its size after start-up, and bytes of a file that it may write."""
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FILE_EVENTS = {
    "os.remove": 1,
    "os.rename": 2,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.chmod": 1,
}
"""Audit event -> number of leading arguments that are paths."""
PROCESS_EVENTS = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect"
}  # fmt: skip
ALLOWED_COMMANDS = ([sys.executable, "-m", "metrics.scoring"], [shutil.which("java"), "-version"])
"""Commands that may be started: the metrics, which run in their own process, and Java to print its version."""
FORKS = "qwen_vl_streaming.common.bounded"
"""Module that may fork: it renders chat templates."""
Try = Callable[[random.Random], str | Iterable[str]]
"""Tries one input and returns its outcome in a few words, or several outcomes; an exception is a finding."""


class Sandbox:
    """Starts the process and sends it inputs."""

    def __init__(self, prepare: str, seed: int, folder: Path, seconds: int):
        self.seconds = seconds
        for name in ("tmp", "home", "case"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("QWEN2_5_VL", "HF_"))}
        paths = [str(CODE / name) for name in ("benchmarks", "evaluation", "demo", "qwen-vl-finetune")]
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "HF_HOME": str(folder / "home/hf"),
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        }
        (folder / "yes").write_text("y\n" * 100_000)  # stdin, in case a library asks for confirmation
        read_requests, self.requests = os.pipe()
        self.answers, write_answers = os.pipe()
        theirs = read_requests, write_answers
        start = "import sys, sandbox; sandbox.serve(*sys.argv[1:])"
        command = [sys.executable, "-c", start, prepare, *map(str, (seed, folder, seconds, *theirs))]
        self.log = folder / "log"
        with open(folder / "yes") as yes, open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=yes,
                stdout=log,
                stderr=log,
                pass_fds=theirs,
                cwd=folder,
                start_new_session=True,
            )
        for end in theirs:
            os.close(end)
        if self._read_answer(STARTUP_SECONDS) is None:
            raise RuntimeError(f"the process did not start: {self.log.read_text()[-3000:]}")

    def try_input(self, number: int) -> dict | None:
        """Return the result of input `number`, or None if the process dies or takes too long."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.requests, f"{number}\n".encode())
        return self._read_answer(self.seconds)

    def _read_answer(self, seconds: float) -> dict | None:
        text = b""
        while not text.endswith(b"\n"):
            if not select.select([self.answers], [], [], seconds)[0]:
                return None
            if not (more := os.read(self.answers, 1 << 16)):
                return None
            text += more
        return json.loads(text)

    def stop(self) -> str:
        """Stop the process. Returns its exit status or that it did not answer, and the end of its log."""
        try:
            finding = f"the process died with status {self.process.wait(1)}"
        except subprocess.TimeoutExpired:
            finding = f"no answer within {self.seconds} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and the processes that it started
        self.process.wait()
        for end in (self.requests, self.answers):
            os.close(end)
        return f"{finding}\n{self.log.read_text(errors='replace')[-2000:]}"


def _is_allowed(command: list) -> bool:
    return any(command[: len(allowed)] == allowed for allowed in ALLOWED_COMMANDS)


class AuditLog:
    """Records files written or removed, and processes started, outside `folder` while `on`."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.violations = str(folder), False, []
        self.grown = 0  # growth of forked processes in bytes
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            if isinstance(arguments[0], str | bytes) and arguments[2] is not None and arguments[2] & WRITE_FLAGS:
                self._check_path(event, arguments[0])
        elif event in FILE_EVENTS:
            for path in arguments[: FILE_EVENTS[event]]:
                self._check_path(event, path)
        elif event in PROCESS_EVENTS and not (
            (event == "subprocess.Popen" and _is_allowed(list(arguments[1])))
            or (event == "os.fork" and sys._getframe(1).f_globals.get("__name__") == FORKS)
        ):
            self.violations.append(f"{event} {arguments!r:.200}")

    def _check_path(self, event: str, path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(path))
            if not path.startswith((self.folder + os.sep, "/dev/null", "/proc/self/")):
                self.violations.append(f"{event} {path:.200}")


audit: AuditLog | None = None
"""The log of this process, if it is a sandbox's."""


@dataclass(frozen=True)
class Finished:
    """Exit status and output of a program."""

    status: int
    out: str
    err: str


def run_forked(program: Callable[[], None], arguments: Iterable[object], folder: Path, seconds: int) -> Finished:
    """Run a program's main with `arguments` as its command line in a forked process, to the exit of the interpreter.

    The result is that of starting the program, without the time for its imports. Its output goes through files in
    `folder`. Raises AssertionError if it takes more than `seconds` or is killed by a signal.
    """
    files, report = [folder / "out", folder / "err"], folder / "seen"
    audit.on = False
    # The child has only this thread. Collect objects that own threads, such as decoders, which it would wait for.
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    if (child := os.fork()) == 0:
        _run_as(program, [program.__module__, *map(str, arguments)], files, report)
    audit.on = True
    end = os.pidfd_open(child)
    late = not select.select([end], [], [], seconds)[0]
    if late:
        os.kill(child, signal.SIGABRT)  # faulthandler prints its stack
        if not select.select([end], [], [], 5)[0]:
            os.kill(child, signal.SIGKILL)
    os.close(end)
    _, code, usage = os.wait4(child, 0)
    out, err = (file.read_text(errors="replace") for file in files)
    status = os.waitstatus_to_exitcode(code)
    assert not late, f"not finished in {seconds} s: {err[:2000]}"
    assert status >= 0, f"killed by signal {-status}: {err[-2000:]}"
    found = json.loads(report.read_text())
    audit.violations += found["violations"]
    audit.grown = max(audit.grown, usage.ru_maxrss * 1024 - found["rss"])
    for file in (*files, report):
        file.unlink()
    return Finished(status, out, err)


def _run_as(program: Callable[[], None], command: list[str], files: Iterable[Path], report: Path) -> None:
    """The child of `run_forked`. Does not return."""
    rss = psutil.Process().memory_info().rss
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    faulthandler.enable(2)
    sys.argv, status = command, 1
    audit.on, audit.violations = True, []
    try:
        run(program)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as the interpreter does at top level
        traceback.print_exc()
    audit.on = False
    report.write_text(json.dumps({"violations": audit.violations, "rss": rss}))
    ctypes.pythonapi.Py_Exit(status)  # unlike os._exit, finalizes threads and objects


def serve(prepare: str, seed: str, directory: str, seconds: str, requests: str, answers: str) -> None:
    """The process of a Sandbox."""
    global audit
    folder, output = Path(directory), int(answers)
    module, _, name = prepare.partition(":")
    faulthandler.enable(sys.__stderr__)
    try_one: Try = getattr(importlib.import_module(module), name)(folder)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MAX_ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_SIZE,) * 2)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    audit = AuditLog(folder)
    gc.collect()
    gc.freeze()  # forked processes then exit faster
    os.write(output, b"{}\n")
    for line in open(int(requests), encoding="ascii"):  # noqa: SIM115 - open until this process exits
        number, outcomes, finding = int(line), "finding", ""
        audit.on, audit.violations = True, []
        faulthandler.dump_traceback_later(0.9 * float(seconds), file=sys.__stderr__)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcomes = try_one(random.Random(f"{seed}:{number}"))
        except BaseException:  # any exception is a finding
            finding = traceback.format_exc(limit=-4)[-3000:]
        audit.on = False
        faulthandler.cancel_dump_traceback_later()
        if audit.violations:
            finding += f"outside its folder: {audit.violations[:3]}"
        if marks := [path.name for path in folder.glob("marks/*")]:
            finding += f"executed: {marks[:3]}"
            for path in folder.glob("marks/*"):
                path.unlink()
        grown = max(audit.grown, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024)
        outcomes = [outcomes] if isinstance(outcomes, str) else list(outcomes)
        result = {"outcomes": outcomes, "finding": finding, "grown": grown}
        os.write(output, json.dumps(result).encode() + b"\n")
