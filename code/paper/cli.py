"""Reproduce the paper's tables: prepare the data, train what is missing, evaluate with fixed and random schedules, and
write the report with the paper's figures beside ours. code/paper/settings.py has the settings.

A step is done if its output says so, so the same command goes on where it was stopped. A step that fails names its log;
steps that do not need it go on, and the exit status is 1. While it runs, status.html in the output folder shows what is
done, running and failed, and how long the rest takes.
"""

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.redact import redacted
from tasks import TASKS

from . import slurm
from .attempts import read_attempt
from .checks import DONE, PARTIAL, REFUSED, State
from .forecast import Forecast, forecast, read_forecasts, save_forecasts
from .queue_status import QueueStatus
from .runner import Runner, Stopped, clean_environment
from .settings import EVERYWHERE, PAPER, ROOT, Settings, Table, demo
from .status import RUNNING, Progress, duration, write_page
from .steps import EVALUATE, Chosen, Folders, Step, find_states, make_steps, refusals

ABOUT_DEMO = (
    "A small model, trained and evaluated on generated videos of coloured shapes (bash paper.sh --demo). Its scores "
    "show that the programs work, and say nothing about the paper's tables, whose values are beside them."
)
DEMO_FLAGS = ("steps", "train_videos", "test_videos")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="paper.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_argument_group("which part of the tables")
    part.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"of {' '.join(PAPER.models)} (default: all)")
    variants = PAPER.tables[0].variants
    part.add_argument("--variants", nargs="+", metavar="NAME", help=f"of {' '.join(variants)} (default: all)")
    part.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {' '.join(TASKS)} (default: all)")
    part.add_argument("--schedules", nargs="+", metavar="S", help="of fixed random (default: both)")
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
    return Request(settings, folders, make_steps(settings, folders, chosen))


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
        raise InputError(f"{flag} is empty: choose of {', '.join(known)}, or remove it")
    if unknown := [word for word in words if word not in known]:
        raise InputError(f"{flag} {unknown[0]}: choose of {', '.join(known)}")
    return [name for name in known if name in words or asked is None]


def choose_tables(settings: Settings, arguments: argparse.Namespace) -> tuple[Table, ...]:
    """The tables cut down as asked. Raises InputError where nothing is left, or a size has nothing to do."""
    sizes = choose("--sizes", arguments.sizes, list(settings.models))
    tasks = choose("--tasks", arguments.tasks, list(settings.prepare))
    schedules = choose("--schedules", arguments.schedules, ("fixed", "random"))
    tables = [
        replace(table, sizes=tuple(size for size in table.sizes if size in sizes))
        for table in settings.tables
        if table.task in tasks and table.schedule in schedules
    ]
    for flag, asked, values in (
        ("--sizes", arguments.sizes, [(size, any(size in t.sizes for t in tables)) for size in sizes]),
        ("--tasks", arguments.tasks, [(task, any(t.task == task and t.sizes for t in tables)) for task in tasks]),
        (
            "--schedules",
            arguments.schedules,
            [(s, any(t.schedule == s and t.sizes for t in tables)) for s in schedules],
        ),
    ):
        for value, there in values:
            if asked and not there:
                more = "" if settings.demo else "; --everywhere runs what the paper does not print"
                raise InputError(f"{flag} {value}: the paper has no table of it with the other flags: remove one{more}")
    return tuple(table for table in tables if table.sizes)


def show_plan(request: Request, states: dict[str, State], forecasts: dict[str, Forecast]) -> None:
    """Print the steps with their states, hours and disk, and the sums."""
    width = max(len(step.name) for step in request.steps)
    seconds, disk, unknown = 0.0, 0.0, {}
    for number, step in enumerate(request.steps, 1):
        state, predicted = states[step.name], forecasts.get(step.name)
        parts = [state.detail] if state.detail else []
        if predicted and not state.done:
            if predicted.why:
                unknown[predicted.why] = True
            else:
                parts.append(f"{duration(predicted.seconds or 0)}, {predicted.bytes / 1e9:,.0f} GB")
                seconds, disk = seconds + (predicted.seconds or 0), disk + predicted.bytes
        print(f"{number:>3}  {state.word:<8} {step.name:<{width}}  {', '.join(parts)}".rstrip())
    left = sum(not states[step.name].done for step in request.steps)
    print(f"\n{len(request.steps) - left} of {len(request.steps)} steps are done; output: {request.folders.output}")
    if seconds:
        folder = next(path for path in (request.folders.output, *request.folders.output.parents) if path.exists())
        free = shutil.disk_usage(folder).free
        print(
            f"training: {duration(seconds)} one after the other, and {disk / 1e9:,.0f} GB of checkpoints; "
            f"{free / 1e9:,.0f} GB are free. Evaluation and data come on top and are not predicted."
        )
        if disk > free:
            print("warning: the checkpoints do not fit: give --output on a larger disk")
    for reason in unknown:
        print(f"training is not predicted: {reason}")


