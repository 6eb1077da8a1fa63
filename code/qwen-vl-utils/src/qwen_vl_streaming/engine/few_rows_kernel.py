"""Triton kernels for products of one row, or a few, with 8-bit or bfloat16 weights. Needs Triton.

Such a product takes as long as its weights take to be read. A warp, or two, computes a few outputs alone: its threads
read 16 bytes at a time, many of them before the first is used, and add up products in registers. With programmatic
dependent launch, the first weights are read while the kernel that computes the inputs still runs.

    M rows   N outputs   K inputs
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import launch_options

WORDS = 128
"""Words of four weights in a chunk of one output, at most."""


class Scaled(NamedTuple):
    """Rows before an RMS norm, whose inverse root mean square the next product applies to its outputs."""

    values: Tensor
    """(M, K), times the weight of the norm, in the order of `quantized_linear.interleave`."""
    squares: Tensor
    """Parts of the sum of the squares of each row, (M, parts), in float32."""
    eps: float


@triton.jit
def _read(weights, FIRST, WORDS: tl.constexpr, COUNT: tl.constexpr):
    words = ()
    for chunk in tl.static_range(COUNT):
        words += (tl.load(weights + (FIRST + chunk) * WORDS, eviction_policy="evict_first"),)
    return words


@triton.jit
def _value(words, NUMBER: tl.constexpr, KIND: tl.constexpr):
    if KIND == "bfloat16":
        half = (words >> (NUMBER // 2 * 32)).to(tl.int32)
        bits = half << 16 if NUMBER % 2 == 0 else half & -65536
        return bits.to(tl.float32, bitcast=True)
    if KIND == "float8_e4m3fn":
        return (words >> (8 * NUMBER)).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return ((words << (24 - 8 * NUMBER)) >> 24).to(tl.float32)


@triton.jit
def _add(
    totals, words, inputs, FIRST, K, M: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr, COUNT: tl.constexpr
):
    for chunk in tl.static_range(COUNT):
        for number in tl.static_range(4):
            value = _value(words[chunk], number, KIND)
            added = ()
            for m in tl.static_range(M):
                x = tl.load(inputs + m * K + (FIRST + chunk) * (4 * WORDS) + 32 * number).to(tl.float32)
                added += (totals[m] + value * x[None, :],)
            totals = added
    return totals


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _sums(
    x,
    weight,
    scale,
    squares,
    row,
    inside,
    N,
    K: tl.constexpr,
    M: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    POWER: tl.constexpr,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """For each of M rows the outputs `row`, those `inside`, in float32. Waits for the kernel before."""
    chunks: tl.constexpr = K // 4 // WORDS
    full: tl.constexpr = chunks // COUNT
    rest: tl.constexpr = chunks % COUNT
    w = tl.arange(0, WORDS)
    # A weight may have more than 2^31 elements. Outputs beyond the last read the first ones.
    weights = weight + (row % N).to(tl.int64)[:, None] * (K // 4) + w[None, :]
    # Of the consecutive inputs that a thread could read at once, only as many as it has words belong to these.
    inputs = x + tl.max_contiguous(w // 32 * 128 + w % 32, 2 if KIND == "bfloat16" else 4)
    totals = ()
    for _ in tl.static_range(M):
        totals += (tl.full((OUTPUTS, WORDS), 0.0, tl.float32),)
    if KIND != "bfloat16":
        factor = tl.load(scale + row, mask=inside, other=0.0, eviction_policy="evict_first")
    words = _read(weights, 0, WORDS, COUNT)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for i in range(1, full):
        ahead = _read(weights, i * COUNT, WORDS, COUNT)
        totals = _add(totals, words, inputs, (i - 1) * COUNT, K, M, KIND, WORDS, COUNT)
        words = ahead
    last = _read(weights, full * COUNT, WORDS, rest)
    totals = _add(totals, words, inputs, (full - 1) * COUNT, K, M, KIND, WORDS, COUNT)
    totals = _add(totals, last, inputs, full * COUNT, K, M, KIND, WORDS, rest)
    sums = ()
    for m in tl.static_range(M):
        total = tl.reduce(totals[m], 1, _plus)
        if KIND != "bfloat16":
            total *= factor
        if PARTS:
            part = tl.arange(0, POWER)
            of_row = tl.load(squares + m * PARTS + part, mask=part < PARTS, other=0.0)
            total *= tl.rsqrt(tl.reduce(of_row, 0, _plus) / K + EPS)
        sums += (total,)
    return sums


@triton.jit
def _few_rows(
    x,
    weight,
    scale,
    squares,
    added,
    norm,
    output,
    scaled,
    new_squares,
    N,
    K: tl.constexpr,
    M: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    POWER: tl.constexpr,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = n // 2 + n % 2 * (N // 2) if GATED else n  # a gate and its up in turn
    sums = _sums(
        x, weight, scale, squares, row, n < N, N, K, M, OUTPUTS, WORDS, COUNT, KIND, PARTS, POWER, EPS, DEPENDENT
    )
    kind: tl.constexpr = output.dtype.element_ty
    for m in tl.static_range(M):
        total = sums[m].to(kind).to(tl.float32)  # rounded where the separate operations round
        if GATED:
            gate, up = tl.split(tl.reshape(total, (OUTPUTS // 2, 2)))
            active = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
            c = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            target = c // 128 * 128 + c % 4 * 32 + c % 128 // 4
            tl.store(output + m * (N // 2) + target, (active * up).to(kind), mask=c < N // 2)
        else:
            if ADDED:
                total += tl.load(added + m * N + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(output + m * N + n, total.to(kind), mask=n < N)
            if NORM:
                total = tl.where(n < N, total.to(kind).to(tl.float32), 0.0)
                target = n // 128 * 128 + n % 4 * 32 + n % 128 // 4
                weighted = total * tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
                tl.store(scaled + m * N + target, weighted.to(kind), mask=n < N)
                place = new_squares + m * tl.num_programs(0) + tl.program_id(0)
                tl.store(place, tl.reduce(total * total, 0, _plus))


def few_rows_product(
    x: Tensor | Scaled,
    weight: Tensor,
    scale: Tensor | None,
    added: Tensor | None = None,
    gated: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Any:
    """(M, N): `x` (M, K), interleaved, times the `weight` (N, K), which is in 8 bits and has a `scale` (N,), or in
    bfloat16, plus `added` (M, N), all contiguous, in the dtype of `x`. K is a multiple of 128, and M a small number,
    for each of which a kernel is compiled.

    If `gated`, the first half of the outputs are gates of the others, without `added`: returns SiLU(gates) times the
    others, (M, N / 2), interleaved as inputs of the next product; N / 2 is a multiple of 128. With the weight of a
    `norm` (N,) and its `eps`, also returns the outputs as `Scaled`; N is a multiple of 128.

    The kernel launched before this one must not write `weight` or `scale`, which are read early: see
    `dependent_launch.py`."""
    values, programs, arguments, options = prepare(x, weight, scale, norm is not None)
    (m, _), n = values.shape, len(weight)
    output = values.new_empty(m, n // 2 if gated else n)
    scaled = squares = None
    if norm is not None:
        scaled, squares = values.new_empty(m, n), values.new_empty(m, programs, dtype=torch.float32)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        _few_rows[(programs,)](
            *(*arguments, added, norm, output, scaled, squares, n),
            ADDED=added is not None,
            GATED=gated,
            NORM=norm is not None,
            **options,
        )
    return output if scaled is None or squares is None else (output, Scaled(scaled, squares, eps))


def choose(chunks: int, quantized: bool, few_programs: bool) -> tuple[int, int, int]:
    """Outputs for each warp of a program, chunks of an output that are read at once, and warps: the fastest on an H200
    for outputs of so many chunks, of programs of which the next kernel reads parts of a sum, or not."""
    if chunks > 8:
        return (2, 4, 8) if quantized else (4, 2, 8)
    return 2, 8 if quantized else 4, 8 if few_programs else 1


def prepare(
    x: Tensor | Scaled, weight: Tensor, scale: Tensor | None, few_programs: bool = False
) -> tuple[Tensor, int, tuple, dict[str, Any]]:
    """How to launch a kernel with `_sums` of these: the inputs, the number of programs, the first arguments, and
    options."""
    values, squares, eps = x if isinstance(x, Scaled) else (x, None, 0.0)
    (m, k), n = values.shape, len(weight)
    words = math.gcd(k // 4, WORDS)
    launch, chunks = launch_options(values.device), k // 4 // words
    outputs, ahead, warps = choose(chunks, scale is not None, few_programs)
    word = torch.int64 if scale is None else torch.int32
    parts = 0 if squares is None else squares.shape[1]
    options = {
        "K": k,
        "M": m,
        "OUTPUTS": outputs * warps,
        "WORDS": words,
        "COUNT": min(ahead, chunks),
        "KIND": str(weight.dtype).removeprefix("torch."),
        "PARTS": parts,
        "POWER": triton.next_power_of_2(parts),
        "EPS": eps,
        "DEPENDENT": bool(launch),
        "num_warps": warps,
        **launch,
    }
    return values, triton.cdiv(n, outputs * warps), (values, weight.view(word), scale, squares), options
