"""The steps as a graph: what each runs, what it needs before, and how its output says whether it is done.

Knows nothing about how and when steps run.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import DATA_FLAGS
from tasks import TASKS

from . import checks
from .checks import State
from .settings import ROOT, Settings, Table

PREPARE, TRAIN, EVALUATE, REPORT = "prepare", "train", "evaluate", "report"


@dataclass(frozen=True)
class Step:
    """A command, with what is known about it before it runs."""

    name: str
    """Also the name of its log."""
    kind: str
    """prepare, train, evaluate or report."""
    command: tuple[str, ...]
    check: Callable[[], State]
    """What its output says. Raises InputError for output that contradicts the plan."""
    environment: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    """The steps that it needs. The report needs only one of them, the others all."""
    size: str = ""
    task: str = ""
    variant: str = ""
    schedule: str = ""

    @property
    def group(self) -> str:
        """The name without the variant: steps of one group differ in nothing else."""
        return self.name.removesuffix(f"-{self.variant}") if self.variant else self.name

    @property
    def table(self) -> tuple[str, str, str]:
        """Rows that belong together: kind, size and task."""
        return self.kind, self.size, self.task


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

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"

    @property
    def page(self) -> Path:
        return self.output / "status.html"

    def rows(self, task: str, split: str) -> Path:
        return self.data / Path(TASKS[task].data).name.replace("test", split)

    def trained(self, size: str, task: str, variant: str) -> Path:
        return self.output / size / f"qwen2_5vl-{TASKS[task].trained}-{variant}"

    def captions(self, size: str, task: str, variant: str, schedule: str) -> Path:
        folder = self.output / size / "evaluation" / (task if TASKS[task].subtasks else "")
        return folder / f"{variant}{'_random' if schedule == 'random' else ''}_infer.json"


@dataclass(frozen=True)
class Chosen:
    """The part of the tables that is asked for."""

    tables: tuple[Table, ...]
    variants: tuple[str, ...]
    judge: tuple[str, ...] = ()
    """Flags of eval.sh that name the judge; empty for no Fluency."""
    again: tuple[str, ...] = ()
    """Flags of paper.sh that ask for the same steps."""


def make_steps(settings: Settings, folders: Folders, chosen: Chosen) -> list[Step]:
    """The steps in an order in which each follows those that it needs: sources, then by size and task each variant with
    its evaluations, then the reports."""
    python, tables = sys.executable, chosen.tables
    tasks = [task for task in settings.prepare if any(table.task == task for table in tables)]
    sizes = [size for size in settings.models if any(size in table.sizes for table in tables)]
    steps = demo_steps(settings, folders, tasks) if settings.demo else []
    made = tuple(step.name for step in steps)
    for task in tasks:
        data_set = DATA_FLAGS[folders.rows(task, "test").name]
        roots = ("--dataset-root", str(folders.sources)) if settings.demo else ()
        command = (python, str(ROOT / "mani_data.py"), *(("--dataset", data_set) if data_set else ()), *roots)
        command += ("--output-dir", str(folders.data), *settings.prepare[task])
        report = folders.data / f"{f'{data_set}_' if data_set else ''}report.json"
        rows = [folders.rows(task, split) for split in ("train", "test")]
        check = partial(checks.prepared, rows, report, flag_values(settings.prepare[task]))
        # Both data sets keep their state in one folder, which one run at a time may use.
        before = tuple(step.name for step in steps if step.kind == PREPARE and step.task)
        steps.append(Step(f"prepare-{task}", PREPARE, command, check, after=made + before, task=task))
    for size in sizes:
        for task in tasks:
            mine = [table for table in tables if table.task == task and size in table.sizes]
            for variant in chosen.variants:
                schedules = [table.schedule for table in mine if variant in table.variants]
                if schedules:
                    steps += variant_steps(settings, folders, chosen, size, task, variant, schedules)
        evaluations = [step for step in steps if step.kind == EVALUATE and step.size == size]
        steps.append(report_step(folders, chosen, evaluations, size))
    return steps


def demo_steps(settings: Settings, folders: Folders, tasks: list[str]) -> list[Step]:
    """The demo's videos, model and questions."""
    python, demo = sys.executable, ROOT / "code/demo"
    videos, questions, model = folders.data / "PE-Video", folders.data / "FunQA", folders.model
    given = {name.replace("-", "_"): value for name, value in flag_values(settings.videos).items()}
    command = (python, str(demo / "make_data.py"), "--output", str(videos), *settings.videos)
    steps = [Step("prepare-videos", PREPARE, command, partial(checks.demo_videos, videos, given))]
    command = (python, str(demo / "make_model.py"), "--data", str(videos), "--output", str(model))
    check = partial(checks.exists, model / "config.json")
    steps.append(Step("prepare-model", PREPARE, command, check, after=("prepare-videos",)))
    if "funqa" in tasks:
        command = (python, str(demo / "make_questions.py"), "--data", str(videos), "--output", str(questions))
        check = partial(checks.exists, questions / "FunQA_test.json")
        steps.append(Step("prepare-questions", PREPARE, command, check, after=("prepare-videos",)))
    return steps


