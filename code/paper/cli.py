"""Runs paper.sh: shows the plan or the status, writes the report, submits the steps to SLURM, or runs them here."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import lock_file
from qwen_vl_streaming.common.nvidia import visible_gpus

from . import slurm
from .attempts import read_attempt
from .checks import DONE, PARTIAL, REFUSED, State
from .forecast import Forecast, forecast, save_forecasts, saved_forecasts
from .queue_status import QueueStatus
from .request import Request, parse, read_request, same_flags
from .runner import Runner, Stopped, clean_environment
from .settings import ROOT
from .states import find_states, refusals
from .status import RUNNING, Progress, duration, write_page
from .steps import EVALUATE, Folders, Step

ABOUT_DEMO = (
    "A small model, trained and evaluated on generated videos of coloured shapes (bash paper.sh --demo). Its scores "
    "show that the programs work, and say nothing about the paper's tables, whose values are beside them."
)


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
        if not lock_file(lock):
            raise InputError(
                f"another paper.sh runs in {folders.output}, and rewrites {folders.page.name}: wait for it, or stop it"
            )
        yield


def show_status(request: Request, states: dict[str, State], forecasts: dict[str, Forecast]) -> None:
    """Rewrite the status page from the outputs, the attempts and SLURM's queue."""
    status, progress = QueueStatus(request.folders), start_progress(request, states, forecasts)
    every = list(progress.values())
    status.update(request.steps, progress)
    running = sum(one.word == RUNNING for one in every)
    write_page(request.folders, every, status.is_finished(every), max(1, running))
    print(f"status: {request.folders.page}")


def start_progress(request: Request, states: dict[str, State], forecasts: dict[str, Forecast]) -> dict[str, Progress]:
    """The steps by name as the status page shows them before anything runs."""
    progress = {}
    for step in request.steps:
        state, predicted = states[step.name], forecasts.get(step.name, Forecast()).seconds
        progress[step.name] = Progress(step, state.word, state.detail, predicted=predicted)
    return progress


def submit_jobs(request: Request, states: dict[str, State]) -> None:
    """--slurm: write sbatch files for what is not done, and submit them."""
    arguments, folders, todo = request.arguments, request.folders, left_to_do(request, states)
    if arguments.gpus and (forecasts := forecast(todo, arguments.gpus)):
        save_forecasts(folders, forecasts, arguments.gpus)
    jobs = slurm.make_jobs(todo, {step.name for step in todo if states[step.name].word == PARTIAL})
    again = ["bash", str(ROOT / "paper.sh"), "--status", *same_flags(arguments, folders.output)]
    with lock_output(folders):
        lines = slurm.submit(jobs, request.caller / arguments.slurm, folders.output, again)
    print("\n".join(lines) or "everything is done")


def left_to_do(request: Request, states: dict[str, State]) -> list[Step]:
    return [step for step in request.steps if states[step.name].word not in (DONE, REFUSED)]


def predict(request: Request, states: dict[str, State]) -> dict[str, Forecast]:
    """The forecast of each training that is not done, by name. Raises InputError where it is asked for and fails."""
    arguments = request.arguments
    try:
        if arguments.status:  # runs in jobs too, which hold GPUs
            return saved_forecasts(request.folders, arguments.gpus)
        if arguments.gpus or not arguments.device:
            return forecast(left_to_do(request, states), arguments.gpus)
    except InputError as error:
        if not arguments.status and (arguments.plan or arguments.gpus):
            raise
        print(f"training is not predicted: {error}", file=sys.stderr)
    return {}


def run_steps(request: Request, states: dict[str, State], forecasts: dict[str, Forecast]) -> int:
    """Run here what is not done. Returns the exit status."""
    arguments, folders, progress = request.arguments, request.folders, start_progress(request, states, forecasts)
    for name, one in progress.items():
        attempt = read_attempt(folders.logs, name)
        if attempt and attempt.status == 0 and one.word == DONE:
            one.took = attempt.took
    with lock_output(folders):
        print(f"status: {folders.page}", flush=True)
        if forecasts:
            save_forecasts(folders, forecasts, arguments.gpus)
        try:
            gpus = visible_gpus(os.environ) if request.settings.demo else []
            code = Runner(request.steps, folders, states, progress, arguments.jobs, gpus).run()
        except Stopped as stopped:
            print(f"stopped by {stopped}: the same command resumes here", file=sys.stderr)
            sys.exit(128 + stopped.number)
    if progress[request.steps[-1].name].word == DONE:
        print(f"report: {folders.report}")
    return code


def main() -> None:
    request = read_request(parse(), Path.cwd())
    arguments, states, code = request.arguments, find_states(request.steps), 0
    if arguments.slurm:
        submit_jobs(request, states)
    elif arguments.report:
        write_report(request, states)
    elif arguments.plan:
        show_plan(request, states, predict(request, states))
    elif arguments.status:
        show_status(request, states, predict(request, states))
    else:
        code = run_steps(request, states, predict(request, states))
    refused = refusals(request.steps, states)
    for line in refused:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code or (2 if refused else 0))
