"""Captures CUDA graphs, on any device and beside other threads. The only place that does."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Output = TypeVar("Output")

WARM_UP_RUNS = 3
"""Runs before a capture, in which kernels are compiled and memory is allocated."""


@torch.no_grad()
def capture(
    work: Callable[[], Output], stream: torch.cuda.Stream, pool: Any = None, runs: int = WARM_UP_RUNS
) -> tuple[torch.cuda.CUDAGraph, Output]:
    """A CUDA graph of `work`, and the output that each replay overwrites, captured on `stream` after `runs` runs.

    The device is that of `stream`, which need not be the current one. Graphs of one `pool`, from
    `torch.cuda.graph_pool_handle`, share memory. The current stream of the device waits for the runs.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(runs):
            work()
        graph = torch.cuda.CUDAGraph()
        # In the default mode, another thread that pins memory invalidates the capture. By default, the stream is of the
        # device that was the current one at the first capture of the process.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = work()
    current.wait_stream(stream)
    return graph, output
