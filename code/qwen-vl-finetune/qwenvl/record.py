"""The record of a run, run.json: its data, model, arguments and versions, and each time that it was started.

A run resumes only with the same facts. Does not depend on models and samples.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from qwen_vl_streaming.common.data_rows import hash_data
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object, write_file
from qwen_vl_streaming.common.redact import redacted_command
from qwen_vl_streaming.common.tables import HUB
from qwen_vl_streaming.common.versions import RUNNING, versions
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.timeline.positions import RULE

from .argument_checks import defaults
from .checkpointing import OTHER_OUTPUT, newest_checkpoint, saving
from .fixed import FREE_FLAGS, is_fixed
from .training_arguments import PAPER_SAMPLES

PACKAGES = (*RUNNING, "accelerate", "deepspeed", "peft")
FIXED_FACTS = {
    "variant": "variant",
    "position_rule": "position rule",
    "schedule": "schedule",
    "world_size": "processes",
    "zero_stage": "ZeRO stage",
}
"""Facts that cannot change when a run resumes, and what messages call them."""


def commit(folder: Path) -> dict | None:
    """The git commit of the code and whether files have changed since; None without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return {"hash": git("rev-parse", "HEAD").strip(), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def step_samples(arguments: dict) -> int:
    """Samples of a process in an optimizer step."""
    return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]


def recipe_differences(arguments: dict, groups) -> dict:
    """The paper's value, which is the default, of each flag of a recipe in which `arguments` differ from it, and of
    `step_samples`. `groups` are the dataclasses of the flags."""
    stock = {name: default for group in groups for name, default in defaults(group).items()}
    recipe = (name for name in stock if is_fixed(name) and name not in FREE_FLAGS.split())
    found = {name: stock[name] for name in recipe if arguments[name] != stock[name]}
    return found if step_samples(arguments) == PAPER_SAMPLES else {**found, "step_samples": PAPER_SAMPLES}


def describe_run(model, data, training, rows: int, held_out: int, excluded: list[int], timed: bool = False) -> dict:
    """The facts that identify a run: its three groups of arguments, versions and data. Of its `rows`, `held_out` and
    those at the lines `excluded` are not used for training. `timed`: the times of some rows decide when their answers
    are written."""
    source = data.train_data
    zero = training.hf_deepspeed_config.config if training.deepspeed else None
    arguments = {**asdict(model), **asdict(data), **training.to_dict(), "deepspeed": zero}
    return {
        "variant": model.variant,
        "position_rule": RULE if model.rules.after_video else None,
        "schedule": model.schedule if timed or model.decides else model.wait_schedule,
        "world_size": training.world_size,
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else platform.processor() or "cpu",
        "zero_stage": zero and zero["zero_optimization"]["stage"],
        "data": {
            "path": source if source.startswith(HUB) else str(Path(source).resolve()),
            "sha256": hash_data(source),
            "rows": rows,
            "held_out": held_out,
            "left_out": excluded,
        },
        "model_sha256": of_checkpoint(model.model_name_or_path),
        "commit": commit(Path(__file__).parent),
        "versions": {**versions(PACKAGES), "cuda": torch.version.cuda},
        "step_samples": step_samples(arguments),
        "recipe_differences": recipe_differences(arguments, (model, data, training)),
        "arguments": arguments,
    }


def recorded_arguments(folder: Path) -> dict:
    """The arguments of the run that training in `folder` resumes: one with a checkpoint, or a finished one. Empty where
    there is none. Raises InputError where run.json is invalid."""
    path = folder / "run.json"
    if not os.path.isfile(path):
        return {}
    record = read_object(path, OTHER_OUTPUT)
    arguments = record.get("arguments")
    started = record.get("finished") or newest_checkpoint(folder)
    return arguments if started and isinstance(arguments, dict) else {}


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RunRecord:
    """run.json: the `facts` of the run, and an entry for each time it was started."""

    def __init__(self, folder: Path, is_main: bool):
        """Only the main process writes. Raises InputError where run.json is invalid."""
        self.path, self.is_main = folder / "run.json", is_main
        self.previous: dict = read_object(self.path, OTHER_OUTPUT) if self.path.exists() else {}
        for name, kind in {"arguments": dict, "data": dict, "starts": list}.items():
            if not isinstance(self.previous.get(name, kind()), kind):
                raise InputError(f"{self.path} has invalid {name}: remove it, or give another --output_dir")
        self.record: dict | None = None

    @property
    def finished(self) -> str | None:
        """The time at which the run finished and its model was saved, if it has."""
        return self.previous.get("finished")

    @property
    def excluded(self) -> list[int]:
        """The lines of the data that were excluded when the run started."""
        return self.previous.get("data", {}).get("left_out", [])

    def check_same_run(self, facts: dict) -> None:
        """Raises InputError where `facts` differ from those that the run was started with."""
        if not self.previous:
            raise InputError(
                f"{self.path.parent} has checkpoints, but no {self.path.name} that describes them: move them away, or "
                "give another --output_dir"
            )
        facts = json.loads(json.dumps(facts, default=str))
        old, new = {**self.previous.get("arguments", {})}, facts["arguments"]
        if Path(old.get("model_name_or_path", "")).is_dir():
            old["model_name_or_path"] = str(Path(old["model_name_or_path"]).resolve())
        pairs = [(label, self.previous.get(name), facts[name]) for name, label in FIXED_FACTS.items()]
        pairs += [(f"--{name}", old[name], new[name]) for name in filter(is_fixed, new) if name in old]
        changes = [(f"{label} {before}", after) for label, before, after in pairs if before != after]
        data = self.previous.get("data", {})
        if data.get("sha256") != facts["data"]["sha256"]:
            changes.append((f"different contents of {data.get('path')}", facts["data"]["path"]))
        if self.previous.get("model_sha256") not in (None, facts["model_sha256"]):
            changes.append(
                (f"different contents of the model {old.get('model_name_or_path')}", new["model_name_or_path"])
            )
        if changes:
            first, value = changes[0]
            model = new["model_name_or_path"]
            own = f"{self.path.parent}-{Path(model).name if old.get('model_name_or_path') != model else 2}"
            raise InputError(
                f"{self.path.parent} was started with {first}, now {value}: resume it with the same arguments, or give "
                f"another folder, such as --output_dir {own}"
            )

    def start(self, facts: dict, step: int) -> None:
        """Record that the run resumes from `step`, or starts if that is 0."""
        starts = self.previous.get("starts", []) if step else []
        one = {"started": now(), "ended": None, "how": None, "from_step": step, "to_step": None}
        one["seconds_to_first_step"] = None
        self.record = {
            **facts,
            "finished": None,
            "starts": [
                *starts,
                {**one, "host": socket.gethostname(), "command": shlex.join(redacted_command(sys.argv))},
            ],
        }
        self._write()

    def note_first_step(self, seconds: dict[str, float]) -> None:
        """Keep how long each part of this start took, until its first step had ended. `end` writes it."""
        if self.record:
            self.record["starts"][-1]["seconds_to_first_step"] = {part: round(s, 2) for part, s in seconds.items()}

    def end(self, step: int, how: str, finished: bool = False) -> None:
        """Record how this start ended, and whether the run is finished. Does nothing before `start`."""
        if not self.record:
            return
        self.record["starts"][-1] |= {"ended": now(), "how": how, "to_step": step}
        self.record["finished"] = now() if finished else None
        self._write()

    def _write(self) -> None:
        if self.is_main:
            with saving(self.path):
                write_file(self.path, json.dumps(self.record, indent=1, default=str) + "\n", report=False)
