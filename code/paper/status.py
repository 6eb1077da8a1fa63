"""The status page: one static HTML file that says what is done, running and failed, and how long the rest takes.

Does not know how steps run.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from qwen_vl_streaming.common.files import write_file

from .checks import DONE, PARTIAL, REFUSED
from .steps import REPORT, Folders, Step

RUNNING, QUEUED, FAILED, BLOCKED = "running", "queued", "failed", "not run"
ENDED = (DONE, FAILED, BLOCKED, REFUSED)
FOLDER = Path(__file__).parent
REFRESH = 10
"""Seconds after which a browser loads the page again."""


@dataclass
class Progress:
    """A step as the page shows it."""

    step: Step
    word: str
    """done, incomplete, started, to do, queued, running, failed, not run or refused."""
    detail: str = ""
    number: int = 0
    began: float = 0.0
    """When it started to run, in seconds since 1970; 0 if it has not in this run."""
    took: float = 0.0
    """Seconds of this run."""
    predicted: float | None = None
    """Seconds, by the planner of training."""
    log: Path | None = None
    """Of its last attempt."""

    @property
    def ended(self) -> bool:
        """Whether it has ended, or will not run."""
        return self.word in ENDED or (self.word == PARTIAL and self.took > 0)

    def expected(self, others: Sequence["Progress"]) -> float | None:
        """Seconds that the step takes: as predicted, else as long as those of its table took, or those of its kind and
        size. None if there are none."""
        done = [one for one in others if one.took and one.word in (DONE, PARTIAL)]
        alike = [one.took for one in done if (one.step.kind, one.step.size) == (self.step.kind, self.step.size)]
        closer = [one.took for one in done if one.step.table == self.step.table]
        return self.predicted or (fmean(closer or alike) if alike else None)


def blocked_by(step: Step, progress: Mapping[str, Progress]) -> str:
    """A step without which `step` cannot run, and that has failed or cannot run itself; empty if there is none."""
    lacking = [name for name in step.after if progress[name].word in (FAILED, BLOCKED, REFUSED)]
    return lacking[0] if lacking and (step.kind != REPORT or len(lacking) == len(step.after)) else ""


def seconds_left(progress: Sequence[Progress], now: float, jobs: int = 1) -> tuple[float, int]:
    """Seconds until all steps that can still run have ended, if `jobs` run side by side and each starts when those that
    it needs have ended and a place is free; and the number of steps of unknown length, which count as 0."""
    ends: dict[str, float] = {}
    places = [0.0] * max(1, jobs)
    unknown = 0
    for one in sorted(progress, key=lambda one: one.word != RUNNING):  # each follows those that it needs
        if one.ended:
            continue
        expected = one.expected(progress)
        unknown += expected is None
        spent = now - one.began if one.word == RUNNING and one.began else 0.0
        ready = max((ends.get(name, 0.0) for name in (*one.step.after, *one.step.behind)), default=0.0)
        place = places.index(min(places))
        places[place] = ends[one.step.name] = max(places[place], ready) + max(0.0, (expected or 0.0) - spent)
    return max(places), unknown


def left_text(progress: Sequence[Progress], now: float, jobs: int = 1) -> str:
    """How long still, such as: about 3.4 h, and 2 steps of unknown length."""
    if all(one.ended for one in progress):
        return "nothing left to run"
    total, unknown = seconds_left(progress, now, jobs)
    side = f" with {jobs} jobs side by side" if jobs > 1 else ""
    about = f"about {duration(total)} left{side}" if total else ""
    more = f"{unknown} step{'s' * (unknown != 1)} of unknown length" if unknown else ""
    return " and ".join(part for part in (about, more) if part) or "almost done"


def write_page(folders: Folders, progress: Sequence[Progress], finished: bool = False, jobs: int = 1) -> None:
    """Write the page for the steps, of which `jobs` run side by side. A `finished` run no longer refreshes it."""
    now = time.time()
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = []
    for one in progress:
        log, expected = one.log or folders.log(one.step.name), one.expected(progress)
        spent = one.took or (now - one.began if one.word == RUNNING else 0.0)
        rows.append(
            {
                "name": one.step.name,
                "word": one.word,
                "detail": one.detail.replace(f"{folders.output}/", ""),
                "spent": duration(spent) if spent else "",
                "expected": f"about {duration(expected)}" if expected and one.word not in ENDED else "",
                "log": f"logs/{log.name}" if log.exists() else "",
            }
        )
    counts = Counter(one.word for one in progress)
    shown = (DONE, PARTIAL, RUNNING, QUEUED, FAILED, BLOCKED, REFUSED)
    text = environment.get_template("status.html").render(
        rows=rows,
        total=len(rows),
        counts={word: counts[word] for word in shown if counts[word]},
        left=left_text(progress, now, jobs),
        share=100 * counts[DONE] / max(1, len(rows)),
        report=folders.report.name if folders.report.exists() else "",
        now=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        refresh=0 if finished else REFRESH,
    )
    write_file(folders.page, text)


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"
