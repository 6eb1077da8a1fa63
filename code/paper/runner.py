"""Runs the steps on this machine, one after the other or several side by side, each with a log, and rewrites the status
page meanwhile.

A step that fails names its log; steps that do not need it go on. Knows nothing about what steps do.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import reporting_write_errors, write_file
from qwen_vl_streaming.common.redact import redacted_command

from .attempts import LOCAL, Attempt, attempt_path
from .checks import DONE, PARTIAL, REFUSED, TO_DO, State
from .settings import ROOT
from .states import check_step
from .status import BLOCKED, FAILED, RUNNING, Progress, blocked_by, duration, write_page
from .steps import EVALUATE, REPORT, TRAIN, Folders, Step

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PERIOD = 5.0
"""Seconds between two versions of the status page while steps run."""
POLL = 0.1
"""Seconds between two looks at the steps that run."""
BEGINS = "+ job "
"""Begins a line in the log of a SLURM job where it starts, or starts again after it was requeued."""
CAUSE = re.compile(r"error:|slurmstepd.*: error: .*(memory|oom)", re.IGNORECASE)
"""Begins a line that says why a step failed."""
EXITED = re.compile(r"srun: error: .* Exited with exit code \d+$")
"""Follows the last line of what srun ran."""
TAIL = 8192
"""Bytes at the end of a log that are searched for its last line."""
OWN_PATHS = {str(ROOT / folder) for folder in ("", "code", "code/demo", "code/evaluation", "code/qwen-vl-finetune")}
"""What paper.sh adds to PYTHONPATH for this program alone."""


class Stopped(Exception):
    """A signal asked the program to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Running:
    """A step that runs."""

    step: Step
    process: subprocess.Popen
    log_start: int
    """Where it begins in its log, which earlier runs may have written to."""
    gpu: str = ""


