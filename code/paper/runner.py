"""Runs the steps one after the other on this machine, each with a log, and rewrites the status page meanwhile.

A step that fails names its log; steps that do not need it go on. Knows nothing about what steps do.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.redact import redacted_command

from .checks import DONE, TO_DO, State
from .settings import ROOT
from .status import BLOCKED, FAILED, RUNNING, Progress, duration, write_page
from .steps import REPORT, Folders, Step, check_step

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PERIOD = 5.0
"""Seconds between two versions of the status page while a step runs."""
OWN_PATHS = {str(ROOT / folder) for folder in ("code", "code/evaluation", "code/qwen-vl-finetune")}
"""What paper.sh adds to PYTHONPATH for this program alone."""


class Stopped(Exception):
    """A signal asked the program to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Runner:
    """The steps, with what is known about each."""

    steps: Sequence[Step]
    folders: Folders
    states: dict[str, State]
    progress: dict[str, Progress]
    _log_start: int = 0
    """Where the running step begins in its log, which earlier runs may have written to."""

    def run(self) -> int:
        """Run what is not done. Returns the exit status: 0, or 1 if a step failed. Raises Stopped."""
        for number in SIGNALS:
            signal.signal(number, _stop)
        for number, step in enumerate(self.steps, 1):
            self.progress[step.name].number = number
        for step in self.steps:
            self._run_if_needed(step)
        self._write_page(finished=True)
        failed = [one for one in self.progress.values() if one.word in (FAILED, BLOCKED)]
        for one in failed:
            where = f": see {self.folders.log(one.step.name)}" if one.word == FAILED else f": {one.detail}"
            print(f"{one.word}: {one.step.name}{where}", file=sys.stderr)
        if failed:
            print("the same command goes on from here", file=sys.stderr)
        return 1 if failed else 0

    def _run_if_needed(self, step: Step) -> None:
        one = self.progress[step.name]
        what = f"[{one.number}/{len(self.steps)}] {step.name}"
        if step.kind == REPORT and any(self.progress[name].took for name in step.after):
            one.word = TO_DO  # its rows have changed
        if one.word == DONE:
            print(f"{what}: already done{f', {one.detail}' if one.detail else ''}", flush=True)
            return
        lacking = [name for name in step.after if self.progress[name].word != DONE]
        if lacking and (step.kind != REPORT or len(lacking) == len(step.after)):
            one.word, one.detail = BLOCKED, f"needs {lacking[0]}"
            print(f"{what}: {BLOCKED}, {one.detail}", flush=True)
            return
        print(f"{what}: running, log in {self.folders.log(step.name)}", flush=True)
        one.word, one.detail, one.began = RUNNING, "", time.time()
        code = self._execute(step)
        one.took = time.time() - one.began
        one.word, one.detail = self._outcome(step, code)
        print(f"{what}: {one.word} in {duration(one.took)}{f', {one.detail}' if one.detail else ''}", flush=True)
        self._write_page()

    def _execute(self, step: Step) -> int:
        """Run the command to its end. Raises Stopped once it has ended after a signal."""
        log, one = self.folders.log(step.name), self.progress[step.name]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._log_start = file.tell()
            file.write(f"+ {shlex.join(redacted_command(list(step.command)))}\n".encode())
            file.flush()
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**clean_environment(), **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches this program alone, which passes it on once
            )
            try:
                while True:
                    one.detail = last_line(log, self._log_start)
                    self._write_page()
                    try:
                        return process.wait(PERIOD)
                    except subprocess.TimeoutExpired:
                        pass
            except Stopped:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)  # a training that saves may take minutes
                process.terminate()
                process.wait()
                one.word, one.detail = TO_DO, "stopped"
                self._write_page(finished=True)
                raise

    def _outcome(self, step: Step, code: int) -> tuple[str, str]:
        """The state of a step that has ended with exit status `code`, and a line about it."""
        if code:
            return FAILED, last_line(self.folders.log(step.name), self._log_start) or f"exit status {code}"
        try:
            first = {s.table: s.name for s in reversed(self.steps) if self.states[s.name].facts}
            state = check_step(step, self.states, first)
        except InputError as error:
            return FAILED, str(error)
        self.states[step.name] = state
        if step.kind == REPORT and not state.done and state.where and state.where.exists():
            return DONE, "over the rows that are complete"
        return (DONE, state.detail) if state.done else (FAILED, f"ended, but its output is incomplete: {state.detail}")

    def _write_page(self, finished: bool = False) -> None:
        write_page(self.folders, list(self.progress.values()), finished)


def clean_environment() -> dict[str, str]:
    """The environment for the programs: without this program's own paths, and without variables that set what the
    steps set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2_5_VL_")}
    paths = [path for path in kept.pop("PYTHONPATH", "").split(os.pathsep) if path and path not in OWN_PATHS]
    return {**kept, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def last_line(log: Path, start: int = 0, most: int = 8192) -> str:
    """Of a log from byte `start`, the last line that begins with `error:`, else the last line. Progress bars end lines
    with a carriage return."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - most))
        lines = [line.strip() for line in file.read().decode(errors="replace").replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)
