"""Training through sft.sh on real videos, with random weights of the real shapes: speed, memory and time spent waiting
for data. Also compares the losses of different numbers of processes and ZeRO stages.

    python code/benchmarks/sft.py --size 7B --runs 2:zero3.json --gradient_checkpointing False
    python code/benchmarks/sft.py --size 3B --layers 2 --float32 --at-once \\
        --runs 1:none 1:zero2.json 2:zero2.json 2:zero3.json

A run is PROCESSES:CONFIGURATION; `none` is Trainer without DeepSpeed. All runs train on the same samples in the same
order, with --batch samples per optimizer step over all processes. A sample is that of the published baseline: an H.264
video of 30 seconds with 91 visual tokens per clip, and an answer of about 117 tokens. Other flags are passed to sft.sh.

sft_runs.py defines what is measured. The share is relative to a bf16 matrix product on each GPU. The time spent waiting
for data is that of the whole run, including its start.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from inputs import make_checkpoint
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from sft_runs import FINETUNE, SFT, Data, Measured, add_flags, end, print_log_end, start, working_folder
from workload import SIZES, device_name, find_device, matrix_rate


@dataclass(frozen=True)
class Run:
    """One training run."""

    processes: int
    configuration: str
    """A DeepSpeed configuration as for sft.sh, or `none`."""

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Parse a text such as 2:zero3.json. Raises InputError if it is malformed."""
        processes, _, configuration = text.partition(":")
        if not processes.isdigit() or int(processes) < 1 or not configuration:
            raise InputError(f"--runs {text}: give PROCESSES:CONFIGURATION, such as 2:zero3.json or 1:none")
        return cls(int(processes), configuration)

    @property
    def name(self) -> str:
        """Name of the output folder."""
        return f"{self.processes}-{Path(self.configuration).stem}"

    def start(self, arguments, further: list[str], checkpoint: Path, data: Data) -> tuple[subprocess.Popen, Path]:
        """Start the run. Returns its process and its output folder."""
        output, cpu = arguments.folder / "runs" / self.name, arguments.device == "cpu"
        flags = {
            "max_steps": arguments.steps,
            "gradient_accumulation_steps": arguments.batch // (arguments.per_device * self.processes),
            "per_device_train_batch_size": arguments.per_device,
        }
        if cpu or arguments.float32:
            flags["bf16"] = False
        environment, command = {"DEEPSPEED_CONFIG": self.configuration}, SFT
        if self.configuration == "none":
            environment["PYTHONPATH"] = os.pathsep.join([str(FINETUNE), os.environ.get("PYTHONPATH", "")])
            flags |= {"model_name_or_path": checkpoint, "train_data": data.rows} | ({"use_cpu": True} if cpu else {})
            processes = ("--standalone", "--nproc_per_node", str(self.processes))
            command = (sys.executable, "-m", "qwen_vl_streaming.launch", *processes, "-m", "qwenvl.rank")
        return start(output, checkpoint, data, self.processes, flags, further, environment, command), output


def finish(process: subprocess.Popen, output: Path, limit: float) -> bool:
    """Wait for a run. If it fails or exceeds `limit` seconds, kill it, print the end of its log and return False."""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = f"none (killed after {limit:.0f} s)"
        end(process)
    if status != 0:
        print_log_end(f"{output.name}: exit status {status}", output)
    return status == 0


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
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=int, help="layers of language model and vision encoder (default: all)")
    parser.add_argument("--runs", nargs="+", required=True, metavar="N:CONFIG")
    parser.add_argument("--batch", type=int, default=8, help="samples per optimizer step (default: %(default)s)")
    parser.add_argument("--per-device", type=int, default=1, help="samples per forward pass (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="train in float32 (default: bf16 on a GPU)")
    parser.add_argument("--at-once", action="store_true", help="start all runs at once, to compare losses only")
    add_flags(parser, steps=8, limit=3600)
    arguments, further = parser.parse_known_args()
    runs = [Run.parse(text) for text in arguments.runs]
    for chosen in runs:
        if arguments.batch % (arguments.per_device * chosen.processes):
            raise InputError(
                f"--batch {arguments.batch} cannot be divided among {chosen.processes} processes with "
                f"{arguments.per_device} samples per forward pass: give a multiple"
            )
    if len({chosen.name for chosen in runs}) < len(runs):
        raise InputError(f"--runs {' '.join(arguments.runs)}: give each run once")
    arguments.device = find_device(arguments.size)
    with working_folder(arguments.folder) as arguments.folder:
        checkpoint = make_checkpoint(arguments.size, arguments.layers, arguments.folder)
        data = Data.make(arguments.batch * arguments.steps, arguments.videos, arguments.variant, arguments.folder)
        if not train(runs, arguments, further, checkpoint, data):
            sys.exit(1)


def train(runs: list[Run], arguments, further: list[str], checkpoint: Path, data: Data) -> bool:
    """Train all runs and print their results. Returns False if a run failed."""
    peak = matrix_rate(arguments.device)
    torch.cuda.empty_cache()
    per_sample = data.sample_flops(checkpoint)
    kind = "float32" if arguments.float32 or arguments.device == "cpu" else "bf16"
    print(
        f"{device_name(arguments.device)}, torch {torch.__version__}, {checkpoint.name}, {arguments.variant}, {kind}, "
        f"{arguments.batch} samples per step, {arguments.per_device} per forward pass, {' '.join(further)}\n"
        f"bf16 matrix product: {peak / 1e12:.3g} TFLOP/s; sample: {per_sample / 1e12:.3g} TFLOP",
        flush=True,
    )
    print(
        f"{'processes-configuration':<24}{'s/step':>10}{'tokens/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>9}"
        f"{'data wait':>10}{'total s':>9}{'saved GiB':>10}",
        flush=True,
    )
    losses, norms = {}, {}
    for group in [runs] if arguments.at_once else [[chosen] for chosen in runs]:
        until = time.monotonic() + arguments.limit
        with contextlib.ExitStack() as stack:
            started = [chosen.start(arguments, further, checkpoint, data) for chosen in group]
            for process, _ in started:
                stack.callback(end, process)
            for process, output in started:
                if finish(process, output, max(0, until - time.monotonic())):
                    found = Measured.read(output, per_sample)
                    losses[output.name], norms[output.name] = found.losses, found.norms
                    print(
                        f"{output.name:<24}{found.step:>10.3f}{found.tokens:>10.0f}{found.flops / 1e12:>9.3g}"
                        f"{found.flops / peak:>9.1%}{found.gib:>9.1f}"
                        f"{found.throughput['seconds_waiting_for_data']:>10.2f}{found.throughput['seconds']:>9.1f}"
                        f"{found.saved_gib:>10.2f}",
                        flush=True,
                    )
    if losses:
        compare(losses, "loss")
        compare(norms, "gradient norm")
    return len(losses) == len(runs)


if __name__ == "__main__":
    run(main)
