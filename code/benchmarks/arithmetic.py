"""FLOPs of parts of a model, and how many a device computes per second."""

import time
from collections.abc import Callable

import torch


def matrices(module: torch.nn.Module) -> int:
    """Weights in the matrices of `module`."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def tower_flops(model, patches: int) -> float:
    """FLOPs of the vision tower, without merger, for a clip of `patches`. Attention computes 4 x pairs x width."""
    vision, tower = model.config.vision_config, model.model.visual
    full = len(vision.fullatt_block_indexes)
    seen = full * patches + (vision.depth - full) * min((vision.window_size // vision.patch_size) ** 2, patches)
    weights = matrices(tower.blocks) + tower.patch_embed.proj.weight.numel()
    return 2.0 * patches * weights + 4.0 * patches * seen * vision.hidden_size


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """The mean time of `repeats` calls, after two for warm-up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for i in range(repeats + 2):
        if i == 2:
            wait()
            began = time.perf_counter()
        work()
    wait()
    return (time.perf_counter() - began) / repeats


def matrix_rate(device: str, warm_up: float = 0.0) -> float:
    """Measure the FLOP/s of a bf16 product of matrices of 8192 x 8192, on a CPU of 512 x 512.

    20 products take 30 ms on an H200. `warm_up` is how many seconds products run before: a GPU that has reached the
    limit of its power lowers its clock.
    """
    size = 8192 if device == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    began = time.perf_counter()
    while time.perf_counter() - began < warm_up:
        seconds(lambda: a @ b, 20, device)
    return 2 * size**3 / seconds(lambda: a @ b, 20, device)
