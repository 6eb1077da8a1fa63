"""Chooses how a product with 8-bit weights is computed: by the compiler for one row, by a kernel of our own for few,
and by cuBLAS for many, after the weights are converted. All compute what `quantization.scaled_linear` does.

`code/benchmarks/weights.py` measures the choices.

    M rows   N outputs   K inputs   S splits of K
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.quantization import scaled_linear

GROUP = 128
"""Inputs that the kernel loads at a time."""
FEW_ROWS = 256
"""Rows up to which the kernel is used. cuBLAS is faster for more, although all weights are converted first."""


@dataclass(frozen=True)
class Tiles:
    """How the kernel divides a product among programs."""

    outputs: int
    rows: int
    splits: int
    """S, programs that share the inputs of an output."""
    warps: int
    stages: int


def choose_tiles(rows: int, outputs: int, inputs: int) -> Tiles:
    """The tiles for a product of M `rows`, N `outputs` and K `inputs`, measured on an H200."""
    width = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    height, warps, stages = (64, 4, 4) if width < 128 else (128, 8, 3)
    programs = -(-outputs // height) * -(-rows // width)
    splits = 1
    while splits < 8 and programs * splits < 200 and inputs // GROUP >= 16 * splits:
        splits *= 2
    return Tiles(height, width, splits, warps, stages)


def product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`x` (..., K) times `weight` (N, K). With a `scale` (N,), the weight is in 8 bits."""
    if scale is None:
        return torch.nn.functional.linear(x, weight)
    rows, inputs = x.shape[:-1].numel(), x.shape[-1]
    # The kernel reads whole groups of inputs, which all released sizes have. Float32 would be rounded to TF32.
    kernel = x.device.type == "cuda" and x.dtype == torch.bfloat16 and inputs % GROUP == 0
    if not kernel or rows == 1 or rows > FEW_ROWS:
        return scaled_linear(x, weight, scale)
    return kernel_product(x, weight, scale, choose_tiles(rows, len(weight), inputs))


def kernel_product(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles) -> Tensor:
    """`x` (..., K) times the 8-bit `weight` (N, K) times `scale` (N,), by the kernel."""
    shape = (tiles.outputs, tiles.rows, tiles.splits, tiles.warps, tiles.stages)
    parts = partial_products(interleave(x.reshape(-1, x.shape[-1])), weight, scale, *shape)
    total = parts[0] if tiles.splits == 1 else parts.sum(0).to(x.dtype)
    return total.view(*x.shape[:-1], len(weight))


def interleave(x: Tensor) -> Tensor:
    """`x` (M, K) in the order in which the kernel reads it, which loads weights in words of four: in each group, input
    4 i + j goes to 32 j + i, so that the inputs of one byte of all words are consecutive. The compiler fuses this with
    what makes `x`."""
    return x.reshape(len(x), -1, GROUP // 4, 4).transpose(-1, -2).reshape(x.shape)


# Opaque to the compiler, which sums the parts together with what follows.
@torch.library.custom_op("qwen_vl_streaming::partial_products", mutates_args=())
def partial_products(
    x: Tensor, weight: Tensor, scale: Tensor, outputs: int, rows: int, splits: int, warps: int, stages: int
) -> Tensor:
    """As `quantized_kernel.partial_products`, for an `x` that is interleaved."""
    from . import quantized_kernel  # Triton is only installed where PyTorch supports a GPU

    return quantized_kernel.partial_products(x.contiguous(), weight, scale, outputs, rows, splits, warps, stages)


@partial_products.register_fake
def _(x, weight, scale, outputs, rows, splits, warps, stages):
    return x.new_empty(splits, len(x), len(weight), dtype=x.dtype if splits == 1 else torch.float32)
