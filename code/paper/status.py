"""The status page: one static HTML file that says what is done, running and failed, and how long the rest takes.

Does not know how steps run.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from qwen_vl_streaming.common.files import write_file

from .checks import DONE
from .steps import Folders, Step

RUNNING, FAILED, BLOCKED = "running", "failed", "not run"
ENDED = (DONE, FAILED, BLOCKED)
FOLDER = Path(__file__).parent
REFRESH = 10
"""Seconds after which a browser loads the page again."""


@dataclass
class Progress:
    """A step as the page shows it."""

    step: Step
    word: str
    """done, started, to do, running, failed or not run."""
    detail: str = ""
    number: int = 0
    began: float = 0.0
    """When it started to run, in seconds since 1970; 0 if it has not in this run."""
    took: float = 0.0
    """Seconds of this run."""
    predicted: float | None = None
    """Seconds, by the planner of training."""

    def expected(self, others: Sequence["Progress"]) -> float | None:
        """Seconds that the step takes: as predicted, else as long as those of its kind took in this run."""
        alike = [one.took for one in others if one.took and one.word == DONE and one.step.kind == self.step.kind]
        closer = [one.took for one in others if one.took and one.word == DONE and one.step.table == self.step.table]
        return self.predicted or (fmean(closer or alike) if alike else None)


def seconds_left(progress: Sequence[Progress], now: float) -> tuple[float, int]:
    """Seconds that the steps which can still run take, and the number of those for which that is not known."""
    total, unknown = 0.0, 0
    for one in progress:
        if one.word in ENDED:
            continue
        expected = one.expected(progress)
        if expected is None:
            unknown += 1
        else:
            total += max(0.0, expected - (now - one.began if one.word == RUNNING else 0.0))
    return total, unknown


def left_text(progress: Sequence[Progress], now: float) -> str:
    """How long still, such as: about 3.4 h, and 2 steps of unknown length."""
    if not any(one.word not in ENDED for one in progress):
        return "nothing left to run"
    total, unknown = seconds_left(progress, now)
    about = f"about {duration(total)} left" if total else ""
    more = f"{unknown} step{'s' * (unknown != 1)} of unknown length" if unknown else ""
    return " and ".join(part for part in (about, more) if part) or "almost done"


def write_page(folders: Folders, progress: Sequence[Progress], finished: bool = False) -> None:
    """Write the page for the steps. A `finished` run no longer refreshes it."""
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
        log, expected = folders.log(one.step.name), one.expected(progress)
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
    reports = [path.name for path in sorted(folders.output.glob("report-*.html"))]
    text = environment.get_template("status.html").render(
        rows=rows,
        total=len(rows),
        counts={word: counts[word] for word in (DONE, RUNNING, "queued", FAILED, BLOCKED) if counts[word]},
        left=left_text(progress, now),
        share=100 * counts[DONE] / max(1, len(rows)),
        reports=reports,
        now=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        refresh=0 if finished else REFRESH,
    )
    write_file(folders.page, text)


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3600:.1f} h"
