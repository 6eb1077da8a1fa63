"""What the planner of sft.sh predicts against what is measured: peak memory and speed, of the bare command and of flags
found by hand.

    python code/benchmarks/plans.py --settings 3B:1 3B:4 3B:1:40 "7B:4 --deepspeed zero2.json" --steps 6
    python code/benchmarks/plans.py --list caps --one-by-one
    python code/benchmarks/plans.py --settings tiny:1 --steps 3

A setting is SIZE:GPUS[:CAP] and further flags of sft.sh; without any it is the bare command. CAP is the memory of a GPU
in GiB, set with torch.cuda.set_per_process_memory_fraction, and also what the planner sees as free. All settings share
one checkpoint of each size and one set of videos, those of sft.py. Settings run side by side where there are GPUs for
them, and each prints its row when it ends.

Memory is the maximum that PyTorch allocated on any GPU. Steps are timed as in sft.py. The share is that of model FLOP/s
in a bf16 matrix product of 8192 x 8192 on each GPU; with LoRA too, they are counted as for full fine-tuning. The
start lasts to the end of the first step, with a cache of compiled code that all settings of a call share, and that is
empty before the first.
"""

import argparse
import contextlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from arithmetic import matrix_rate
from inputs import Film, make_captions, make_checkpoint, make_rows
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.model.released import SIZES
from sft import Measured, add_flags, sample_flops
from sft_runs import SFT, add_hook, delete_weights, empty_cache, end, launch
from training import find_device

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
HAND = "--compile_layers True --gradient_checkpointing False --gradient_accumulation_steps"
HAND_2 = f"--deepspeed zero2.json --per_device_train_batch_size 2 --pack_tokens 6016 {HAND} 8"
HAND_4 = f"--deepspeed zero2.json --per_device_train_batch_size 4 --pack_tokens 11904 {HAND} 4"
LISTS = {
    "hand": [
        *(f"3B:{gpus} {flags}".strip() for gpus in (1, 2, 4) for flags in ("", HAND_2, HAND_4)),
        *(f"7B:{gpus} {flags}".strip() for gpus in (2, 4) for flags in ("", HAND_2, HAND_4)),
        "7B:1",
    ],
    "caps": [
        *("3B:1:80", "3B:2:80", "3B:4:80", "3B:2:48", "3B:4:48", "3B:4:40", "3B:4:24", "7B:4:80"),
        *("3B:1:24 --lora_enable True", "3B:1:16 --lora_enable True", "7B:1:24 --lora_enable True"),
        *("7B:1:48 --lora_enable True", "7B:2:40 --lora_enable True"),
    ],
}
"""Named lists of settings: against flags found by hand, and with caps."""
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
        found = re.fullmatch(rf"({'|'.join(['tiny', *SIZES])}):(\d+)(?::([\d.]+))?", first)
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
    began: float


def start(setting: Setting, arguments, checkpoint: Path, data: Path, visible: list[int]) -> Job:
    """Start sft.sh on the GPUs of the indices `visible`."""
    environment = {
        "QWEN2_5_VL_MODEL_PATH": str(checkpoint),
        "QWEN2_5_VL_TRAIN_DATA": str(data),
        "NPROC_PER_NODE": str(setting.gpus),
    }
    if arguments.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))
        if setting.cap:
            add_hook(environment, arguments.folder, HOOK)
            environment["PLANNING_CAP_GIB"] = str(setting.cap)
    output = arguments.folder / "runs" / setting.name
    process = launch(SFT, {}, setting.flags, environment, output, arguments)
    return Job(setting, process, output, visible, time.monotonic())


