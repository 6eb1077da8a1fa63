"""Throughput of a run: samples, tokens and seconds of its optimizer steps, written to throughput.json."""

import json
import logging
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from qwen_vl_streaming.common.files import write_file
from torch import distributed
from transformers import TrainerCallback

from .collectives import all_reduce

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """Totals over all processes. Seconds and bytes are those of the slowest and of the largest process."""

    steps: float = 0
    samples: float = 0
    tokens: float = 0
    seconds: float = 0
    seconds_waiting_for_data: float = 0
    peak_memory_bytes: float = 0


@dataclass(eq=False)
class Throughput(TrainerCallback):
    """Measures optimizer steps, from requesting their data to their end, without saving and evaluation."""

    device: torch.device
    previous: Work = field(default_factory=Work)
    """Totals before the run was resumed."""
    current: Work = field(default_factory=Work)
    """Totals of this process since."""
    step_start: float | None = None

    def timed(self, batches: Iterator) -> Iterator:
        """Yield the same batches and count the seconds spent waiting for them. A step starts here."""
        self.step_start = time.perf_counter()
        while True:
            requested = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.current.seconds_waiting_for_data += time.perf_counter() - requested
            yield batch

    def count(self, samples: int, tokens: int) -> None:
        """Count the samples and tokens of a batch that are trained on."""
        self.current.samples += samples
        self.current.tokens += tokens

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.current.seconds += time.perf_counter() - self.step_start
        self.current.steps += 1

    def work(self) -> Work:
        """Totals so far. Called by all processes at once."""
        current, previous = self.current, self.previous
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        samples, tokens = all_reduce([float(current.samples), float(current.tokens)], self.device)
        slowest = [current.seconds, current.seconds_waiting_for_data, float(memory)]
        seconds, waiting, memory = all_reduce(slowest, self.device, distributed.ReduceOp.MAX)
        return Work(
            previous.steps + current.steps,
            previous.samples + samples,
            previous.tokens + tokens,
            previous.seconds + seconds,
            previous.seconds_waiting_for_data + waiting,
            max(previous.peak_memory_bytes, memory),
        )


def write_throughput(work: Work, path: Path) -> None:
    """Write throughput.json, and log the same as a table."""
    seconds = work.seconds or float("nan")
    table = {
        "tokens_per_second": work.tokens / seconds,
        "samples_per_second": work.samples / seconds,
        "seconds_per_step": work.seconds / (work.steps or float("nan")),
        **asdict(work),
    }
    write_file(path, json.dumps(table, indent=1) + "\n", report=False)
    for name, value in table.items():
        if name == "peak_memory_bytes":
            name, value = "peak_memory_gib", value / 2**30
        logger.info("  %-26s %12.2f", name.replace("_", " "), value)