def variant_steps(
    settings: Settings, folders: Folders, chosen: Chosen, size: str, task: str, variant: str, schedules: list[str]
) -> list[Step]:
    """The training of a variant and its evaluations."""
    data, trained, model = folders.rows(task, "train"), folders.trained(size, task, variant), settings.models[size]
    train = Step(
        f"train-{size}-{task}-{variant}",
        TRAIN,
        ("bash", str(ROOT / "code/qwen-vl-finetune/scripts/sft.sh"), "--output_dir", str(trained), *settings.train),
        partial(checks.trained, trained, data, model, variant, flag_values(settings.train)),
        {"QWEN2_5_VL_VARIANT": variant, "QWEN2_5_VL_MODEL_PATH": model, "QWEN2_5_VL_TRAIN_DATA": str(data)},
        (f"prepare-{task}",),
        size,
        task,
        variant,
    )
    steps = [train]
    for schedule in schedules:
        test, captions = folders.rows(task, "test"), folders.captions(size, task, variant, schedule)
        flags = (*(("--task", task) if TASKS[task].subtasks else ()), *settings.evaluate, *chosen.judge)
        flags += ("--schedule", "random") if schedule == "random" else ()
        metrics = [name for name, flag in (("BLEURT", "--bleurt"), ("Fluency", "--judge-url")) if flag in flags]
        steps.append(
            Step(
                f"evaluate-{size}-{task}-{schedule}-{variant}",
                EVALUATE,
                ("bash", str(ROOT / "eval.sh"), *flags),
                partial(checks.evaluated, captions, test, trained, schedule, variant, metrics),
                {
                    "QWEN2_5_VL_VARIANT": variant,
                    "QWEN2_5_VL_EVAL_MODEL_PATH": str(trained),
                    "QWEN2_5_VL_EVAL_DATA_DIR": str(test),
                    "QWEN2_5_VL_EVAL_OUTPUT_DIR": str(captions.parent),
                    "QWEN2_5_VL_EVAL_OUTPUT_FILE": captions.name,
                },
                (train.name,),
                size,
                task,
                variant,
                schedule,
            )
        )
    return steps


def report_step(folders: Folders, chosen: Chosen, evaluations: list[Step], size: str) -> Step:
    """The report over the evaluations that are complete when it runs."""
    rows = [
        (
            folders.captions(size, step.task, step.variant, step.schedule),
            folders.trained(size, step.task, step.variant).name,
        )
        for step in evaluations
    ]
    page = folders.output / f"report-{size}.html"
    again = ("bash", str(ROOT / "paper.sh"), "--report", size, *chosen.again)
    after = tuple(step.name for step in evaluations)
    return Step(page.stem, REPORT, again, partial(checks.reported, page, rows), after=after, size=size)


def flag_values(words: tuple[str, ...]) -> dict[str, str]:
    """The values of `words`, flags that each have one, by name without dashes; of two alike, the last counts."""
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


def find_states(steps: list[Step]) -> dict[str, State]:
    """What the outputs say about each step, by its name.

    Raises InputError, in one line, where outputs contradict the plan, or each other within a table.
    """
    states: dict[str, State] = {}
    first: dict[tuple, str] = {}
    for step in steps:
        states[step.name] = check_step(step, states, first)
    return states


def check_step(step: Step, states: dict[str, State], first: dict[tuple, str]) -> State:
    """What the output of one step says. `first` has the first step of each table that has facts. Raises InputError."""
    state = step.check()
    if not state.facts:
        return state
    other = first.setdefault(step.table, step.name)
    known = state.facts if other == step.name else states[other].facts
    for fact, value in state.facts.items():
        if fact in known and known[fact] != value:
            raise InputError(
                f"{step.name} and {other} do not belong in one table: {fact} is {value} and {known.get(fact)}: move "
                f"away the output of one of them ({state.where}), or give another --output"
            )
    return state