def report(job: Job, per_sample: float, peak: float) -> bool:
    """Print the row of a job that has ended, or the end of its log. Returns whether it succeeded."""
    log = job.output.with_suffix(".log")
    said = log.read_text(errors="replace")
    found = PREDICTED.search(said)
    memory, rate = (float(text.replace(",", "")) for text in found.groups()) if found else (float("nan"),) * 2
    if job.process.returncode != 0:
        lines = [line for line in said.splitlines() if line.strip()]
        print(
            f"{job.setting.text:<42}exit status {job.process.returncode}, predicted {memory:.1f} GiB; its log ends:",
            *lines[-12:],
            sep="\n    ",
            flush=True,
        )
        return False
    measured = Measured(job.output, per_sample)
    start = sum(measured.startup.values())
    shown = {**measured.record, **measured.record["arguments"]}
    settings = " ".join(str(shown[name]) for name in FLAGS if shown.get(name) is not None)
    compiled = " compiled" if shown["compile_layers"] else ""
    print(
        f"{job.setting.text if len(job.setting.text) < 42 else job.setting.text[:38] + '...':<42}{memory:>15.1f}"
        f"{measured.gib:>10.1f}{memory / measured.gib:>7.2f}{rate:>21,.0f}{measured.tokens:>10,.0f}"
        f"{rate / measured.tokens:>7.2f}{measured.step:>8.3f}{measured.rate / peak:>7.1%}{start:>9.1f}  "
        f"{settings}{compiled}",
        flush=True,
    )
    delete_weights(job.output)
    return True


def run_all(settings: list[Setting], arguments, checkpoints: dict, data: Path, peak: float, caption: str) -> bool:
    """Run all settings, as many at once as there are GPUs for. Returns whether all succeeded."""
    cpu = arguments.device == "cpu"
    free, waiting, running, succeeded = list(range(0 if cpu else torch.cuda.device_count())), list(settings), [], True
    work = {
        size: sample_flops(path, arguments.variant, arguments.seconds, caption) for size, path in checkpoints.items()
    }
    with contextlib.ExitStack() as stack:
        while waiting or running:
            for setting in list(waiting):
                if running and (cpu or arguments.one_by_one):
                    break
                if cpu or setting.gpus <= len(free):
                    visible = [] if cpu else [free.pop(0) for _ in range(setting.gpus)]
                    waiting.remove(setting)
                    running.append(start(setting, arguments, checkpoints[setting.size], data, visible))
                    stack.callback(end, running[-1].process)
            time.sleep(0.2)
            for job in list(running):
                if job.process.poll() is None and time.monotonic() - job.began > arguments.limit:
                    end(job.process)
                if job.process.poll() is not None:
                    running.remove(job)
                    free += job.visible
                    succeeded &= report(job, work[job.setting.size], peak)
    return succeeded


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=[], metavar="SIZE:GPUS[:CAP]")
    parser.add_argument("--list", choices=LISTS, help="add a list of settings, those that the GPUs suffice for")
    parser.add_argument(
        "--one-by-one", action="store_true", help="one setting at a time, so that none disturbs another"
    )
    parser.add_argument("--variant", default="group")
    add_flags(parser, steps=6, limit=600)
    arguments = parser.parse_args()
    arguments.device = find_device()
    most = torch.cuda.device_count() if arguments.device == "cuda" else 1
    settings = [Setting.parse(text) for text in arguments.settings]
    for setting in settings:
        if setting.gpus > most:
            raise InputError(f"--settings {setting.text}: there are {most} GPUs here")
    if arguments.list:
        settings += [found for text in LISTS[arguments.list] if (found := Setting.parse(text)).gpus <= most]
    if len({setting.name for setting in settings}) < len(settings):
        raise InputError("--settings: give each setting once")
    film = Film.parse(arguments.video, arguments.seconds)
    peak = float("nan")
    if arguments.device == "cuda":
        peak = matrix_rate("cuda")
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as name:
        arguments.folder = (arguments.folder or Path(name)).resolve()
        arguments.folder.mkdir(parents=True, exist_ok=True)
        sizes = dict.fromkeys(setting.size for setting in settings)
        for size in sizes:
            find_device(size)  # raises InputError for a real size on a CPU
        checkpoints = {size: make_checkpoint(size, arguments.layers, arguments.folder) for size in sizes}
        torch.cuda.empty_cache()
        captions = make_captions(16 * most * arguments.steps, seed=1)
        data = make_rows(film, arguments.videos, captions, arguments.folder)
        card = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
        print(
            f"{card}, torch {torch.__version__}, {arguments.variant}, "
            f"videos {arguments.video} of {arguments.seconds} s\n"
            f"bf16 matrix product of 8192 x 8192: {peak / 1e12:.0f} TFLOP/s\n{HEADER}",
            flush=True,
        )
        empty_cache(arguments.folder)
        if not run_all(settings, arguments, checkpoints, data, peak, captions[0]):
            sys.exit(1)


if __name__ == "__main__":
    run(main)
