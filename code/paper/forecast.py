"""Hours and disk of the trainings that are still to run, by the planner of sft.sh.

Runs as a process of its own, `python -m paper.forecast GPUS`, because the planner imports transformers and looks at
GPUs: reads {name: flags of train.py} as JSON from stdin, and prints {name: {"seconds", "bytes"} or {"why"}}.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object, write_file

from .steps import TRAIN, Folders, Step

OPTIMIZER_BYTES = 12
"""Of a parameter that trains: float32 weights and two moments, in each intermediate checkpoint."""


@dataclass(frozen=True)
class Forecast:
    """What is predicted for a training from its first step."""

    seconds: float | None = None
    bytes: float = 0.0
    """The checkpoint and the intermediate ones that are kept."""
    why: str = ""
    """Why nothing is predicted."""


def forecast(steps: Sequence[Step], gpus: str) -> dict[str, Forecast]:
    """The forecast of each training among `steps`, by name, for `gpus` such as 8xH100-80GB, or for those that are here.

    Variants of a size and task are alike. Raises InputError for unknown `gpus`.
    """
    trainings = [step for step in steps if step.kind == TRAIN]
    names = {step.group: step for step in trainings}
    asked, environment = {}, dict(os.environ)
    for group, step in names.items():
        words, given = step.command.words, step.command.environment
        model, data = given["QWEN2_5_VL_MODEL_PATH"], given["QWEN2_5_VL_TRAIN_DATA"]
        asked[group] = ["--model_name_or_path", model, "--train_data", data, *words[2:]]
        environment |= {name: value for name, value in given.items() if name == "NPROC_PER_NODE"}
    if not asked:
        return {}
    command = [sys.executable, "-m", "paper.forecast", gpus]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the planner failed"]
        raise InputError(lines[-1].removeprefix("error: "))
    found = {group: Forecast(**values) for group, values in json.loads(done.stdout).items()}
    return {step.name: found[step.group] for step in trainings}


def save_forecasts(folders: Folders, found: dict[str, Forecast], gpus: str) -> None:
    """Keep what was `found` for `gpus` for the status page, with what was found before for the same ones."""
    known, before = read_forecasts(folders)
    steps = {name: asdict(one) for name, one in ({**before, **found} if known == gpus else found).items()}
    write_file(forecast_path(folders), json.dumps({"gpus": gpus, "steps": steps}, indent=1) + "\n")


def saved_forecasts(folders: Folders, gpus: str) -> dict[str, Forecast]:
    """What was predicted when the steps were submitted or ran. Raises InputError if that was for other GPUs than
    `gpus`, unless these are empty."""
    known, found = read_forecasts(folders)
    if gpus and known != gpus:
        raise InputError(f"{folders.output} has no forecast for {gpus}: --slurm or a run makes it")
    return found


def read_forecasts(folders: Folders) -> tuple[str, dict[str, Forecast]]:
    """The GPUs of the saved forecasts, empty for those that were here, and the forecasts by the name of their step.
    Raises InputError for a file that is damaged."""
    path = forecast_path(folders)
    if not path.exists():
        return "", {}
    saved = read_object(path, "remove it")
    try:
        return saved["gpus"], {name: Forecast(**one) for name, one in saved["steps"].items()}
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} has no forecasts: remove it") from None


def forecast_path(folders: Folders) -> Path:
    return folders.output / "forecast.json"


def main() -> None:
    gpus_text = sys.argv[1]
    with contextlib.redirect_stdout(sys.stderr):  # libraries print there
        found = predict(json.load(sys.stdin), gpus_text)
    print(json.dumps(found))


def predict(asked: dict[str, list[str]], gpus_text: str) -> dict[str, dict]:
    import torch
    from qwenvl.planner.gpus import gpus_here, parse_gpus
    from qwenvl.planner.request import Request
    from qwenvl.training_arguments import SftArguments

    here, asked_for = torch.cuda.device_count() if not gpus_text else 0, os.environ.get("NPROC_PER_NODE", "")
    here = min(here, int(asked_for)) if asked_for.isdecimal() else here
    if not gpus_text and not here:
        return {name: {"why": "no GPU found: give --gpus, such as --gpus 8xH100-80GB"} for name in asked}
    nodes = int(os.environ.get("NNODES", "1"))
    gpus = parse_gpus(gpus_text, nodes) if gpus_text else gpus_here(here, nodes)
    found, headers = {}, {}
    for name, words in asked.items():
        try:
            request = Request.parse(words)
            # Groups share videos, which a row names in the same way where they are looked up in the same folder.
            shared = headers.setdefault(request.data and request.data.video_root, request.headers)
            request = replace(request, headers=shared)
            plan, shape, _, steps = request.predict(gpus)
        except InputError as error:
            found[name] = {"why": str(error)}
            continue
        every, most = (
            request.given.get(flag, SftArguments.__dataclass_fields__[flag].default)
            for flag in ("save_steps", "save_total_limit")
        )
        kept = min(most or math.inf, math.ceil(steps / every) if every >= 1 else math.ceil(1 / every))
        weights, states = 2.0 * shape.total, float(OPTIMIZER_BYTES * shape.trained)
        found[name] = {"seconds": steps * plan.speed.step, "bytes": weights + kept * (weights + states)}
    return found


if __name__ == "__main__":
    from qwen_vl_streaming.common.errors import run

    run(main)