def write_report(request: Request, states: dict[str, State]) -> NoReturn:
    """Become report.py, over the evaluations that have scores. Raises InputError where there are none."""
    evaluations = [step for step in request.steps if step.kind == EVALUATE]
    usable = [str(states[step.name].where) for step in evaluations if states[step.name].usable]
    notes = refusals(request.steps, states)
    if not usable:
        raise InputError(
            f"--report: none of the {len(evaluations)} evaluations is complete: {next(iter(notes), 'run them first')}"
        )
    notes += [
        f"{step.name} is not in the report: {states[step.name].detail or states[step.name].word}"
        for step in evaluations
        if not states[step.name].usable and states[step.name].word != REFUSED
    ]
    print("\n".join(notes), end="\n" * bool(notes), flush=True)
    if request.settings.demo:
        notes.insert(0, ABOUT_DEMO)
    name = request.folders.report.with_suffix("")
    words = [word for note in notes for word in ("--note", note)]
    command = [sys.executable, str(ROOT / "code/evaluation/report.py"), *usable, "--output", str(name), *words]
    os.execve(command[0], command, clean_environment())


@contextmanager
def lock_output(folders: Folders) -> Iterator[None]:
    """Raises InputError where the output folder cannot be written, or another paper.sh runs in it."""
    try:
        folders.output.mkdir(parents=True, exist_ok=True)
        lock = (folders.output / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--output {folders.output} cannot be written ({error.strerror}): give another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another paper.sh runs in {folders.output}, and rewrites {folders.page.name}: wait for it, or stop it"
            ) from None
        yield


def saved_forecasts(folders: Folders, gpus: str) -> dict[str, Forecast]:
    """What was predicted when the steps were submitted or ran, if that was for these `gpus` or they are not named."""
    try:
        known, found = read_forecasts(folders)
    except InputError as error:
        print(f"training is not predicted: {error}", file=sys.stderr)
        return {}
    if not gpus or known == gpus:
        return found
    print(
        f"training is not predicted: {folders.output} has no forecast for {gpus}: --slurm or a run makes it",
        file=sys.stderr,
    )
    return {}


def show_status(request: Request, progress: dict[str, Progress]) -> None:
    """Rewrite the status page from the outputs, the attempts and SLURM's queue."""
    status, every = QueueStatus(request.folders), list(progress.values())
    status.update(request.steps, progress)
    running = sum(one.word == RUNNING for one in every)
    write_page(request.folders, every, status.is_finished(every), max(1, running))
    print(f"status: {request.folders.page}")


def end_with(refused: Sequence[str], code: int = 0) -> NoReturn:
    """End with `code`, or with 2 and a line for each part that is refused."""
    for line in refused:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code or (2 if refused else 0))


def main() -> None:
    caller = Path.cwd()
    arguments = parse()
    request = read_request(arguments, caller)
    folders, steps = request.folders, request.steps
    states = find_states(steps)
    refused = refusals(steps, states)
    todo = [step for step in steps if states[step.name].word not in (DONE, REFUSED)]
    if arguments.slurm:
        forecasts = forecast(todo, arguments.gpus) if arguments.gpus else {}
        jobs = slurm.make_jobs(todo, {step.name for step in todo if states[step.name].word == PARTIAL})
        again = ["bash", str(ROOT / "paper.sh"), "--status", *same_flags(arguments, folders.output)]
        if forecasts:
            save_forecasts(folders, forecasts, arguments.gpus)
        lines = slurm.submit(jobs, caller / arguments.slurm, folders.output, again)
        print("\n".join(lines) or "everything is done")
        end_with(refused)
    if arguments.report:
        write_report(request, states)
    predict = arguments.gpus or not arguments.device
    try:
        if arguments.status:  # runs in jobs too, which hold GPUs
            forecasts = saved_forecasts(folders, arguments.gpus)
        else:
            forecasts = forecast(todo, arguments.gpus) if predict else {}
    except InputError as error:
        if arguments.plan or arguments.gpus:
            raise
        print(f"training is not predicted: {error}", file=sys.stderr)
        forecasts = {}
    if arguments.plan:
        show_plan(request, states, forecasts)
        end_with(refused)
    progress = {step.name: Progress(step, states[step.name].word, states[step.name].detail) for step in steps}
    for name, found in forecasts.items():
        if name in progress:
            progress[name].predicted = found.seconds
    if arguments.status:
        show_status(request, progress)
        end_with(refused)
    for step in steps:
        attempt = read_attempt(folders.logs, step.name)
        if attempt and attempt.status == 0 and progress[step.name].word == DONE:
            progress[step.name].took = attempt.took
    with lock_output(folders):
        print(f"status: {folders.page}", flush=True)
        if forecasts:
            save_forecasts(folders, forecasts, arguments.gpus)
        try:
            code = Runner(steps, folders, states, progress, arguments.jobs).run()
        except Stopped as stopped:
            print(f"stopped by {stopped}: the same command goes on from here", file=sys.stderr)
            sys.exit(128 + stopped.number)
    if progress[steps[-1].name].word == DONE:
        print(f"report: {folders.report}")
    end_with(refused, code)
