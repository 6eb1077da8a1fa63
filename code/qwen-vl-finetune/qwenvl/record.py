"""What a run did, written beside what came out of it: run.json, throughput.json, and the curves as a picture.

Knows nothing of models, samples and how a run is resumed.
"""

import json
import logging
import platform
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.redact import redacted_command
from qwen_vl_streaming.common.versions import RUNNING, versions
from qwen_vl_streaming.model.checkpoint import of_checkpoint, of_file
from qwen_vl_streaming.timeline.positions import RULE
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from .checkpointing import add_up, read_json, saving, write_whole

matplotlib.use("Agg")
from matplotlib import pyplot

logger = logging.getLogger(__name__)

PACKAGES = (*RUNNING, "accelerate", "deepspeed", "peft")
SETTLED = {
    "variant": "variant",
    "position_rule": "position rule",
    "schedule": "schedule",
    "world_size": "processes",
    "zero_stage": "ZeRO stage",
}
"""Facts that a run keeps as long as it lasts, and what they are called."""
LASTING = (
    "model_name_or_path min_pixels_per_frame max_pixels_per_frame max_pixels_per_video budget "
    "model_max_length pack_tokens per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "train_sampling_strategy "
    "dataloader_drop_last seed data_seed eval_share eval_samples learning_rate mm_projector_lr vision_tower_lr "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon "
    "weight_decay max_grad_norm neftune_noise_alpha bf16"
)
"""Flags that it keeps, as --tune_* and --lora_*: those that settle the data, their order and what a step does."""


def commit(folder: Path) -> dict | None:
    """The git commit of the code and whether files differ from it; None without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return {"hash": git("rev-parse", "HEAD").strip(), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_data(path: Path, rows: int, held_out: int, left_out: list[int]) -> dict:
    """The data file, by its contents. Of its `rows`, `held_out` are not trained on, nor are the lines `left_out`."""
    return {
        "path": str(path.resolve()),
        "sha256": of_file(path),
        "rows": rows,
        "held_out": held_out,
        "left_out": left_out,
    }


def describe_run(model, data, training, rows: int, held_out: int, left_out: list[int]) -> dict:
    """What settles a run, from its three groups of arguments, and from its data as in `describe_data`."""
    zero = training.hf_deepspeed_config.config if training.deepspeed else None
    return {
        "variant": model.variant,
        "position_rule": RULE if model.rules.after_video else None,
        "schedule": model.schedule,
        "world_size": training.world_size,
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else platform.processor() or "cpu",
        "zero_stage": zero and zero["zero_optimization"]["stage"],
        "data": describe_data(Path(data.train_data), rows, held_out, left_out),
        "model_sha256": of_checkpoint(model.model_name_or_path),
        "commit": commit(Path(__file__).parent),
        "versions": {**versions(PACKAGES), "cuda": torch.version.cuda},
        "arguments": {**asdict(model), **asdict(data), **training.to_dict(), "deepspeed": zero},
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RunRecord:
    """run.json: what the run is (`facts`), and each time it was started."""

    def __init__(self, folder: Path, first: bool):
        """Only the `first` process writes. Raises InputError where run.json is broken."""
        self.path, self.first = folder / "run.json", first
        self.before: dict = read_json(self.path) if self.path.exists() else {}
        for name, kind in {"arguments": dict, "data": dict, "starts": list}.items():
            if not isinstance(self.before.get(name, kind()), kind):
                raise InputError(f"{self.path} is broken (its {name}): remove it, or give another --output_dir")
        self.record: dict | None = None

    @property
    def finished(self) -> str | None:
        """When the run ended with its model saved."""
        return self.before.get("finished")

    @property
    def left_out(self) -> list[int]:
        """The lines of the data that the run so far was begun without."""
        return self.before.get("data", {}).get("left_out", [])

    def refuse_another(self, facts: dict) -> None:
        """Raises InputError where the run so far cannot go on as the run that `facts` describe."""
        if not self.before:
            raise InputError(
                f"{self.path.parent} has checkpoints, but no {self.path.name} that says how they were made: "
                "move them away, or give another --output_dir"
            )
        facts = json.loads(json.dumps(facts, default=str))
        was, new = {**self.before.get("arguments", {})}, facts["arguments"]
        if Path(was.get("model_name_or_path", "")).is_dir():
            was["model_name_or_path"] = str(Path(was["model_name_or_path"]).resolve())
        pairs = [(words, self.before.get(name), facts[name]) for name, words in SETTLED.items()]
        flags = (name for name in new if name in LASTING.split() or name.startswith(("tune_", "lora_")))
        pairs += [(f"--{name}", was[name], new[name]) for name in flags if name in was]
        changes = [(f"{words} {before}", after) for words, before, after in pairs if before != after]
        data = self.before.get("data", {})
        if data.get("sha256") != facts["data"]["sha256"]:
            changes.append((f"other contents of {data.get('path')}", facts["data"]["path"]))
        if self.before.get("model_sha256") not in (None, facts["model_sha256"]):
            changes.append((f"other contents of the model {was.get('model_name_or_path')}", new["model_name_or_path"]))
        if changes:
            first, value = changes[0]
            model = new["model_name_or_path"]
            own = f"{self.path.parent}-{Path(model).name if was.get('model_name_or_path') != model else 2}"
            raise InputError(
                f"{self.path.parent} was begun with {first}, now {value}: go on as it was begun, or give it another "
                f"folder with --output_dir, such as --output_dir {own}"
            )

    def start(self, facts: dict, step: int) -> None:
        """Write down that the run goes on from `step`, or begins, where that is 0."""
        starts = self.before.get("starts", []) if step else []
        one = {"started": now(), "ended": None, "how": None, "from_step": step, "to_step": None}
        self.record = {
            **facts,
            "finished": None,
            "starts": [
                *starts,
                {**one, "host": socket.gethostname(), "command": shlex.join(redacted_command(sys.argv))},
            ],
        }
        self._write()

    def end(self, step: int, how: str, finished: bool = False) -> None:
        """Write down how this start ended, where it got as far as `start`, and whether the run is finished with it."""
        if not self.record:
            return
        self.record["starts"][-1] |= {"ended": now(), "how": how, "to_step": step}
        self.record["finished"] = now() if finished else None
        self._write()

    def _write(self) -> None:
        if self.first:
            with saving(self.path):
                write_whole(self.path, json.dumps(self.record, indent=1, default=str) + "\n")


@dataclass
class Work:
    """What was done, by all processes, and the seconds it took: those of the slowest process."""

    steps: float = 0
    samples: float = 0
    tokens: float = 0
    seconds: float = 0
    seconds_waiting_for_data: float = 0
    peak_memory_bytes: float = 0


@dataclass(eq=False)
class Throughput(TrainerCallback):
    """Measures optimizer steps, from asking for their data to their end; saving and evaluation do not count."""

    device: torch.device
    before: Work = field(default_factory=Work)
    """What was done before the run was resumed."""
    here: Work = field(default_factory=Work)
    began: float | None = None

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the seconds spent waiting for them are counted, as part of a step that begins here."""
        self.began = time.perf_counter()
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.here.seconds_waiting_for_data += time.perf_counter() - asked
            yield batch

    def count(self, samples: int, tokens: int) -> None:
        """What is trained on in a batch."""
        self.here.samples += samples
        self.here.tokens += tokens

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.here.seconds += time.perf_counter() - self.began
        self.here.steps += 1

    def work(self) -> Work:
        """All work so far. Called by all processes at once."""
        here, before = self.here, self.before
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        samples, tokens = add_up([float(here.samples), float(here.tokens)], self.device)
        slowest = [here.seconds, here.seconds_waiting_for_data, float(memory)]
        seconds, waiting, memory = add_up(slowest, self.device, distributed.ReduceOp.MAX)
        return Work(
            before.steps + here.steps,
            before.samples + samples,
            before.tokens + tokens,
            before.seconds + seconds,
            before.seconds_waiting_for_data + waiting,
            max(before.peak_memory_bytes, memory),
        )


