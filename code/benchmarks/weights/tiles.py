"""Tiles of the kernel for 8-bit weights: those worth measuring, the kernels for them, and the file of the fastest.

M rows   N outputs   K inputs
"""

import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product as pairs

import torch
from qwen_vl_streaming.engine.quantized_linear import GROUP, Tiles, kernel_of
from qwen_vl_streaming.model.quantization import quantize
from qwen_vl_streaming.model.released import SIZES
from torch import Tensor

FEW = (1, 2, 4)
"""Rows for which the kernel for few rows is measured."""
ROWS = (*FEW, 16, 32, 64, 96, 128, 160, 256, 512, 1024, 4096)
KERNEL_ROWS = 512
"""Rows up to which the kernel that has tiles is measured."""
WIDTHS = {
    (16, 0): ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 4, 6), (128, 8, 4)),
    (32, 0): ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 4)),
    (64, 0): ((64, 4, 4), (128, 4, 4), (128, 8, 3), (128, 8, 5), (256, 8, 3)),
    (64, 32): ((64, 4, 3), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3)),
    (128, 0): ((64, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3)),
    (128, 32): ((128, 8, 2), (128, 8, 3)),
    (256, 0): ((128, 8, 2), (128, 8, 3)),
}
"""By the rows of a tile, and its further ones: its outputs, warps and stages."""
PER_PROCESSOR = (0, 1, 2, 3, 4, 6)
"""Programs for each of the GPU's processors; 0 for a program for each tile."""
DEVICE = "cuda"
COMPILERS = 12
"""Processes that compile kernels in advance."""


def layer_shapes(size: str) -> dict[str, tuple[int, int]]:
    """(N, K) of the fused linear layers of a released size."""
    text = SIZES[size]
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    kv = hidden // heads * text["num_key_value_heads"]
    return {
        "qkv": (hidden + 2 * kv, hidden),
        "output": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def candidates(m: int, n: int, k: int, processors: int) -> list[Tiles]:
    """Tiles worth measuring: of the narrowest that have room for all rows, or for many rows of the widest."""
    widths = [width for width in WIDTHS if m <= sum(width)] or [(128, 0), (256, 0)]
    if m <= 128:
        widths = [width for width in widths if sum(width) <= 1.4 * sum(widths[0])]
    elif m > 160:
        widths = [(128, 0), (256, 0)]
    found = []
    for width in widths:
        for (height, warps, stages), each in pairs(WIDTHS[width], PER_PROCESSOR):
            tiles = Tiles(height, *width, each * processors, warps, stages)
            if each == 0 or (tiles.parts(n, k)[0] <= 12 and tiles.parts(n, k)[1] >= 2):
                found.append(tiles)
    return found


def parts_of(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles) -> Tensor:
    """As `quantized_linear.partial_products`: with these tiles, where the engine would take some that fit."""
    return kernel_of(tiles).partial_products(x, weight, scale, tiles)


@functools.cache
def compiled_sum():
    """The sum (M, N) of parts (S, M, N) in bfloat16, as the compiler makes it."""
    return torch.compile(lambda parts: parts.sum(0).to(torch.bfloat16), dynamic=True)


def run_kernel(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles) -> Tensor:
    """The kernel for `x` that is interleaved already, as what makes it does in the engine, and a sum over its parts,
    which is part of what follows there: so one that has a single part is followed by as many kernels. (The sum is of
    all parts, also of those that are left out there.)"""
    return compiled_sum()(parts_of(x, weight, scale, tiles))


def compile_kernel(tiles: Tiles, kind: str) -> str | None:
    """Compile the kernel for `tiles`, in a process of its own: Triton keeps it on disk. Returns why it failed."""
    try:
        weight, scale = quantize(torch.ones(2 * tiles.outputs, 2 * GROUP, device=DEVICE), kind)
        x = torch.ones(16, weight.shape[1], device=DEVICE, dtype=torch.bfloat16)
        parts_of(x, weight, scale, tiles)
        torch.cuda.synchronize()
    except Exception as error:  # a kernel that needs more registers or memory than there are is one candidate less
        return f"{type(error).__name__}: {str(error).splitlines()[0]:.150}"
    return None


def compile_kernels(kinds: list[str]) -> set[Tiles]:
    """Compile all tiles in advance. Returns those, without their programs, that failed."""
    tiles = [Tiles(shape[0], *width, programs, *shape[1:]) for width, shapes in WIDTHS.items() for shape in shapes
             for programs in (0, 4)]  # fmt: skip
    began, bad = time.perf_counter(), set()
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        todo = list(pairs(tiles, kinds))
        for (each, kind), reason in zip(todo, pool.map(compile_kernel, *zip(*todo, strict=True)), strict=True):
            if reason:
                print(f"{kind} {each}: {reason}", flush=True)
                bad.add(each._replace(programs=0))
    print(f"{len(todo)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return bad


def run_nth(x: Tensor, weights: list[tuple[Tensor, Tensor]], tiles: Tiles, i: int) -> Tensor:
    return run_kernel(x, *weights[i], tiles)


def tiles_file(rows: list[dict], kind: str, device: str) -> str:
    """The text of `quantized_tiles.py`: the fastest tiles by shape and rows, or none where another way is faster."""
    lines = []
    for size, name in dict.fromkeys((row["size"], row["layer"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["layer"]) == (size, name) and row["us"]]
        lines.append(f"    {layer_shapes(size)[name]}: (  # {size} {name}")
        for m in (m for m in ROWS if max(FEW) < m <= KERNEL_ROWS):
            found = {row["way"]: row for row in mine if row["m"] == m}
            kernel = found.get(f"{kind} kernel")
            whole = found.get(f"{kind} whole")
            best = kernel and (whole is None or kernel["us"] <= whole["us"])
            lines.append(f"        ({m}, {tuple(Tiles(**kernel['tiles']))[:6] if best else None}),")
        lines.append("    ),")
    body = "\n".join(lines)
    return f'''"""Tiles of the kernel for 8-bit weights, by outputs and inputs of a linear layer.

Up to how many rows the kernel for GPUs other than Hopper uses which tiles. With more rows, and where there are none,
another way is faster: see `quantized_linear.py`. Written by `code/benchmarks/weights.py products --tiles`, which
measured them on an {device}.
"""

TILES: dict[tuple[int, int], tuple[tuple[int, tuple[int, int, int, int, int, int] | None], ...]] = {{
{body}
}}
'''
