"""The steps as a graph: what each runs, what it needs before, and how its output says whether it is done.

Knows nothing about how and when steps run.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from make_data import DataConfig
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import DATA_FLAGS
from tasks import TASKS

import mani_data

from . import checks
from .checks import REFUSED, State
from .settings import ROOT, Settings, Table

PREPARE, TRAIN, EVALUATE, REPORT = "prepare", "train", "evaluate", "report"


VARIANT = "@variant@"
"""Stands for the variant in a command of an array."""


@dataclass(frozen=True)
class Command:
    """Words, and the variables that they run with."""

    words: tuple[str, ...]
    environment: dict[str, str]


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
    behind: tuple[str, ...] = ()
    """Steps whose end it waits for, even if they fail."""
    size: str = ""
    task: str = ""
    variant: str = ""
    schedule: str = ""
    complete: tuple[str, ...] = ()
    """The command where its output is PARTIAL; `command` if empty."""
    array: Command | None = None
    """The command that all steps of the group share, with VARIANT in place of the variant."""
    complete_array: Command | None = None
    """The same for `complete`."""

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
    its evaluations, then the report."""
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
        planned = mani_data.options_from(mani_data.parse_arguments(command[2:])).recorded()
        check = partial(checks.prepared, rows, report, planned)
        # Both data sets keep their state in one folder, which one run at a time may use.
        others = tuple(step.name for step in steps if step.kind == PREPARE and step.task)
        steps.append(Step(f"prepare-{task}", PREPARE, command, check, after=made, behind=others, task=task))
    for size in sizes:
        for task in tasks:
            mine = [table for table in tables if table.task == task and size in table.sizes]
            for variant in chosen.variants:
                schedules = [table.schedule for table in mine if variant in table.variants]
                if schedules:
                    steps += variant_steps(settings, folders, chosen, size, task, variant, schedules)
    evaluations = [step for step in steps if step.kind == EVALUATE]
    return [*steps, report_step(folders, chosen, evaluations)]


def demo_steps(settings: Settings, folders: Folders, tasks: list[str]) -> list[Step]:
    """The demo's videos, model and questions."""
    python, demo = sys.executable, ROOT / "code/demo"
    videos, questions, model = folders.data / "PE-Video", folders.data / "FunQA", folders.model
    given = {name.replace("-", "_"): int(value) for name, value in flag_values(settings.videos).items()}
    planned = asdict(DataConfig(videos, **given)) | {"output": None}
    command = (python, str(demo / "make_data.py"), "--output", str(videos), *settings.videos)
    steps = [Step("prepare-videos", PREPARE, command, partial(checks.demo_videos, videos, planned))]
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
    data, model = folders.rows(task, "train"), settings.models[size]

    def training(name: str) -> Command:
        trained = str(folders.trained(size, task, name))
        sft = str(ROOT / "code/qwen-vl-finetune/scripts/sft.sh")
        return Command(
            ("bash", sft, "--output_dir", trained, *settings.train),
            {"QWEN2_5_VL_VARIANT": name, "QWEN2_5_VL_MODEL_PATH": model, "QWEN2_5_VL_TRAIN_DATA": str(data)},
        )

    trained, mine = folders.trained(size, task, variant), training(variant)
    check = partial(checks.trained, trained, data, model, variant, flag_values(settings.train))
    kind = {"size": size, "task": task, "variant": variant}
    needs = (f"prepare-{task}",)
    train = Step(
        f"train-{size}-{task}-{variant}",
        TRAIN,
        mine.words,
        check,
        mine.environment,
        needs,
        array=training(VARIANT),
        **kind,
    )
    steps = [train]
    for schedule in schedules:
        test, captions = folders.rows(task, "test"), folders.captions(size, task, variant, schedule)
        flags = (*(("--task", task) if TASKS[task].subtasks else ()), *settings.evaluate, *chosen.judge)
        flags += ("--schedule", "random") if schedule == "random" else ()
        mine, shared = (evaluation(folders, size, task, name, schedule, flags) for name in (variant, VARIANT))
        scored = str(folders.captions(size, task, VARIANT, schedule))
        steps.append(
            Step(
                f"evaluate-{size}-{task}-{schedule}-{variant}",
                EVALUATE,
                mine.words,
                partial(checks.evaluated, captions, test, trained, schedule, variant, flag_values(flags)),
                mine.environment,
                (train.name,),
                schedule=schedule,
                complete=(*mine.words, "--score-only", str(captions)),
                array=shared,
                complete_array=replace(shared, words=(*shared.words, "--score-only", scored)),
                **kind,
            )
        )
    return steps


def evaluation(folders: Folders, size: str, task: str, variant: str, schedule: str, flags: tuple[str, ...]) -> Command:
    """The command of an evaluation, with `flags` of eval.sh."""
    captions = folders.captions(size, task, variant, schedule)
    return Command(
        ("bash", str(ROOT / "eval.sh"), *flags),
        {
            "QWEN2_5_VL_VARIANT": variant,
            "QWEN2_5_VL_EVAL_MODEL_PATH": str(folders.trained(size, task, variant)),
            "QWEN2_5_VL_EVAL_DATA_DIR": str(folders.rows(task, "test")),
            "QWEN2_5_VL_EVAL_OUTPUT_DIR": str(captions.parent),
            "QWEN2_5_VL_EVAL_OUTPUT_FILE": captions.name,
        },
    )


def report_step(folders: Folders, chosen: Chosen, evaluations: list[Step]) -> Step:
    """The report over the evaluations that are complete when it runs."""
    rows = [
        (
            folders.captions(step.size, step.task, step.variant, step.schedule),
            folders.trained(step.size, step.task, step.variant).name,
        )
        for step in evaluations
    ]
    again = ("bash", str(ROOT / "paper.sh"), "--report", *chosen.again)
    after = tuple(step.name for step in evaluations)
    return Step("report", REPORT, again, partial(checks.reported, folders.report, rows), after=after)


def flag_values(words: tuple[str, ...]) -> dict[str, str]:
    """The values of `words`, flags that each have one, by name without dashes; of two alike, the last counts."""
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


def find_states(steps: list[Step]) -> dict[str, State]:
    """What the outputs say about each step, by its name.

    Where outputs contradict the plan, or each other within a table, the steps of that task and size are refused, and
    the others are not affected. Raises InputError, in one line, where the data contradict the plan, or nothing is left.
    """
    states: dict[str, State] = {}
    first: dict[tuple, str] = {}
    refused: dict[str, str] = {}
    for step in steps:
        try:
            states[step.name] = check_step(step, states, first)
        except InputError as error:
            if not step.part:
                raise
            refused.setdefault(step.part, str(error))
            states[step.name] = State(REFUSED, str(error))
    if refused and all(step.part in refused for step in steps if step.part):
        raise InputError(next(iter(refused.values())))
    for step in steps:
        if step.part in refused and states[step.name].word != REFUSED:
            states[step.name] = State(REFUSED, f"as all of {step.part}")
    return states


def refusals(steps: list[Step], states: dict[str, State]) -> list[str]:
    """A line for each task of a size that is refused, with the reason."""
    lines: dict[str, str] = {}
    for step in steps:
        if states[step.name].word == REFUSED and states[step.name].detail != f"as all of {step.part}":
            lines.setdefault(step.part, f"{step.part} is refused: {states[step.name].detail}")
    return list(lines.values())


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
