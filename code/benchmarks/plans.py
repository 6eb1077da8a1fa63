"""What the planner of sft.sh predicts against what is measured: peak memory and speed, of the bare command and of flags
found by hand.

    python code/benchmarks/plans.py --settings 3B:1 3B:4 3B:1:40 "7B:4 --deepspeed zero2.json" --steps 6
    python code/benchmarks/plans.py --settings tiny:1 --steps 3

A setting is SIZE:GPUS[:CAP] and further flags of sft.sh; without any it is the bare command. CAP is the memory of a GPU
in GiB, set with torch.cuda.set_per_process_memory_fraction, and also what the planner sees as free. All settings share
one checkpoint of each size and one set of videos, those of sft.py. Settings run side by side where there are GPUs for
them, and each prints its row when it ends.

sft_runs.py defines what is measured. The share is relative to a bf16 matrix product on each GPU.
"""

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from inputs import make_checkpoint
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from sft_runs import Data, Measured, add_flags, end, log_of, print_log_end, start, working_folder
from workload import SIZES, device_name, find_device, matrix_rate

HOOK = '''\
"""Caps the memory of training processes, and shows the cap to the planner. Written by code/benchmarks/plans.py."""
import os, sys
training, planning = "LOCAL_RANK" in os.environ and "qwenvl.rank" in sys.orig_argv, "qwenvl.planner" in sys.orig_argv
if training or planning:
    import torch
    cap = int(float(os.environ["PLANNING_CAP_GIB"]) * 2**30)
    if planning:
        info = torch.cuda.mem_get_info
        torch.cuda.mem_get_info = lambda device=None: (min(info(device)[0], cap), info(device)[1])
    else:
        index = int(os.environ["LOCAL_RANK"])
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), index)
'''
PREDICTED = re.compile(r"predicted: ([\d.,]+) GiB a GPU .*?, ([\d,]+) tokens/s")
FLAGS = ("zero_stage", "per_device_train_batch_size", "pack_tokens", "gradient_checkpointing", "checkpoint_layers")
HEADER = (
    f"{'setting':<42}{'GiB: predicted':>15}{'measured':>10}{'ratio':>7}{'tokens/s: predicted':>21}{'measured':>10}"
    f"{'ratio':>7}{'s/step':>8}{'share':>7}{'start s':>9}  settings"
)


