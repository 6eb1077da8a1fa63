"""What the command line of paper.sh asks for."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.redact import redacted
from tasks import TASKS

from .plan import Chosen, make_steps
from .settings import EVERYWHERE, PAPER, ROOT, Settings, Table, demo
from .steps import Folders, Step

ABOUT = """\
Reproduce the paper's tables: prepare the data, train what is missing, evaluate with fixed and random schedules, and
write the report with the paper's figures beside ours. code/paper/settings.py has the settings.

A step is done if its output says so, so the same command resumes where it was stopped. A step that fails names its log;
steps that do not need it go on, and the exit status is 1. While it runs, status.html in the output folder shows what is
done, running and failed, and how long the rest takes.
"""
DEMO_FLAGS = ("steps", "train_videos", "test_videos")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="paper.sh", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    part = parser.add_argument_group("which part of the tables")
    part.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"some of {' '.join(PAPER.models)} (default: all)")
    variants = PAPER.tables[0].variants
    part.add_argument("--variants", nargs="+", metavar="NAME", help=f"some of {' '.join(variants)} (default: all)")
    part.add_argument("--tasks", nargs="+", metavar="TASK", help=f"some of {' '.join(TASKS)} (default: all)")
    part.add_argument("--schedules", nargs="+", metavar="S", help="some of fixed random (default: both)")
    part.add_argument("--everywhere", action="store_true", help="also what the paper does not print: all sizes alike")
    what = parser.add_argument_group("what to do instead of running")
    what.add_argument("--plan", action="store_true", help="show what is done and what would run, with hours and disk")
    what.add_argument("--slurm", type=Path, metavar="DIR", help="write sbatch files into this folder and submit them")
    what.add_argument("--status", action="store_true", help="rewrite the status page from the outputs and the queue")
    what.add_argument("--report", action="store_true", help="write the report over what is complete")
    where = parser.add_argument_group("where and how")
    where.add_argument("--output", type=Path, help="folder of all output (default: paper_output or demo_output/paper)")
    where.add_argument("--gpus", default="", help="GPUs to predict for, such as 8xH100-80GB (default: those here)")
    where.add_argument("--device", choices=("cpu",), help="cpu: train and evaluate on the CPU; for the demo")
    where.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="steps side by side on this machine, for small models [1]"
    )
    where.add_argument("--judge-url", default="", help="compute Fluency with a judge, as in eval.sh")
    where.add_argument("--judge-model", default="", help="its model name")
    small = parser.add_argument_group("the demo")
    small.add_argument("--demo", action="store_true", help="use the demo's small model and videos")
    for name in DEMO_FLAGS:
        small.add_argument(f"--{name.replace('_', '-')}", type=int, help="as in demo.sh")
    return parser.parse_args(words)


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    arguments: argparse.Namespace
    caller: Path
    """The folder in which it was given."""
    settings: Settings
    folders: Folders
    steps: list[Step]


def read_request(arguments: argparse.Namespace, caller: Path) -> Request:
    """Raises InputError for flags that contradict each other."""
    given = {name: getattr(arguments, name) for name in DEMO_FLAGS}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and not arguments.demo:
            raise InputError(f"{flag} is for the demo: add --demo, or remove it")
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: give a positive number")
    if arguments.device and not arguments.demo:
        raise InputError("--device cpu is for the demo: the paper's models need GPUs")
    if arguments.everywhere and arguments.demo:
        raise InputError("--everywhere contradicts --demo, which has one size: remove one")
    if sum(bool(getattr(arguments, name)) for name in ("plan", "slurm", "status", "report")) > 1:
        raise InputError("--plan, --slurm, --status and --report exclude each other: give one")
    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: give a positive number")
    if arguments.jobs > 1 and not arguments.demo:
        raise InputError("--jobs is for the demo: a training of the paper's models takes all GPUs; remove it")
    if bool(arguments.judge_url) != bool(arguments.judge_model):
        raise InputError("--judge-url and --judge-model go together: give both")
    if arguments.slurm and redacted(arguments.judge_url) != arguments.judge_url:
        raise InputError(
            "--judge-url has a password, which would be in the sbatch files: set OPENAI_API_KEY, which sbatch passes on"
        )
    for flag, path in (("--output", arguments.output), ("--slurm", arguments.slurm)):
        try:
            (caller / (path or "")).exists()
        except OSError as error:  # such as a name that is too long
            raise InputError(f"{flag} {path} cannot be used ({error.strerror}): give another folder") from None
    output = arguments.output or ROOT / ("demo_output/paper" if arguments.demo else "paper_output")
    folders = Folders(Path(os.path.abspath(caller / output)), arguments.demo)
    settings = PAPER
    if arguments.demo:
        videos = {"--train-videos": arguments.train_videos, "--test-videos": arguments.test_videos}
        settings = demo(folders.model, arguments.steps, videos, arguments.device)
    elif arguments.everywhere:
        settings = replace(PAPER, tables=EVERYWHERE)
    variants = choose("--variants", arguments.variants, settings.tables[0].variants)
    judge = ("--judge-url", arguments.judge_url, "--judge-model", arguments.judge_model) if arguments.judge_url else ()
    tables = choose_tables(settings, arguments)
    lacking = [name for name in variants if not any(name in table.variants for table in tables)]
    if arguments.variants and lacking:
        raise InputError(f"--variants {lacking[0]} writes after the video and has no random schedule: remove one")
    chosen = Chosen(tables, tuple(variants), judge, same_flags(arguments, folders.output))
    return Request(arguments, caller, settings, folders, make_steps(settings, folders, chosen))


def same_flags(arguments: argparse.Namespace, output: Path) -> tuple[str, ...]:
    """The flags that ask for the same steps in `output`."""
    words = ["--output", str(output)]
    for name in ("sizes", "variants", "tasks", "schedules"):
        words += [f"--{name}", *value] if (value := getattr(arguments, name)) else []
    for name in ("everywhere", "demo"):
        words += [f"--{name}"] if getattr(arguments, name) else []
    for name in ("device", "judge_url", "judge_model", *DEMO_FLAGS):
        words += [f"--{name.replace('_', '-')}", str(value)] if (value := getattr(arguments, name)) else []
    return tuple(words)


def choose(flag: str, asked: list[str] | None, known: Sequence[str]) -> list[str]:
    """What was `asked` for, in the order of `known`; all if nothing was. Raises InputError for what is not known."""
    words = [word for text in asked or () for word in text.replace(",", " ").split()]
    if asked is not None and not words:
        raise InputError(f"{flag} is empty: choose from {', '.join(known)}, or remove it")
    if unknown := [word for word in words if word not in known]:
        raise InputError(f"{flag} {unknown[0]}: choose from {', '.join(known)}")
    return [name for name in known if name in words or asked is None]


def choose_tables(settings: Settings, arguments: argparse.Namespace) -> tuple[Table, ...]:
    """The tables cut down as asked. Raises InputError where nothing is left, or a size has nothing to do."""
    asked = {
        "sizes": choose("--sizes", arguments.sizes, list(settings.models)),
        "tasks": choose("--tasks", arguments.tasks, list(settings.prepare)),
        "schedules": choose("--schedules", arguments.schedules, ("fixed", "random")),
    }
    tables = [
        replace(table, sizes=sizes)
        for table in settings.tables
        if table.task in asked["tasks"] and table.schedule in asked["schedules"]
        if (sizes := tuple(size for size in table.sizes if size in asked["sizes"]))
    ]
    there = {
        "sizes": {size for table in tables for size in table.sizes},
        "tasks": {table.task for table in tables},
        "schedules": {table.schedule for table in tables},
    }
    for name, values in asked.items():
        if getattr(arguments, name) and (lacking := [value for value in values if value not in there[name]]):
            more = "" if settings.demo else "; --everywhere runs what the paper does not print"
            raise InputError(
                f"--{name} {lacking[0]}: the paper has no table of it with the other flags: remove one{more}"
            )
    return tuple(tables)
