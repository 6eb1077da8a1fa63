"""What a step of the reproduction is, and where its output lies.

Knows nothing about how and when steps run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tasks import TASKS

from .checks import State
from .settings import ROOT

PREPARE, TRAIN, EVALUATE, REPORT = "prepare", "train", "evaluate", "report"
VARIANT = "@variant@"
"""Stands for the variant in a command that the steps of a group share."""


@dataclass(frozen=True)
class Command:
    """Words, and the variables that they run with."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def of(self, variant: str) -> "Command":
        """The same with `variant` in place of VARIANT."""
        words = tuple(word.replace(VARIANT, variant) for word in self.words)
        return Command(words, {name: value.replace(VARIANT, variant) for name, value in self.environment.items()})


@dataclass(frozen=True)
class Step:
    """A command, with what is known about it before it runs."""

    name: str
    """Also the name of its log."""
    kind: str
    """prepare, train, evaluate or report."""
    command: Command
    """With VARIANT in place of the variant: all steps of a group have the same one."""
    check: Callable[[], State]
    """What its output says. Raises InputError for output that contradicts the plan."""
    after: tuple[str, ...] = ()
    """The steps that it needs. The report needs only one of them, the others all."""
    behind: tuple[str, ...] = ()
    """Steps whose end it waits for, even if they fail."""
    size: str = ""
    task: str = ""
    variant: str = ""
    schedule: str = ""
    complete: Command | None = None
    """The command where its output is PARTIAL, if that is another one."""

    @property
    def group(self) -> str:
        """The name without the variant: steps of one group differ in nothing else."""
        return self.name.removesuffix(f"-{self.variant}") if self.variant else self.name

    @property
    def table(self) -> tuple[str, str, str]:
        """Rows that belong together: kind, size and task."""
        return self.kind, self.size, self.task

    @property
    def part(self) -> str:
        """What a contradiction stops: a task of a size. Empty for the data and the report."""
        return f"{self.size}, {self.task}" if self.size else ""


@dataclass(frozen=True)
class Folders:
    """Where everything is, below one folder."""

    output: Path
    demo: bool

    @property
    def data(self) -> Path:
        """The rows that mani_data.py writes."""
        return self.output / "dataset"

    @property
    def sources(self) -> Path:
        """The data sets that it reads, and the videos."""
        return self.data if self.demo else ROOT / "dataset"

    @property
    def model(self) -> Path:
        return self.output / "model"

    @property
    def logs(self) -> Path:
        return self.output / "logs"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    @property
    def page(self) -> Path:
        return self.output / "status.html"

    @property
    def report(self) -> Path:
        return self.output / "report.html"

    def rows(self, task: str, split: str) -> Path:
        return self.data / Path(TASKS[task].data).name.replace("test", split)

    def trained(self, size: str, task: str, variant: str) -> Path:
        return self.output / size / f"qwen2_5vl-{TASKS[task].trained}-{variant}"

    def captions(self, size: str, task: str, variant: str, schedule: str) -> Path:
        folder = self.output / size / "evaluation" / (task if TASKS[task].subtasks else "")
        return folder / f"{variant}{'_random' if schedule == 'random' else ''}_infer.json"