@dataclass(frozen=True)
class Setting:
    """One command."""

    size: str
    gpus: int
    cap: float | None
    """GiB of a GPU."""
    flags: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Parse a text such as `3B:4:40 --lora_enable True`. Raises InputError if it is malformed."""
        first, *flags = shlex.split(text) or [""]
        found = re.fullmatch(rf"({'|'.join(SIZES)}):(\d+)(?::([\d.]+))?", first)
        if not found or not int(found[2]):
            raise InputError(f"--settings {text!r}: give SIZE:GPUS[:CAP] and flags, such as '3B:4:40'")
        return cls(found[1], int(found[2]), float(found[3]) if found[3] else None, tuple(flags), text)

    @property
    def name(self) -> str:
        """Name of the output folder."""
        return re.sub(r"[^\w.-]+", "-", self.text)[:120]


@dataclass
class Job:
    """A setting that runs."""

    setting: Setting
    process: subprocess.Popen
    output: Path
    visible: list[int]
    """Indices of its GPUs."""
    began: float
    """The time of day, in seconds."""


def start_job(setting: Setting, arguments, checkpoint: Path, data: Data, visible: list[int]) -> Job:
    """Start sft.sh on the GPUs of the indices `visible`."""
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, visible))} if visible else {}
    if visible and setting.cap:
        hook = arguments.folder / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(HOOK)
        environment["PLANNING_CAP_GIB"] = str(setting.cap)
        environment["PYTHONPATH"] = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    output, flags = arguments.folder / "runs" / setting.name, {"max_steps": arguments.steps}
    process = start(output, checkpoint, data, setting.gpus, flags, setting.flags, environment)
    return Job(setting, process, output, visible, time.time())


def report(job: Job, sample_flops: float, peak: float) -> bool:
    """Print the row of a job that has ended, or the end of its log. Returns whether it succeeded."""
    found = PREDICTED.search(log_of(job.output).read_text(errors="replace"))
    memory, rate = (float(text.replace(",", "")) for text in found.groups()) if found else (float("nan"),) * 2
    if job.process.returncode != 0:
        title = f"{job.setting.text:<42}exit status {job.process.returncode}, predicted {memory:.1f} GiB"
        print_log_end(title, job.output)
        return False
    measured = Measured.read(job.output, sample_flops)
    settings = " ".join(str(measured.settings[name]) for name in FLAGS if measured.settings.get(name) is not None)
    compiled = " compiled" if measured.settings["compile_layers"] else ""
    print(
        f"{job.setting.text if len(job.setting.text) < 42 else job.setting.text[:38] + '...':<42}{memory:>15.1f}"
        f"{measured.gib:>10.1f}{memory / measured.gib:>7.2f}{rate:>21,.0f}{measured.tokens:>10,.0f}"
        f"{rate / measured.tokens:>7.2f}{measured.step:>8.3f}{measured.flops / peak:>7.1%}"
        f"{measured.first_step - job.began:>9.1f}  {settings}{compiled}",
        flush=True,
    )
    return True


def run_all(settings: list[Setting], arguments, checkpoints: dict[str, Path], data: Data, peak: float) -> bool:
    """Run all settings, as many at once as there are GPUs for, on a CPU one by one. Returns whether all succeeded."""
    cpu = arguments.device == "cpu"
    free, waiting, running, succeeded = list(range(0 if cpu else torch.cuda.device_count())), list(settings), [], True
    work = {size: data.sample_flops(path) for size, path in checkpoints.items()}
    with contextlib.ExitStack() as stack:
        while waiting or running:
            for setting in list(waiting):
                if setting.gpus <= len(free) or (cpu and not running):
                    visible = [] if cpu else [free.pop(0) for _ in range(setting.gpus)]
                    waiting.remove(setting)
                    running.append(start_job(setting, arguments, checkpoints[setting.size], data, visible))
                    stack.callback(end, running[-1].process)
            time.sleep(0.2)
            for job in list(running):
                if job.process.poll() is None and time.time() - job.began > arguments.limit:
                    end(job.process)
                if job.process.poll() is not None:
                    running.remove(job)
                    free += job.visible
                    succeeded &= report(job, work[job.setting.size], peak)
    return succeeded


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--settings", nargs="+", required=True, metavar="SIZE:GPUS[:CAP]")
    add_flags(parser, steps=6, limit=600)
    arguments = parser.parse_args()
    settings = [Setting.parse(text) for text in arguments.settings]
    if len({setting.name for setting in settings}) < len(settings):
        raise InputError("--settings: give each setting once")
    sizes = dict.fromkeys(setting.size for setting in settings)
    for size in sizes:
        arguments.device = find_device(size)
    most = torch.cuda.device_count() if arguments.device == "cuda" else 1
    for setting in settings:
        if setting.gpus > most:
            raise InputError(f"--settings {setting.text}: there are {most} GPUs here")
    peak = matrix_rate(arguments.device)
    with working_folder(arguments.folder) as arguments.folder:
        checkpoints = {size: make_checkpoint(size, None, arguments.folder) for size in sizes}
        torch.cuda.empty_cache()
        data = Data.make(16 * most * arguments.steps, arguments.videos, arguments.variant, arguments.folder)
        print(
            f"{device_name(arguments.device)}, torch {torch.__version__}, {arguments.variant}\n"
            f"bf16 matrix product: {peak / 1e12:.3g} TFLOP/s\n{HEADER}",
            flush=True,
        )
        if not run_all(settings, arguments, checkpoints, data, peak):
            sys.exit(1)


if __name__ == "__main__":
    run(main)
