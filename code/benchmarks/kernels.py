"""Profiles one optimizer step of a run that `sft.py --profile` starts: the GPU's time by kinds of kernels, the time in
which it only communicates, and the time in which it does nothing.

The first process profiles its fourth optimizer step, with `torch.profiler` and without the host's operations, which
would slow it down.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

STEP = 3
"""The optimizer step that is profiled, from 0: the ones before compile."""
FOLDER = "PROFILE_FOLDER"
"""The environment variable that says where the profile goes."""
HOOK = f'''\
"""Profiles a training process. Written by code/benchmarks/sft.py."""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import kernels
kernels.install()
'''
COMMUNICATION = "communication"
KINDS = {
    COMMUNICATION: r"nccl",
    "copies": r"^Mem(cpy|set)",
    "attention": r"flex_attention|flash",
    "matrix products": r"gemm|nvjet|cutlass|triton_tem|cublas",
    "compiled": r"^triton",
    "optimizer": r"multi_tensor|adam",
}
"""A kernel is of the first kind whose pattern its name contains."""
OTHER = "the rest"


def install() -> None:
    """Profile this process, if it is the first process of a training."""
    if os.environ.get("RANK") != "0" or "qwenvl.rank" not in sys.orig_argv:
        return
    from transformers import Trainer

    plain, passes, running = Trainer.training_step, 0, None

    def step(self, *arguments, **named):
        nonlocal passes, running
        each = self.args.gradient_accumulation_steps
        if passes in (STEP * each, (STEP + 1) * each):
            torch.cuda.synchronize()
            if running is None:
                running = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                running.__enter__()
            else:
                running.__exit__(None, None, None)
                events = [event for event in running.events() if event.device_type == torch.autograd.DeviceType.CUDA]
                spans = [(event.name, event.time_range.start, event.time_range.end) for event in events]
                (Path(os.environ[FOLDER]) / "kernels.json").write_text(json.dumps(spans))
        passes += 1
        return plain(self, *arguments, **named)

    Trainer.training_step = step


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time that at least one of `spans`, (start, end), covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def table(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds of a step by kind, from kernels (name, start, end in microseconds), largest first; then in which
    the GPU only communicates, and in which it does nothing."""
    kinds = Counter()
    for name, start, end in spans:
        kinds[kind_of(name)] += (end - start) / 1e3
    computing = covered((start, end) for name, start, end in spans if kind_of(name) != COMMUNICATION) / 1e3
    busy = covered((start, end) for _, start, end in spans) / 1e3
    whole = (max(end for *_, end in spans) - min(start for _, start, _ in spans)) / 1e3
    return dict(kinds.most_common()) | {"communicates only": busy - computing, "idle": whole - busy, "step": whole}


def show(folder: Path) -> None:
    """Print the table of a run that has ended."""
    found = table(json.loads((folder / "kernels.json").read_text()))
    print("  GPU ms of a step: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items()), flush=True)
