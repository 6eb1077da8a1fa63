"""Runs of sft.sh for sft.py and plans.py: their flags, how they start and end, and what they measured.

The time per step is the median of the times between the log lines of steps, without the first two steps, which compile
and start the workers; tokens/s follow from it. Model FLOPs are those of training.py. Memory is the maximum that PyTorch
allocated on any GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from inputs import SECONDS, make_captions, make_rows
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, load_config
from qwen_vl_streaming.model.prompts import QUESTIONS, answer_ids, load_processor, make_template
from qwen_vl_streaming.timeline.timeline import make_schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import flops
from workload import GRID

FINETUNE = Path(__file__).resolve().parents[2] / "code/qwen-vl-finetune"
SFT = ("bash", str(FINETUNE / "scripts/sft.sh"))
UNTIMED = 2
"""Steps at the start that are not timed: they compile and start the data workers."""
FLAGS = {
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "min_pixels_per_frame": 50_176,
    "max_pixels_per_frame": 78_400,
    "max_pixels_per_video": 2 * SECONDS * 78_400,
}
"""Of all runs. With these pixels, 364 x 196 is kept."""


def add_flags(parser: argparse.ArgumentParser, steps: int, limit: float) -> None:
    """Add the flags of both programs, with the defaults of one of them."""
    parser.add_argument("--variant", choices=VARIANTS, default="group")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=16, help="video files, used in turn (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=limit, help="seconds until a run is killed (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="folder for all files, reused by later calls (default: temporary)")


@contextlib.contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """`folder`, which is created if needed, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


@dataclass(frozen=True)
class Data:
    """The rows that all runs of a call train on."""

    rows: Path
    variant: str
    caption: str
    """One of the captions, which all have about the same number of tokens."""

    @classmethod
    def make(cls, samples: int, videos: int, variant: str, folder: Path) -> "Data":
        captions = make_captions(samples, seed=1)
        return cls(make_rows(videos, captions, folder), variant, captions[0])

    def sample_flops(self, checkpoint: Path) -> float:
        """Model FLOPs of a sample for the shape of `checkpoint`."""
        variant, template = VARIANTS[self.variant], make_template(processor := load_processor(checkpoint), QUESTIONS[0])
        answer = len(answer_ids(processor, template, self.caption))
        counts = make_schedule("wait-3", variant, SECONDS).counts(answer)
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(load_config(checkpoint))
        return flops(make_timeline(variant, template.layout(GRID, 2.0), counts), model)


def start(
    output: Path,
    checkpoint: Path,
    data: Data,
    processes: int,
    flags: Mapping[str, object],
    further: Sequence[str],
    environment: Mapping[str, str],
    command: Sequence[str] = SFT,
) -> subprocess.Popen:
    """Start a run in the folder `output`; its log is beside it."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "QWEN2_5_VL_VARIANT": data.variant,
        "QWEN2_5_VL_MODEL_PATH": str(checkpoint),
        "QWEN2_5_VL_TRAIN_DATA": str(data.rows),
        "NPROC_PER_NODE": str(processes),
        **environment,
    }
    flags = {"output_dir": output, **FLAGS, **flags}
    options = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with log_of(output).open("w") as log:
        return subprocess.Popen([*command, *options, *further], env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def print_log_end(title: str, output: Path) -> None:
    """Print the last lines of the log of a run that failed."""
    lines = [line for line in log_of(output).read_text(errors="replace").splitlines() if line.strip()]
    print(f"{title}; its log ends:", *lines[-25:], sep="\n    ", flush=True)


def end(process: subprocess.Popen) -> None:
    """Kill a run and its workers unless it has ended."""
    if process.poll() is None:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                each.kill()
        process.wait()


@dataclass(frozen=True)
class Measured:
    """What a run measured."""

    step: float
    """Seconds of an optimizer step."""
    tokens: float
    """Tokens per second of all GPUs."""
    flops: float
    """Model FLOP/s of each GPU."""
    gib: float
    first_step: float
    """The time of day when the first step ended, in seconds."""
    saved_gib: float
    """Size of the saved weights, which are deleted: at the real size they would soon fill the disk."""
    losses: list[float]
    norms: list[float]
    """Gradient norms."""
    throughput: dict
    """throughput.json."""
    settings: dict
    """The entries of run.json, and those of its `arguments`."""

    @classmethod
    def read(cls, output: Path, sample_flops: float) -> "Measured":
        events = EventAccumulator(str(output / "runs")).Reload()
        losses, norms = events.Scalars("train/loss"), events.Scalars("train/grad_norm")
        work, record = (json.loads((output / name).read_text()) for name in ("throughput.json", "run.json"))
        settings = {**record, **record["arguments"]}
        step = statistics.median(
            [after.wall_time - before.wall_time for before, after in pairwise(losses)][UNTIMED - 1 :] or [float("nan")]
        )
        samples = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]  # of each process
        processes, saved = settings["world_size"], 0
        for weights in output.glob("*.safetensors"):
            saved += weights.stat().st_size
            weights.unlink()
        return cls(
            step=step,
            tokens=work["tokens"] / work["samples"] * samples * processes / step,
            flops=sample_flops * samples / step,
            gib=work["peak_memory_bytes"] / 2**30,
            first_step=losses[0].wall_time,
            saved_gib=saved / 2**30,
            losses=[point.value for point in losses],
            norms=[point.value for point in norms],
            throughput=work,
            settings=settings,
        )
