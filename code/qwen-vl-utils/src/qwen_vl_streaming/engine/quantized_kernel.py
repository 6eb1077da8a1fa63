"""The Triton kernel for products of few rows with 8-bit weights. Imported on a GPU only.

`quantized_linear.py` says when it is used.

    M rows   N outputs   K inputs   S splits of K
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantized_linear import GROUP


# The weights are the first operand of `dot`, which the tensor cores take from registers, where they are converted. A
# thread reads them from shared memory in words of four, because reading single bytes takes longer than all else. The
# first byte of all words of a group is one operand, the second the next, and so on.
@triton.jit(do_not_specialize=["M", "SHARE"])
def _product(
    x,
    weight,
    scale,
    output,
    M,
    N,
    K,
    SHARE,
    FP8: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    words: tl.constexpr = INPUTS // 4
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    groups = K // INPUTS
    k = tl.arange(0, words)
    inputs = x + m[None, :] * K + k[:, None]
    # A weight may have more than 2^31 elements. Outputs beyond the last read the first ones.
    weights = weight + (n % N).to(tl.int64)[:, None] * (K // 4) + k[None, :]
    rows = m[None, :] < M
    total = tl.full((OUTPUTS, ROWS), 0.0, tl.float32)
    for group in range(split * SHARE, tl.minimum(split * SHARE + SHARE, groups)):
        word = tl.load(weights + group * words)
        for byte in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            part = tl.load(inputs + group * INPUTS + byte * words, mask=rows, other=0.0)
            if FP8:
                value = (word >> (8 * byte)).to(tl.int8).to(tl.float8e4nv, bitcast=True)
            else:
                value = ((word << (24 - 8 * byte)) >> 24).to(tl.float32)
            total = tl.dot(value.to(x.dtype.element_ty), part, total)
    inside = n < N
    total = total * tl.load(scale + n, mask=inside, other=0.0)[:, None]
    target = output + (split * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(target, total.to(output.dtype.element_ty), mask=rows & inside[:, None])


def partial_products(
    x: Tensor, weight: Tensor, scale: Tensor, outputs: int, rows: int, splits: int, warps: int, stages: int
) -> Tensor:
    """(S, M, N): `x` (M, K), interleaved, times the 8-bit `weight` (N, K) times `scale` (N,), over each of `splits`
    parts of the inputs, all contiguous. In the dtype of `x` if S is 1, else in float32.

    A program computes `outputs` by `rows` results, both powers of two from 16, with so many `warps`, and loads `stages`
    groups of inputs ahead.
    """
    (m, k), n = x.shape, len(weight)
    dtype = x.dtype if splits == 1 else torch.float32
    output = torch.empty(splits, m, n, dtype=dtype, device=x.device)
    _product[triton.cdiv(n, outputs), triton.cdiv(m, rows), splits](
        *(x, weight.view(torch.int32), scale, output, m, n, k, triton.cdiv(k // GROUP, splits)),
        FP8=weight.dtype == torch.float8_e4m3fn,
        OUTPUTS=outputs,
        ROWS=rows,
        INPUTS=GROUP,
        num_warps=warps,  # pyright: ignore[reportCallIssue]
        num_stages=stages,  # pyright: ignore[reportCallIssue]
    )
    return output