@dataclass
class Runner:
    """The steps, with what is known about each."""

    steps: Sequence[Step]
    folders: Folders
    states: dict[str, State]
    progress: dict[str, Progress]
    jobs: int = 1
    """Steps that run side by side."""
    gpus: Sequence[str] = ()
    """The GPUs that they share, as in CUDA_VISIBLE_DEVICES: each training or evaluation uses one. Without any,
    it uses all."""
    _waiting: list[Step] = field(default_factory=list)
    """Steps that have not started, and of which it is not known yet whether they need to run."""
    _running: list[Running] = field(default_factory=list)
    _ran: set[str] = field(default_factory=set)
    """Steps that ran in this run, and have ended."""
    _signal: int = 0

    def run(self) -> int:
        """Run what is not done. Returns the exit status: 0, or 1 if a step failed. Raises Stopped."""
        for number in SIGNALS:
            signal.signal(number, self._stop)
        for number, step in enumerate(self.steps, 1):
            one = self.progress[step.name]
            one.number = number
            if one.word == REFUSED:
                print(f"{self._name(step)}: {REFUSED}, {one.detail}", flush=True)
            else:
                self._waiting.append(step)
        try:
            while not self._signal:
                self._start_ready()
                if not self._running:
                    break
                self._wait()
        finally:
            self._end_all()
            self._write_page(finished=True)
        if self._signal:
            raise Stopped(self._signal)
        return self._summarize()

    def _summarize(self) -> int:
        words = {one.word for one in self.progress.values()}
        for one in self.progress.values():
            if one.word in (FAILED, BLOCKED):
                where = f": see {self.folders.log(one.step.name)}" if one.word == FAILED else f": {one.detail}"
                print(f"{one.word}: {one.step.name}{where}", file=sys.stderr)
            elif one.word == PARTIAL:
                print(f"{one.word}: {one.step.name}: {one.detail}", file=sys.stderr)
        if words & {FAILED, BLOCKED, PARTIAL}:
            print("the same command resumes here", file=sys.stderr)
        return 1 if words & {FAILED, BLOCKED} else 0

    def _name(self, step: Step) -> str:
        return f"[{self.progress[step.name].number}/{len(self.steps)}] {step.name}"

    def _start_ready(self) -> None:
        """Start steps until `jobs` run, or none is ready. Side by side, those that most steps wait for come first."""
        while len(self._running) < self.jobs and not self._signal:
            ready = [step for step in list(self._waiting) if self._is_ready(step)]
            if not ready:
                return
            self._start(max(ready, key=self._steps_behind) if self.jobs > 1 else ready[0])

    def _steps_behind(self, step: Step) -> int:
        """The length of the longest chain of steps that need `step`, itself included."""
        return 1 + max((self._steps_behind(other) for other in self.steps if step.name in other.after), default=0)

    def _is_ready(self, step: Step) -> bool:
        """Whether a waiting step can start now. One that need not or cannot run is reported and waits no longer."""
        one = self.progress[step.name]
        pending = {other.name for other in (*self._waiting, *(running.step for running in self._running))}
        if pending & {*step.after, *step.behind}:
            return False
        if step.kind == REPORT and one.word == DONE and self._ran & set(step.after):
            one.word = TO_DO  # its rows have changed
        if one.word == DONE:
            self._waiting.remove(step)
            print(f"{self._name(step)}: already done{f', {one.detail}' if one.detail else ''}", flush=True)
            return False
        if needed := blocked_by(step, self.progress):
            self._waiting.remove(step)
            one.word, one.detail = BLOCKED, f"needs {needed}"
            print(f"{self._name(step)}: {BLOCKED}, {one.detail}", flush=True)
            return False
        return True

    def _start(self, step: Step) -> None:
        self._waiting.remove(step)
        log, one = self.folders.log(step.name), self.progress[step.name]
        print(f"{self._name(step)}: running, log in {log}", flush=True)
        command = ((step.complete if one.word == PARTIAL else None) or step.command).of(step.variant)
        one.word, one.detail, one.began, one.log = RUNNING, "", time.time(), log
        write_file(attempt_path(self.folders.logs, step.name), str(Attempt(LOCAL, one.began)))
        with reporting_write_errors(log):
            file = log.open("ab")
            start = file.tell()
            file.write(f"+ {shlex.join(redacted_command(command.words))}\n".encode())
            file.flush()
        gpu = self._free_gpu() if step.kind in (TRAIN, EVALUATE) else ""
        with file:
            process = subprocess.Popen(
                command.words,
                cwd=ROOT,
                env={
                    **clean_environment(),
                    **self._threads(),
                    **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
                    **command.environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches this program alone, which passes it on once
            )
        self._running.append(Running(step, process, start, gpu))
        self._write_page()

    def _free_gpu(self) -> str:
        """The GPU that the fewest steps run on, empty if they are not shared."""
        taken = [running.gpu for running in self._running]
        return min(self.gpus, key=taken.count, default="")

    def _threads(self) -> dict[str, str]:
        """Steps side by side divide the cores, unless the user has set how many threads they take."""
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.jobs))}

    def _wait(self) -> None:
        """Wait until a step has ended, a signal has come or the page is old."""
        end = time.monotonic() + PERIOD
        while time.monotonic() < end and not self._signal:
            ended = [one for one in self._running if one.process.poll() is not None]
            for running in ended:
                self._running.remove(running)
                self._note_end(running)
            if ended:
                break
            time.sleep(POLL)
        for running in self._running:
            self.progress[running.step.name].detail = last_line(
                self.folders.log(running.step.name), running.log_start, running=True
            )
        self._write_page()

    def _note_end(self, running: Running) -> None:
        step, code = running.step, running.process.returncode
        one, now = self.progress[step.name], time.time()
        one.took = now - one.began
        attempt = Attempt(LOCAL, one.began, now, code)
        write_file(attempt_path(self.folders.logs, step.name), str(attempt))
        self._ran.add(step.name)
        one.word, one.detail = self._outcome(running, code)
        detail = f", {one.detail}" if one.detail else ""
        print(f"{self._name(step)}: {one.word} in {duration(one.took)}{detail}", flush=True)

    def _end_all(self) -> None:
        """End what still runs, after a signal or an error, and wait for it."""
        if self._running:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # a training that saves may take minutes
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            running.process.wait()
            one = self.progress[running.step.name]
            one.word, one.detail = TO_DO, "stopped"

    def _outcome(self, running: Running, code: int) -> tuple[str, str]:
        """The state of a step that has ended with exit status `code`, and a line about it."""
        step = running.step
        if code:
            return FAILED, last_line(self.folders.log(step.name), running.log_start) or f"exit status {code}"
        try:
            first = {s.table: s.name for s in reversed(self.steps) if self.states[s.name].facts}
            state = check_step(step, self.states, first)
        except InputError as error:
            return FAILED, str(error)
        self.states[step.name] = state
        if step.kind == REPORT and not state.done and state.where and state.where.exists():
            return DONE, "over the rows that are complete"
        if state.usable:
            return state.word, state.detail
        return FAILED, f"ended, but its output is incomplete: {state.detail}"

    def _write_page(self, finished: bool = False) -> None:
        write_page(self.folders, list(self.progress.values()), finished, self.jobs)

    def _stop(self, number: int, frame: object) -> None:
        self._signal = number


def clean_environment() -> dict[str, str]:
    """The environment for the programs: without this program's own paths, and without variables that set what the
    steps set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2_5_VL_")}
    paths = [path for path in kept.pop("PYTHONPATH", "").split(os.pathsep) if path and path not in OWN_PATHS]
    return {**kept, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def last_line(log: Path, start: int = 0, running: bool = False) -> str:
    """Of a log from byte `start`, and of its last start, the last line that says why it failed, unless its step is
    `running`; else the last line. Progress bars end lines with a carriage return."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").replace("\r", "\n").split("\n")]
    begun = [number for number, line in enumerate(lines, 1) if line.startswith(BEGINS)]
    lines = [line for line in lines[begun[-1] if begun else 0 :] if line and not EXITED.match(line)]
    errors = [line for line in lines if CAUSE.match(line) and not running]
    return (errors or lines or [""])[-1][:300]
