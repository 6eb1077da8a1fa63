"""Training through sft.sh on real videos, with random weights of the real shapes: speed, memory and time spent waiting
for data. Also compares the losses of different numbers of processes and ZeRO stages.

    python code/benchmarks/sft.py --size 7B --runs 2:zero3.json --gradient_checkpointing False
    python code/benchmarks/sft.py --size 3B --layers 2 --float32 --at-once \\
        --runs 1:none 1:zero2.json 2:zero2.json 2:zero3.json
    python code/benchmarks/sft.py --size 3B --steps 3 --runs 1:zero1.json 1:zero1.json

A run is PROCESSES:CONFIGURATION; `none` is Trainer without DeepSpeed. 2x2:CONFIGURATION rehearses two nodes with two
processes each on this machine: sft.sh is started twice, each with its own GPUs. All runs train on the same samples in
the same order, with --batch samples per optimizer step over all processes. A sample is that of the published baseline:
an H.264 video of 30 seconds with 91 visual tokens per clip, and an answer of about 117 tokens. Other flags are passed
to sft.sh.

The time per step is the median of the times between the log lines of steps, without the first two steps, which compile
and start the workers; tokens/s follow from it. Model FLOPs are those of training.py, and their share is relative to a
bf16 matrix product of 8192 x 8192 on each GPU. Memory is the maximum that PyTorch allocated on any GPU. The time spent
waiting for data is that of the whole run, including its start.

The second table has the seconds from the command to the end of the first step, as the first process sees them. The runs
of one call share a cache of compiled code, which is empty before the first: the same run twice shows what it saves.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import kernels
import torch
from arithmetic import matrix_rate
from inputs import Film, make_captions, make_checkpoint, make_rows
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.model.loading import load_config
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import QUESTIONS, answer_ids, load_processor, make_template
from qwen_vl_streaming.model.released import SIZES
from qwen_vl_streaming.timeline.timeline import make_schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS, get_variant
from sft_runs import Run, delete_weights, empty_cache, end, finish, log_of, show_startup, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import GRID, find_device, flops

UNTIMED = 2
"""Steps at the start that are not timed: they compile and start the data workers."""


def add_flags(parser: OneLineParser, steps: int, limit: int) -> None:
    """Flags that plans.py has too."""
    parser.add_argument("--layers", type=int, help="layers of language model and vision encoder (default: all)")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--video", default="364x196@8", help="frame size and frames per second (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=30, help="duration of each video (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=16, help="video files, used in turn (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=limit, help="seconds until a run is killed (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="folder for all files, reused by later calls (default: temporary)")


def sample_flops(checkpoint: Path, variant: str, clips: int, caption: str) -> float:
    """Model FLOPs of a sample with `caption` for the shape of `checkpoint`."""
    processor, config = load_processor(checkpoint), load_config(checkpoint)
    template = make_template(processor, QUESTIONS[0])
    counts = make_schedule("wait-3", get_variant(variant), clips).counts(len(answer_ids(processor, template, caption)))
    timeline = make_timeline(get_variant(variant), template.layout(GRID, 2.0), counts)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return flops(timeline, model)


class Measured:
    """What a run has written to its folder `output`."""

    def __init__(self, output: Path, per_sample: float):
        """`per_sample` are the model FLOPs of a sample."""
        self.events = EventAccumulator(str(output / "runs")).Reload()
        self.work, self.record = (json.loads((output / name).read_text()) for name in ("throughput.json", "run.json"))
        self.startup: dict[str, float] = self.record["starts"][-1]["seconds_to_first_step"]
        """Seconds of each part, see qwenvl/startup.py."""
        times = [point.wall_time for point in self.events.Scalars("train/loss")]
        each = [after - before for before, after in pairwise(times)]
        self.step = statistics.median(each[UNTIMED - 1 :] or [float("nan")])
        """Seconds."""
        given, processes = self.record["arguments"], self.record["world_size"]
        batch = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * processes
        self.tokens = self.work["tokens"] / self.work["samples"] * batch / self.step
        """Per second."""
        self.rate = per_sample * batch / self.step / processes
        """Model FLOP/s of a process."""
        self.gib = self.work["peak_memory_bytes"] / 2**30

    def values(self, name: str) -> list[float]:
        """A scalar of all steps."""
        return [point.value for point in self.events.Scalars(name)]


def compare(curves: dict[str, list[float]], what: str) -> None:
    """Print the values of all steps side by side, and the maximum difference of each run from the first."""
    print(f"\n{what}\n{'step':<24}" + "".join(f"{name:>22}" for name in curves))
    first = next(iter(curves.values()))
    for index in range(len(first)):
        print(f"{index + 1:<24}" + "".join(f"{values[index]:>22.6f}" for values in curves.values()))
    if len(curves) > 1:
        differences = (max(abs(a - b) for a, b in zip(first, values, strict=True)) for values in curves.values())
        print(
            f"{'max diff from first run':<24}" + "".join(f"{difference:>22.1e}" for difference in differences),
            flush=True,
        )


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument(
        "--runs", nargs="*", default=[], metavar="[NODESx]N:CONFIG", help="default: only create the inputs"
    )
    parser.add_argument("--variant", choices=VARIANTS, default="group")
    parser.add_argument("--batch", type=int, default=8, help="samples per optimizer step (default: %(default)s)")
    parser.add_argument("--per-device", type=int, default=1, help="samples per forward pass (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="train in float32 (default: bf16 on a GPU)")
    parser.add_argument("--at-once", action="store_true", help="start all runs at once, to compare losses only")
    parser.add_argument("--profile", action="store_true", help="profile the fourth step of each run (needs a GPU)")
    add_flags(parser, steps=8, limit=3600)
    arguments, further = parser.parse_known_args()
    film, runs = Film.parse(arguments.video, arguments.seconds), Run.parse_all(arguments.runs)
    for chosen in runs:
        if arguments.batch % (arguments.per_device * chosen.processes):
            raise InputError(
                f"--batch {arguments.batch} cannot be divided among {chosen.processes} processes with "
                f"{arguments.per_device} samples per forward pass: give a multiple"
            )
    if len({chosen.name for chosen in runs}) < len(runs):
        raise InputError(f"--runs {' '.join(arguments.runs)}: two have the same name: rename a configuration")
    arguments.device = find_device()
    if arguments.profile and (arguments.device == "cpu" or arguments.steps <= kernels.STEP + 1):
        raise InputError(f"--profile: needs a GPU and at least {kernels.STEP + 2} --steps")
    with tempfile.TemporaryDirectory() as name:
        arguments.folder = (arguments.folder or Path(name)).resolve()
        arguments.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = make_checkpoint(arguments.size, arguments.layers, arguments.folder)
        captions = make_captions(arguments.batch * arguments.steps, seed=1)
        data = make_rows(film, arguments.videos, captions, arguments.folder)
        if runs and not train(runs, arguments, further, checkpoint, data, captions[0]):
            sys.exit(1)


def train(runs: list[Run], arguments, further: list[str], checkpoint: Path, data: Path, caption: str) -> bool:
    """Train all runs and print their results. Returns False if a run failed."""
    peak, name = float("nan"), "CPU"
    if arguments.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = matrix_rate("cuda")
        torch.cuda.empty_cache()
    per_sample = sample_flops(checkpoint, arguments.variant, arguments.seconds, caption)
    kind = "float32" if arguments.float32 or name == "CPU" else "bf16"
    print(
        f"{name}, torch {torch.__version__}, {checkpoint.name}, {arguments.variant}, {kind}, {arguments.batch} samples "
        f"per step, {arguments.per_device} per forward pass, videos {arguments.video}, {' '.join(further)}\n"
        f"bf16 matrix product of 8192 x 8192: {peak / 1e12:.0f} TFLOP/s; sample: {per_sample / 1e12:.1f} TFLOP",
        flush=True,
    )
    print(
        f"{'processes-configuration':<24}{'s/step':>10}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>9}"
        f"{'data wait':>10}{'total s':>9}{'saved GiB':>10}",
        flush=True,
    )
    empty_cache(arguments.folder)
    losses, norms, startups = {}, {}, {}
    for group in [runs] if arguments.at_once else [[chosen] for chosen in runs]:
        until = time.monotonic() + arguments.limit
        with contextlib.ExitStack() as stack:
            started = [start(chosen, arguments, further, checkpoint, data) for chosen in group]
            for nodes, _ in started:
                for process in nodes:
                    stack.callback(end, process)
            for nodes, output in started:
                logs = [log_of(output, rank) for rank in range(len(nodes))]
                if all(
                    [finish(node, log, max(0, until - time.monotonic())) for node, log in zip(nodes, logs, strict=True)]
                ):
                    found = Measured(output, per_sample)
                    saved = sum(weights.stat().st_size for weights in output.glob("*.safetensors"))
                    losses[output.name], norms[output.name] = map(found.values, ("train/loss", "train/grad_norm"))
                    startups[output.name] = found.startup
                    print(
                        f"{output.name:<24}{found.step:>10.3f}{found.tokens:>10.0f}{found.rate / 1e12:>9.0f}"
                        f"{found.rate / peak:>9.1%}{found.gib:>9.1f}{found.work['seconds_waiting_for_data']:>10.2f}"
                        f"{found.work['seconds']:>9.1f}{saved / 2**30:>10.2f}",
                        flush=True,
                    )
                    if arguments.profile:
                        kernels.show(output)
                delete_weights(output)
    if losses:
        show_startup(startups)
        compare(losses, "loss")
        compare(norms, "gradient norm")
    return len(losses) == len(runs)


if __name__ == "__main__":
    run(main)
