"""The Triton kernel that adds up parts of a product and a residual, and computes their RMS norm. Needs Triton.

A program has a row. Outputs without a part in one of the S places read nothing there.

    M rows   N outputs   S parts of a sum
"""

# As in `few_rows_kernel.py`.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import launch_options
from .few_rows_kernel import _plus
from .quantized_linear import GROUP, Tiles

WARPS = 16
"""Of a program, which has one row: the fastest of 4, 8 and 16 for 3,584 outputs on an H200."""


@triton.jit(do_not_specialize=["M"])
def _sum_and_norm(
    parts,
    added,
    norm,
    hidden,
    normed,
    M,
    N: tl.constexpr,
    POWER: tl.constexpr,
    S: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, POWER)
    inside = n < N
    begin = n // OUTPUTS * GROUPS
    own = (begin + GROUPS - 1) // SHARE - begin // SHARE + 1  # parts that this output has
    total = tl.load(parts + m * N + n, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(1, S):
        mask = inside if GROUPS % SHARE == 0 else inside & (s < own)
        total += tl.load(parts + (s * M + m) * N + n, mask=mask, other=0.0)
    kind: tl.constexpr = hidden.dtype.element_ty
    before = tl.load(added + m * N + n, mask=inside, other=0.0).to(tl.float32)
    # Rounded where the separate operations round.
    total = (before + total.to(kind).to(tl.float32)).to(kind)
    tl.store(hidden + m * N + n, total, mask=inside)
    total = total.to(tl.float32)
    mean = tl.reduce(total * total, 0, _plus) / N
    total = (total * tl.rsqrt(mean + EPS)).to(kind).to(tl.float32)
    total *= tl.load(norm + n, mask=inside, other=0.0).to(tl.float32)
    target = n // 128 * 128 + n % 4 * 32 + n % 128 // 4
    tl.store(normed + m * N + target, total.to(kind), mask=inside)


def sum_and_norm(
    parts: Tensor, added: Tensor, norm: Tensor, tiles: Tiles, inputs: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum (M, N) of `parts` (S, M, N), of a product with so many `inputs` by these `tiles`, plus `added` (M, N);
    and its RMS norm with the weight `norm` (N,), interleaved. All are contiguous; N is a multiple of 128."""
    (count, m, n), (_, share) = parts.shape, tiles.parts(parts.shape[2], inputs)
    hidden, normed = torch.empty_like(added), torch.empty_like(added)
    launch = launch_options(added.device)
    with torch.cuda.device_of(added):  # Triton launches on the current device
        _sum_and_norm[(m,)](
            *(parts, added, norm, hidden, normed, m),
            N=n,
            POWER=triton.next_power_of_2(n),
            S=count,
            OUTPUTS=tiles.outputs,
            GROUPS=inputs // GROUP,
            SHARE=share,
            EPS=eps,
            DEPENDENT=bool(launch),
            num_warps=WARPS,
            **launch,
        )
    return hidden, normed