def write_throughput(work: Work, path: Path) -> None:
    """throughput.json, and the same as a table in the log."""
    seconds = work.seconds or float("nan")
    table = {
        "tokens_per_second": work.tokens / seconds,
        "samples_per_second": work.samples / seconds,
        "seconds_per_step": work.seconds / (work.steps or float("nan")),
        **asdict(work),
    }
    write_whole(path, json.dumps(table, indent=1) + "\n")
    for name, value in table.items():
        if name == "peak_memory_bytes":
            name, value = "peak_memory_gib", value / 2**30
        logger.info("  %-26s %12.2f", name.replace("_", " "), value)


def one_tensorboard(trainer: Trainer, step: int) -> None:
    """Have a run that goes on from `step` write one TensorBoard curve, without the steps that are run again."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and trainer.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            callback.tb_writer = SummaryWriter(str(Path(trainer.args.output_dir) / "runs"), purge_step=step + 1)


def draw_curves(history: Iterable[dict], path: Path, title: str) -> bool:
    """Loss, on held-out samples too where there are any, and gradient norm over optimizer steps, as a picture. False
    where no loss was logged to draw."""
    history = list(history)
    if not any("loss" in entry for entry in history):
        return False
    figure, (top, bottom) = pyplot.subplots(2, figsize=(7, 6), sharex=True, layout="constrained")
    for axes, name, label, style in (
        (top, "loss", "trained on", "-"),
        (top, "eval_loss", "held out", "o-"),
        (bottom, "grad_norm", None, "-"),
    ):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=label)
    top.set(ylabel="loss (nats per answer token)", title=title, ylim=(0, None))
    bottom.set(xlabel="optimizer step", ylabel="gradient norm before clipping", ylim=(0, None))
    top.legend()
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)
    pyplot.close(figure)
    return True
