"""What SLURM's commands say: the user's queue, and how jobs ended.

Knows nothing about steps.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vl_streaming.common.errors import InputError

from .attempts import Attempt
from .runner import clean_environment

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")
"""States of jobs in the queue that have yet to run, or to run again."""
REQUEUED = 143
"""Exit status of a step that has saved before the time limit, so that its file requeues the job."""
NEVER = "DependencyNeverSatisfied"
"""The reason of a job that waits for one that has failed; SLURM removes it the next time it looks."""
TIMEOUT = 100.0
"""Seconds that squeue and sacct have to answer. SLURM's own limit is its MessageTimeout, for each of several tries."""


@dataclass(frozen=True)
class Queued:
    """A job, or an element of an array, in SLURM's queue."""

    job: str
    """Its id; of an array, that of all its elements."""
    state: str
    """Such as PENDING or RUNNING."""
    reason: str = ""
    """Why it waits, such as Priority."""
    index: str = "N/A"
    """Of an element of an array."""

    @property
    def id(self) -> str:
        """Such as 12, or 12_4 in an array."""
        return self.job if self.index == "N/A" else f"{self.job}_{self.index}"

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    def has_ended(self, attempt: Attempt | None) -> bool:
        """Whether its step has ended, and will not start again. SLURM shows a job until its last process is gone."""
        if self.waits:
            return False
        status = attempt.status if attempt and attempt.job == self.id else None
        if self.state == "COMPLETING":
            return status != REQUEUED
        return status is not None


def queued_jobs() -> dict[tuple[str, str], Queued]:
    """The user's jobs in the queue, by name and array index; none where there is no squeue."""
    if not shutil.which("squeue"):
        return {}
    said, _ = run(["squeue", "--me", "--noheader", "--array", "--format=%j %K %F %T %r"], TIMEOUT)
    rows = [words for line in said.splitlines() if len(words := line.split(maxsplit=4)) == 5 and words[2].isdigit()]
    # Of two jobs for a step, such as one that is ending and one that waits for its end, the later one counts.
    rows.sort(key=lambda words: (words[3] != "COMPLETING", words[3] in WAITING, int(words[2])))
    return {(name, index): Queued(job, state, reason, index) for name, index, job, state, reason in rows}


def job_ends(jobs: Sequence[str]) -> dict[str, str]:
    """How SLURM's `jobs` ended, by id, such as TIMEOUT or OUT_OF_MEMORY; without those that still run. Empty where
    there is no sacct, or no accounting behind it."""
    if not jobs or not shutil.which("sacct"):
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State"]
    command += [f"--jobs={','.join(jobs)}"]
    try:
        done = call(command, TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode:
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1]
    still = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED")
    return {one: state for job, state in rows if not state.startswith(still) for one in _elements(job)}


def _elements(job: str) -> list[str]:
    """The ids in 12, 12_3 or, of elements that ended together before they began, 12_[0-2,5]."""
    array = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if not array:
        return [job]
    ranges = [[*map(int, part.split("-"))] for part in array[2].split(",")]
    return [f"{array[1]}_{index}" for bounds in ranges for index in range(bounds[0], bounds[-1] + 1)]


def run(command: Sequence[str], timeout: float | None = None, what: str = "") -> tuple[str, list[str]]:
    """The output of `command`, and the lines of its stderr. Raises InputError with these where it fails. `what` names
    it, if not by its first word."""
    name = command[0]
    what = what or name
    try:
        done = call(command, timeout)
    except OSError as error:
        raise InputError(f"{what} failed ({error.strerror}): fix that and give the same command") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{what} has not answered for {timeout:.0f} s: give the same command later") from None
    notes = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        # The cause may be in any line: the last one is often general, such as that of a plugin of the site.
        said = [line.removeprefix(f"{name}: ").removeprefix("error: ") for line in notes]
        reason = "; ".join(dict.fromkeys(said)) or f"exit status {done.returncode}"
        raise InputError(f"{what} failed ({reason}): fix that and give the same command")
    return done.stdout, notes


def call(command: Sequence[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run `command`. The user's defaults for squeue would hide jobs. Raises OSError and subprocess.TimeoutExpired."""
    environment = {name: value for name, value in clean_environment().items() if not name.startswith("SQUEUE_")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
