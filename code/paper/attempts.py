"""The last attempt at each step: who ran it, when, and its exit status; and the last job submitted for it.

The runner and sbatch files write an attempt as one line of a file beside the logs. It is only shown: whether a step is
done is read from its output.
"""

from dataclasses import dataclass
from pathlib import Path

LOCAL = "local"


@dataclass(frozen=True)
class Attempt:
    """A step that was started. Times are in seconds since 1970."""

    job: str
    """SLURM's id, such as 12 or 12_4 in an array; LOCAL for paper.sh itself."""
    began: float
    ended: float = 0.0
    """0 if it has not ended, or was killed."""
    status: int | None = None
    """Its exit status; None as for `ended`."""

    @property
    def took(self) -> float:
        """Seconds; 0 if it has not ended."""
        return max(0.0, self.ended - self.began) if self.ended else 0.0

    def __str__(self) -> str:
        words = [self.job, f"{self.began:.0f}"]
        words += [f"{self.ended:.0f}", str(self.status)] if self.status is not None else []
        return " ".join(words) + "\n"


def attempt_path(logs: Path, name: str) -> Path:
    return logs / f"{name}.attempt"


def submission_path(logs: Path, name: str) -> Path:
    """Of an Attempt that began when its job was submitted, and does not end."""
    return logs / f"{name}.submitted"


def read_attempt(logs: Path, name: str) -> Attempt | None:
    """The last attempt at the step `name`; None without one, or while its line is being written."""
    return _read(attempt_path(logs, name))


def not_begun(logs: Path, name: str) -> Attempt | None:
    """The submission of the step `name` if nobody has begun it since; else None."""
    submitted, attempt = _read(submission_path(logs, name)), read_attempt(logs, name)
    if not submitted or (attempt and (attempt.job == submitted.job or attempt.began > submitted.began)):
        return None
    return submitted


def _read(path: Path) -> Attempt | None:
    try:
        job, began, *end = path.read_text(encoding="utf-8").split()
        return Attempt(job, float(began), *((float(end[0]), int(end[1])) if end else ()))
    except (OSError, ValueError, IndexError):
        return None
