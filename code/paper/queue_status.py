"""What SLURM and the files of attempts say about steps that are not done: queued, running, or failed, with their logs.

squeue says what is queued and runs; the exit statuses that sbatch files write say what failed, and sacct, where it is,
how a job ended that left none. Each works without the others.
"""

import logging
import shutil
import time
from collections.abc import Sequence

from qwen_vl_streaming.common.errors import InputError

from .attempts import LOCAL, Attempt, not_begun, read_attempt
from .checks import DONE, PARTIAL, REFUSED, TO_DO
from .runner import last_line
from .slurm import entry, log_path
from .slurm_queue import job_ends, queued_jobs
from .status import BLOCKED, ENDED, FAILED, QUEUED, RUNNING, Progress, blocked_by
from .steps import Folders, Step

logger = logging.getLogger(__name__)


class QueueStatus:
    """The steps as SLURM and the files show them."""

    def __init__(self, folders: Folders):
        self.folders, self.known, self.asked = folders, bool(shutil.which("squeue")), time.time()
        try:
            self.queue = queued_jobs()
        except InputError as error:  # a controller that does not answer: the files say the rest
            self.queue, self.known = {}, False
            logger.warning("the queue is not known: %s", error)

    def update(self, steps: Sequence[Step], progress: dict[str, Progress]) -> None:
        """Set words, details, times and logs of `progress` by the last attempts and the queue."""
        logs = self.folders.logs
        attempts = {step.name: read_attempt(logs, step.name) for step in steps}
        gone = {step.name: self._gone(step) for step in steps if progress[step.name].word not in (DONE, REFUSED)}
        lost = [one.job for one in attempts.values() if one and one.status is None and one.job != LOCAL]
        ends = job_ends([*lost, *filter(None, gone.values())])
        for step in steps:
            one, attempt = progress[step.name], attempts[step.name]
            if attempt:
                one.log = self.folders.log(step.name)
                if attempt.job != LOCAL:
                    one.log = log_path(logs, step.group, attempt.job)
                one.took = attempt.took
            if one.word not in (DONE, REFUSED):
                self._update_one(step, one, None if gone[step.name] else attempt, ends)
            if one.word in (DONE, FAILED, BLOCKED, REFUSED, QUEUED, RUNNING):
                continue
            if needed := blocked_by(step, progress):
                one.word, one.detail = BLOCKED, f"needs {needed}"
            elif one.word == TO_DO and (job := gone.get(step.name)):
                how = ends.get(job, f"cancelled, or its node cannot write {logs}")
                why = (
                    "" if job not in ends or how.startswith("CANCELLED") else f": check that its node can write {logs}"
                )
                one.word, one.detail = FAILED, f"job {job} ended before it began ({how}){why}"

    def _gone(self, step: Step) -> str:
        """The job that was submitted for a step and left the queue without a trace; empty if there is none."""
        submitted = not_begun(self.folders.logs, step.name)
        gone = self.known and entry(step, self.folders.output) not in self.queue
        return submitted.job if gone and submitted and submitted.began <= self.asked else ""

    def _update_one(self, step: Step, one: Progress, attempt: Attempt | None, ends: dict[str, str]) -> None:
        queued = self.queue.get(entry(step, self.folders.output))
        said = last_line(one.log) if attempt and one.log and one.log.exists() else ""
        # Its file calls this program after it has written the exit status, and is in the queue still. One that is
        # killed may be requeued, unless sacct says how it ended.
        if queued and queued.has_ended(attempt) and attempt and (attempt.status is not None or attempt.job in ends):
            queued = None
        if queued and queued.waits:
            one.word, one.took = QUEUED, 0.0
            one.detail = f"job {queued.id}, waits{f' ({queued.reason})' if queued.reason != 'None' else ''}"
        elif queued:
            one.word, one.took = RUNNING, 0.0
            one.detail = f"job {queued.id}, {queued.state.lower()}"
            if attempt and attempt.job == queued.id:
                one.began = attempt.began
                if one.log and one.log.exists():
                    one.detail = last_line(one.log, running=True)
        elif not attempt or (one.word in (PARTIAL, TO_DO) and attempt.status == 0):
            return  # incomplete as it says, or its output was moved away
        elif attempt.status:
            one.word, one.detail = FAILED, said or f"exit status {attempt.status}"
        elif attempt.status == 0:
            one.word, one.detail = FAILED, f"ended, but its output is incomplete: {one.detail or one.word}"
        elif attempt.job in ends or (self.known and attempt.job != LOCAL):
            how = ends.get(attempt.job, "ended without an exit status")
            one.word, one.detail = FAILED, f"{how}: {said}" if said else how
        elif attempt.job == LOCAL:
            one.detail = "stopped"
        else:
            one.detail = (
                f"began as job {attempt.job}; the queue, which would say whether it still runs, is not known here"
            )

    def is_finished(self, progress: Sequence[Progress]) -> bool:
        """Whether nothing changes until something is submitted."""
        words = {one.word for one in progress}
        return not words & {RUNNING, QUEUED} and (self.known or words <= {*ENDED, PARTIAL})
