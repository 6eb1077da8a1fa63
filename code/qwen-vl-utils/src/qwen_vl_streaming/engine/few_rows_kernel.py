"""The Triton kernel for products of one row, or a few, with 8-bit weights. Imported on a GPU only.

Such a product takes as long as its weights take to be read. Each warp computes OUTPUTS outputs alone: its threads read
16 bytes at a time, many of them before the first is used, and add up products in registers. With programmatic dependent
launch, the first weights are read while the kernel that computes the inputs still runs.

    M rows   N outputs   K inputs
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import launch_options

OUTPUTS = 2
"""Outputs of a warp. More would reuse the inputs more often, and leave processors idle at the end."""
FEW_CHUNKS, MANY_CHUNKS = (8, 1), (4, 8)
"""The most chunks of an output that are read at once, and the warps of a program: where that is all chunks, and where
there are more."""
WORDS = 128
"""Words of four weights in a chunk of one output, of which each of 32 threads reads four."""


@triton.jit
def _read(weights, FIRST, WORDS: tl.constexpr, COUNT: tl.constexpr):
    words = ()
    for chunk in tl.static_range(COUNT):
        words += (tl.load(weights + (FIRST + chunk) * WORDS, eviction_policy="evict_first"),)
    return words


@triton.jit
def _add(totals, words, inputs, FIRST, K, M: tl.constexpr, FP8: tl.constexpr, WORDS: tl.constexpr, COUNT: tl.constexpr):
    for chunk in tl.static_range(COUNT):
        for byte in tl.static_range(4):
            if FP8:
                value = (words[chunk] >> (8 * byte)).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
            else:
                value = ((words[chunk] << (24 - 8 * byte)) >> 24).to(tl.float32)
            added = ()
            for m in tl.static_range(M):
                x = tl.load(inputs + m * K + (FIRST + chunk) * (4 * WORDS) + 32 * byte).to(tl.float32)
                added += (totals[m] + value * x[None, :],)
            totals = added
    return totals


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _few_rows(
    x,
    weight,
    scale,
    added,
    output,
    N,
    K: tl.constexpr,
    M: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    COUNT: tl.constexpr,
    FP8: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    chunks: tl.constexpr = K // 4 // WORDS
    full: tl.constexpr = chunks // COUNT
    rest: tl.constexpr = chunks % COUNT
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = n // 2 + n % 2 * (N // 2) if GATED else n  # a gate and its up in turn
    w = tl.arange(0, WORDS)
    # A weight may have more than 2^31 elements. Outputs beyond the last read the first ones.
    weights = weight + (row % N).to(tl.int64)[:, None] * (K // 4) + w[None, :]
    # Of the 8 consecutive inputs that a thread could read at once, only 4 belong to its words.
    inputs = x + tl.max_contiguous(w // 32 * 128 + w % 32, 4)
    totals = ()
    for _ in tl.static_range(M):
        totals += (tl.full((OUTPUTS, WORDS), 0.0, tl.float32),)
    factor = tl.load(scale + row, mask=n < N, other=0.0, eviction_policy="evict_first")
    words = _read(weights, 0, WORDS, COUNT)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for i in range(1, full):
        ahead = _read(weights, i * COUNT, WORDS, COUNT)
        totals = _add(totals, words, inputs, (i - 1) * COUNT, K, M, FP8, WORDS, COUNT)
        words = ahead
    last = _read(weights, full * COUNT, WORDS, rest)
    totals = _add(totals, words, inputs, (full - 1) * COUNT, K, M, FP8, WORDS, COUNT)
    totals = _add(totals, last, inputs, full * COUNT, K, M, FP8, WORDS, rest)
    kind: tl.constexpr = output.dtype.element_ty
    for m in tl.static_range(M):
        total = (tl.reduce(totals[m], 1, _plus) * factor).to(kind)
        if GATED:  # rounded where the separate operations round
            gate, up = tl.split(tl.reshape(total.to(tl.float32), (OUTPUTS // 2, 2)))
            active = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
            c = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
            target = c // 128 * 128 + c % 4 * 32 + c % 128 // 4
            tl.store(output + m * (N // 2) + target, (active * up).to(kind), mask=c < N // 2)
        elif ADDED:
            before = tl.load(added + m * N + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(output + m * N + n, (before + total.to(tl.float32)).to(kind), mask=n < N)
        else:
            tl.store(output + m * N + n, total, mask=n < N)


def few_rows_product(
    x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None = None, gated: bool = False
) -> Tensor:
    """(M, N): `x` (M, K), interleaved, times the 8-bit `weight` (N, K) times `scale` (N,), plus `added` (M, N), all
    contiguous, in the dtype of `x`. K is a multiple of 128, and M a small number, for each of which a kernel is
    compiled. If `gated`, the first half of the outputs are gates of the others, without `added`: returns SiLU(gates)
    times the others, (M, N / 2), interleaved as inputs of the next product; N / 2 is a multiple of 128. The kernel
    launched before this one must not write `weight` or `scale`, which are read early: see `dependent_launch.py`."""
    (m, k), n = x.shape, len(weight)
    output = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    words = math.gcd(k // 4, WORDS)
    chunks = k // 4 // words
    launch = launch_options(x.device)
    ahead, warps = FEW_CHUNKS if chunks <= FEW_CHUNKS[0] else MANY_CHUNKS
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _few_rows[(triton.cdiv(n, OUTPUTS * warps),)](
            *(x, weight.view(torch.int32), scale, added, output, n),
            K=k,
            M=m,
            OUTPUTS=OUTPUTS * warps,
            WORDS=words,
            COUNT=min(ahead, chunks),
            FP8=weight.dtype == torch.float8_e4m3fn,
            ADDED=added is not None,
            GATED=gated,
            DEPENDENT=bool(launch),
            num_warps=warps,
            **launch,
        )
    return output
