"""The steps of the tables that are asked for: their commands, what each needs before, and how its output is checked."""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

from qwen_vl_streaming.common.paths import DATA_FLAGS
from samples import DataConfig
from tasks import TASKS

import mani_data

from . import checks
from .settings import ROOT, Settings, Table
from .steps import EVALUATE, PREPARE, REPORT, TRAIN, VARIANT, Command, Folders, Step


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
        steps.append(Step(f"prepare-{task}", PREPARE, Command(command), check, made, others, task=task))
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
    steps = [Step("prepare-videos", PREPARE, Command(command), partial(checks.demo_videos, videos, planned))]
    command = (python, str(demo / "make_model.py"), "--data", str(videos), "--output", str(model))
    check = partial(checks.exists, model / "config.json")
    steps.append(Step("prepare-model", PREPARE, Command(command), check, ("prepare-videos",)))
    if "funqa" in tasks:
        command = (python, str(demo / "make_questions.py"), "--data", str(videos), "--output", str(questions))
        check = partial(checks.exists, questions / "FunQA_test.json")
        steps.append(Step("prepare-questions", PREPARE, Command(command), check, ("prepare-videos",)))
    return steps


def variant_steps(
    settings: Settings, folders: Folders, chosen: Chosen, size: str, task: str, variant: str, schedules: list[str]
) -> list[Step]:
    """The training of a variant and its evaluations."""
    data, test, model = folders.rows(task, "train"), folders.rows(task, "test"), settings.models[size]
    trained, kind = folders.trained(size, task, variant), {"size": size, "task": task, "variant": variant}
    shared = str(folders.trained(size, task, VARIANT))
    command = Command(
        ("bash", str(ROOT / "code/qwen-vl-finetune/scripts/sft.sh"), "--output_dir", shared, *settings.train),
        {
            "QWEN2_5_VL_VARIANT": VARIANT,
            "QWEN2_5_VL_MODEL_PATH": model,
            "QWEN2_5_VL_TRAIN_DATA": str(data),
            **({"NPROC_PER_NODE": "1"} if settings.demo else {}),  # its recipe names the samples of a GPU
        },
    )
    check = partial(checks.trained, trained, data, model, variant, flag_values(settings.train))
    train = Step(f"train-{size}-{task}-{variant}", TRAIN, command, check, (f"prepare-{task}",), **kind)
    steps = [train]
    for schedule in schedules:
        flags = (*(("--task", task) if TASKS[task].subtasks else ()), *settings.evaluate, *chosen.judge)
        flags += ("--schedule", "random") if schedule == "random" else ()
        captions = folders.captions(size, task, VARIANT, schedule)
        command = Command(
            ("bash", str(ROOT / "eval.sh"), *flags),
            {
                "QWEN2_5_VL_VARIANT": VARIANT,
                "QWEN2_5_VL_EVAL_MODEL_PATH": shared,
                "QWEN2_5_VL_EVAL_DATA_DIR": str(test),
                "QWEN2_5_VL_EVAL_OUTPUT_DIR": str(captions.parent),
                "QWEN2_5_VL_EVAL_OUTPUT_FILE": captions.name,
            },
        )
        complete = replace(command, words=(*command.words, "--score-only", str(captions)))
        out = folders.captions(size, task, variant, schedule)
        check = partial(checks.evaluated, out, test, trained, schedule, variant, flag_values(flags))
        name = f"evaluate-{size}-{task}-{schedule}-{variant}"
        steps.append(Step(name, EVALUATE, command, check, (train.name,), schedule=schedule, complete=complete, **kind))
    return steps


def report_step(folders: Folders, chosen: Chosen, evaluations: list[Step]) -> Step:
    """The report over the evaluations that are complete when it runs."""
    rows = [
        (
            folders.captions(step.size, step.task, step.variant, step.schedule),
            folders.trained(step.size, step.task, step.variant).name,
        )
        for step in evaluations
    ]
    again = Command(("bash", str(ROOT / "paper.sh"), "--report", *chosen.again))
    after = tuple(step.name for step in evaluations)
    return Step("report", REPORT, again, partial(checks.reported, folders.report, rows), after)


def flag_values(words: tuple[str, ...]) -> dict[str, str]:
    """The values of `words`, flags that each have one, by name without dashes; of two alike, the last counts."""
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
