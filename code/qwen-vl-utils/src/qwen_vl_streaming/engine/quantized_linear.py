"""Chooses how a product with 8-bit weights is computed: by one kernel of our own for one or two rows, by another for
more (one for Hopper, one for other GPUs), and by cuBLAS for many, after the weights are converted. All compute what
`quantization.scaled_linear` does.

`code/benchmarks/weights.py` measures the choices and writes `quantized_tiles.py`, for the GPUs other than Hopper.

    M rows   N outputs   K inputs   S parts of a sum over the inputs
"""

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..model.quantization import scaled_linear
from .hopper import HOPPER, hopper_processors
from .quantized_tiles import TILES

GROUP = 128
"""Inputs that the kernel loads at a time."""
FEW_ROWS = 2
"""Rows up to which the kernel in `few_rows_kernel.py` is the fastest."""
WARPGROUP_OUTPUTS = 64
"""Outputs that a warpgroup of the kernel for Hopper multiplies."""
HOPPER_ROWS = (16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (128, 32), (256, 0), (256, 32)
"""Rows of a tile, and its further rows, of the kernel for Hopper. At 7B it is faster than converting the weights."""
HOPPER_MEMORY = 232_448
"""Bytes of shared memory that a program can take on Hopper."""
MOST_STAGES = 8
"""Of the kernel for Hopper."""


class Tiles(NamedTuple):
    """How the kernel divides a product among programs."""

    outputs: int
    """Outputs of a tile: a power of two from 16, or WARPGROUP_OUTPUTS for each warpgroup."""
    rows: int
    """Rows of a tile, a power of two from 16."""
    more_rows: int
    """Further rows: 0, or a power of two from 16."""
    programs: int
    """Programs among which all tiles and groups of inputs are divided evenly; 0 for a program for each tile."""
    warps: int
    """Warps that multiply."""
    stages: int
    """Groups of inputs that are loaded ahead, and one."""
    warpgroups: int = 0
    """Warpgroups that multiply, each WARPGROUP_OUTPUTS; 0 for the kernel for GPUs other than Hopper."""

    def parts(self, outputs: int, inputs: int) -> tuple[int, int]:
        """S, the most programs that compute parts of one tile, and how many groups of inputs a program has."""
        groups = inputs // GROUP
        units = -(-outputs // self.outputs) * groups
        share = groups if self.programs == 0 else -(-units // self.programs)
        if share % groups == 0:
            return 1, share
        return (groups // share if groups % share == 0 else (groups - 2) // share + 2), share

    def shared_memory(self, capability: tuple[int, int]) -> int:
        """Bytes of shared memory that the kernel takes on a GPU of this compute capability. That of Triton 3.8; earlier
        versions take less."""
        rows = self.rows + self.more_rows
        if self.warpgroups:
            return GROUP * self.stages * (self.outputs + 2 * rows) + 1024  # for barriers and what Triton needs
        ahead = self.stages - (capability[0] != HOPPER)  # Hopper's tensor cores read rows from shared memory
        loads = GROUP * (self.stages * self.outputs + 2 * ahead * rows)
        words = 64 * self.outputs * (2 if self.more_rows else 1)  # converted, or exchanged between threads
        return max(loads + words, 4 * self.outputs * max(self.rows, self.more_rows))

    def fit(self, capability: tuple[int, int], memory: int) -> "Tiles":
        """These, with fewer stages or rows if they take more than `memory` bytes of shared memory. The products and
        their parts are the same."""
        tiles = self
        while tiles.shared_memory(capability) > memory and tiles.rows > 16:
            if tiles.stages > 2:
                tiles = tiles._replace(stages=tiles.stages - 1)
            else:
                tiles = tiles._replace(rows=tiles.rows // (1 if tiles.more_rows else 2), more_rows=0)
        return tiles


def choose_tiles(rows: int, outputs: int, inputs: int, processors: int = 0) -> Tiles | None:
    """The tiles for a product of M `rows`, N `outputs` and K `inputs`, measured on an H200, or None if another way is
    faster than the kernel. With the number of `processors` of a Hopper GPU, they are for its kernel. Without it, other
    sizes have those of the measured size with the nearest number of weights, and not all fit every GPU: see
    `fit_tiles`."""
    if processors:
        return _hopper_tiles(rows, outputs, processors)
    measured = min(TILES, key=lambda shape: abs(shape[0] * shape[1] - outputs * inputs))
    for most, tiles in TILES[measured]:
        if rows <= most:
            return tiles and Tiles(*tiles)
    return None


def _hopper_tiles(rows: int, outputs: int, processors: int) -> Tiles | None:
    """For one program on each of the `processors`. Three warpgroups share the loads of rows instead of two, where there
    are enough `outputs` to occupy all processors, and registers for the rows."""
    width = next((width for width in HOPPER_ROWS if rows <= sum(width)), None)
    if width is None:
        return None
    warpgroups = 3 if outputs > WARPGROUP_OUTPUTS * processors and rows <= 128 else 2
    tiles = Tiles(WARPGROUP_OUTPUTS * warpgroups, *width, processors, 4 * warpgroups, MOST_STAGES, warpgroups)
    return tiles.fit((HOPPER, 0), HOPPER_MEMORY)


def fit_tiles(tiles: Tiles, device: torch.device) -> Tiles:
    """`tiles` as they fit in the shared memory of the GPU `device`, as those for Hopper do."""
    if tiles.warpgroups:
        return tiles
    gpu = torch.cuda.get_device_properties(device)
    return tiles.fit((gpu.major, gpu.minor), gpu.shared_memory_per_block_optin)


def product(
    x: Tensor, weight: Tensor, scale: Tensor | None, added: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """`x` (..., K) times `weight` (N, K), plus `added` (..., N). With a `scale` (N,), the weight is in 8 bits; if
    `tiles_of` has tiles then, `x` may be `interleaved`."""
    if scale is not None and takes_few_rows(x):
        rows = None if added is None else added.reshape(-1, len(weight))
        total = few_rows_product(interleave(x.reshape(-1, x.shape[-1])), weight, scale, rows)
        return total.view(*x.shape[:-1], len(weight))
    total = _product(x, weight, scale, interleaved)
    return total if added is None else added + total


def gated_mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    act: nn.Module,
    down: Tensor,
    down_scale: Tensor | None,
    added: Tensor,
    interleaved: bool,
) -> Tensor:
    """`added` (..., N) plus `down` (N, C) times `act`(gate) * up, where `gate_up` (2 C, K) times `x` (..., K), as in
    `product`, are the gates, then the ups. With few rows in 8 bits and SiLU, the product also gates, for which it is no
    more work."""
    if gate_up_scale is None or not takes_few_rows(x) or down.shape[1] % GROUP or not is_silu(act):
        gate, up = product(x, gate_up, gate_up_scale, None, interleaved).chunk(2, -1)
        return product(act(gate) * up, down, down_scale, added)
    gated = few_rows_product(interleave(x.reshape(-1, x.shape[-1])), gate_up, gate_up_scale, None, True)
    return few_rows_product(gated, down, down_scale, added.reshape(-1, len(down))).view(added.shape)


def is_silu(act: nn.Module) -> bool:
    return isinstance(act, nn.SiLU | SiLUActivation)


def takes_few_rows(x: Tensor) -> bool:
    """Whether the kernel for few rows computes products of `x` (..., K) with 8-bit weights."""
    return _has_kernels(x) and x.shape[:-1].numel() <= FEW_ROWS


def _has_kernels(x: Tensor) -> bool:
    """The kernels read whole groups of inputs, which all released sizes have, and compute in bfloat16."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and x.shape[-1] % GROUP == 0


def tiles_of(x: Tensor, weight: Tensor) -> Tiles | None:
    """The tiles with which the kernel for more rows multiplies `x` (..., K) and the 8-bit `weight` (N, K). None if
    another kernel or cuBLAS does."""
    if not _has_kernels(x) or takes_few_rows(x):
        return None
    return choose_tiles(x.shape[:-1].numel(), *weight.shape, processors=hopper_processors(x.device))


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, interleaved: bool) -> Tensor:
    if scale is not None and (tiles := tiles_of(x, weight)) is not None:
        return kernel_product(x, weight, scale, tiles, interleaved)
    assert not interleaved
    if scale is None:
        return torch.nn.functional.linear(x, weight)
    if not _has_kernels(x):
        return scaled_linear(x, weight, scale)
    return (torch.nn.functional.linear(x, converted(weight)) * scale).to(x.dtype)


def kernel_product(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles, interleaved: bool = False) -> Tensor:
    """`x` (..., K), `interleaved` or not, times the 8-bit `weight` (N, K) times `scale` (N,), by the kernel."""
    rows = x.reshape(-1, x.shape[-1])
    parts = partial_products(rows if interleaved else interleave(rows), weight, scale, list(tiles))
    total = sum_parts(parts, tiles, *weight.shape).to(x.dtype)
    return total.view(*x.shape[:-1], len(weight))


def sum_parts(parts: Tensor, tiles: Tiles, outputs: int, inputs: int) -> Tensor:
    """The sum (M, N) of `parts` (S, M, N), of which each output may have fewer than S."""
    count, share = tiles.parts(outputs, inputs)
    if count == 1:
        return parts[0]
    groups = inputs // GROUP
    if groups % share:
        begin = torch.arange(outputs, device=parts.device) // tiles.outputs * groups
        own = (begin + groups - 1) // share - begin // share + 1
        parts = parts.where(torch.arange(count, device=parts.device)[:, None, None] < own, 0)
    return parts.sum(0)


def interleave(x: Tensor) -> Tensor:
    """`x` (M, K) in the order in which the kernel reads it, which loads weights in words of four: in each group, input
    4 i + j goes to 32 j + i, so that the inputs of one byte of all words are consecutive. The compiler fuses this with
    what makes `x`."""
    return x.reshape(len(x), -1, GROUP // 4, 4).transpose(-1, -2).reshape(x.shape)


def kernel_of(tiles: Tiles) -> ModuleType:
    """The module of the kernel for `tiles`, imported here, because Triton is only installed where PyTorch supports a
    GPU."""
    return importlib.import_module(".hopper_kernel" if tiles.warpgroups else ".quantized_kernel", __package__)


# Opaque to the compiler, which sums the parts together with what follows.
@torch.library.custom_op("qwen_vl_streaming::partial_products", mutates_args=())
def partial_products(x: Tensor, weight: Tensor, scale: Tensor, tiles: list[int]) -> Tensor:
    """As `quantized_kernel.partial_products`, with `tiles` as they fit on the GPU."""
    # Chosen here, where the compiler does not look: it would guard on, or not trace, a device's properties.
    fitting = fit_tiles(Tiles(*tiles), x.device)
    return kernel_of(fitting).partial_products(x.contiguous(), weight, scale, fitting)


@partial_products.register_fake
def _(x, weight, scale, tiles):
    parts, _ = Tiles(*tiles).parts(*weight.shape)
    # len(x) would be a number, and each number of rows would be compiled anew.
    return x.new_empty(parts, x.shape[0], len(weight), dtype=x.dtype if parts == 1 else torch.float32)


@torch.library.custom_op("qwen_vl_streaming::few_rows_product", mutates_args=())
def few_rows_product(
    x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None = None, gated: bool = False
) -> Tensor:
    """As `few_rows_kernel.few_rows_product`."""
    from . import few_rows_kernel

    added = added if added is None else added.contiguous()
    return few_rows_kernel.few_rows_product(x.contiguous(), weight, scale, added, gated)


@few_rows_product.register_fake
def _(x, weight, scale, added=None, gated=False):
    return x.new_empty(x.shape[0], len(weight) // 2 if gated else len(weight))


@torch.library.custom_op("qwen_vl_streaming::converted", mutates_args=())
def converted(weight: Tensor) -> Tensor:
    """As `quantized_kernel.convert`."""
    from . import quantized_kernel

    return quantized_kernel.convert(weight)


@converted.register_fake
def _(weight):
    return weight.new_empty(weight.shape, dtype=torch.bfloat16)
