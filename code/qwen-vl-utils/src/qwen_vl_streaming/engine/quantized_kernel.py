"""The Triton kernels for products with 8-bit weights. Imported on a GPU only.

`quantized_linear.py` says when they are used.

    M rows   N outputs   K inputs   S parts of a sum over the inputs
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent_launch import launch_options
from .quantized_linear import GROUP, Tiles

BF16X4 = tl.constexpr((tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16))
BLOCK = 1024
"""Words that a program converts."""


def _convert_pair(kind: torch.dtype, result: str) -> str:
    """PTX that converts two 8-bit numbers, each twice in the register `t`, to a pair of bfloat16 in `result`. GPUs
    convert single numbers slowly."""
    if kind == torch.int8:
        # The lower 7 bits become the mantissa of 128 ... 255; the sign bit subtracts 128 or 256. 0xEA: (a & b) | c.
        return (
            "lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA; lop3.b32 b, t, 0x00800080, 0xC300C300, 0xEA;"
            f"mov.b32 c, 0x3F803F80; fma.rn.bf16x2 {result}, a, c, b;"
        )
    # The exponent of e4m3 is 120 less than that of a bfloat16 with the same bits: 2^120 makes up for it.
    return (
        "shr.b32 a, t, 4; and.b32 a, a, 0x07f007f0; lop3.b32 a, t, 0x80008000, a, 0xEA;"
        f"mov.b32 b, 0x7B807B80; mov.b32 c, 0x80008000; fma.rn.bf16x2 {result}, a, b, c;"
    )


def pairs_by_byte(kind: torch.dtype) -> str:
    """PTX that converts two words ($4, $5) to four pairs ($0 ... $3), one for each byte."""
    code = "".join(f"prmt.b32 t, $4, $5, {0x4400 + 0x1111 * j}; {_convert_pair(kind, f'${j}')}" for j in range(4))
    return f"{{ .reg .b32 t, a, b, c; {code} }}"


def pair_of_byte(kind: torch.dtype, byte: int) -> str:
    """PTX that converts one byte of two words ($1, $2) to a pair ($0)."""
    return f"{{ .reg .b32 t, a, b, c; prmt.b32 t, $1, $2, {0x4400 + 0x1111 * byte}; {_convert_pair(kind, '$0')} }}"


def word_to_four(kind: torch.dtype) -> str:
    """PTX that converts a word ($1) to four numbers in their order, in 64 bits ($0)."""
    low, high = _convert_pair(kind, "low"), _convert_pair(kind, "high")
    code = f"prmt.b32 t, $1, $1, 0x1100; {low} prmt.b32 t, $1, $1, 0x3322; {high} mov.b64 $0, {{low, high}};"
    return f"{{ .reg .b32 t, a, b, c, low, high; {code} }}"


INT8_PAIRS, FP8_PAIRS = tl.constexpr(pairs_by_byte(torch.int8)), tl.constexpr(pairs_by_byte(torch.float8_e4m3fn))
INT8_FOUR, FP8_FOUR = tl.constexpr(word_to_four(torch.int8)), tl.constexpr(word_to_four(torch.float8_e4m3fn))


# The weights are the first operand of `dot`, which the tensor cores take from registers, where they are converted. A
# thread reads them from shared memory in words of four, because reading single bytes takes longer than all else. The
# first byte of all words of a group is one operand, the second the next, and so on.
#
# All groups of inputs of all tiles of outputs are divided evenly among the programs, because tiles alone rarely fill a
# GPU's processors evenly. So a program may begin or end within a tile, and writes a part of its sums.
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
    MORE_ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    words: tl.constexpr = INPUTS // 4
    groups = K // INPUTS
    first = tl.program_id(0) * SHARE
    last = tl.minimum(first + SHARE, (N + OUTPUTS - 1) // OUTPUTS * groups)
    m = tl.program_id(1) * (ROWS + MORE_ROWS) + tl.arange(0, ROWS)
    k = tl.arange(0, words)
    rows = m[None, :] < M
    inputs = x + m[None, :] * K + k[:, None]
    if MORE_ROWS:  # as a second operand, because a tensor's sides are powers of two
        more_m = tl.program_id(1) * (ROWS + MORE_ROWS) + ROWS + tl.arange(0, MORE_ROWS)
        more_rows = more_m[None, :] < M
        more_inputs = x + more_m[None, :] * K + k[:, None]
    for tile in range(first // groups, (last + groups - 1) // groups):
        n = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        # A weight may have more than 2^31 elements. Outputs beyond the last read the first ones.
        weights = weight + (n % N).to(tl.int64)[:, None] * (K // 4) + k[None, :]
        total = tl.full((OUTPUTS, ROWS), 0.0, tl.float32)
        if MORE_ROWS:
            more_total = tl.full((OUTPUTS, MORE_ROWS), 0.0, tl.float32)
        for group in range(tl.maximum(first - tile * groups, 0), tl.minimum(last - tile * groups, groups)):
            word = tl.load(weights + group * words)
            if not INTERPRETED:
                values = tl.inline_asm_elementwise(
                    FP8_PAIRS if FP8 else INT8_PAIRS, "=r,=r,=r,=r,r,r", [word], BF16X4, is_pure=True, pack=2
                )
            for byte in tl.static_range(4):
                if not INTERPRETED:
                    value = values[byte]
                elif FP8:
                    value = (word >> (8 * byte)).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(x.dtype.element_ty)
                else:
                    value = ((word << (24 - 8 * byte)) >> 24).to(x.dtype.element_ty)
                part = tl.load(inputs + group * INPUTS + byte * words, mask=rows, other=0.0)
                total = tl.dot(value, part, total)
                if MORE_ROWS:
                    part = tl.load(more_inputs + group * INPUTS + byte * words, mask=more_rows, other=0.0)
                    more_total = tl.dot(value, part, more_total)
        inside = n[:, None] < N
        factor = tl.load(scale + n, mask=n < N, other=0.0)[:, None]
        s = tl.program_id(0) - tile * groups // SHARE  # programs before this one that have a part of the tile
        target = output + (s * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(target, (total * factor).to(output.dtype.element_ty), mask=rows & inside)
        if MORE_ROWS:
            target = output + (s * M + more_m[None, :]).to(tl.int64) * N + n[:, None]
            tl.store(target, (more_total * factor).to(output.dtype.element_ty), mask=more_rows & inside)


def partial_products(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles, interpreted: bool = False) -> Tensor:
    """(S, M, N): parts of `x` (M, K), interleaved, times the 8-bit `weight` (N, K) times `scale` (N,), all contiguous.
    In the dtype of `x` if S is 1, else in float32; outputs with fewer parts have any values in the others. Raises
    Triton's OutOfResources for `tiles` that do not fit on the GPU."""
    (m, k), n = x.shape, len(weight)
    parts, share = tiles.parts(n, k)
    output = torch.empty(parts, m, n, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    programs = triton.cdiv(triton.cdiv(n, tiles.outputs) * (k // GROUP), share)
    launch = launch_options(x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _product[programs, triton.cdiv(m, tiles.rows + tiles.more_rows)](
            *(x, weight.view(torch.int32), scale, output, m, n, k, share),
            FP8=weight.dtype == torch.float8_e4m3fn,
            OUTPUTS=tiles.outputs,
            ROWS=tiles.rows,
            MORE_ROWS=tiles.more_rows,
            INPUTS=GROUP,
            INTERPRETED=interpreted,
            DEPENDENT=bool(launch),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **launch,
        )
    return output


@triton.jit
def _convert(weight, output, COUNT, FP8: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(weight + i, mask=i < COUNT)
    four = tl.inline_asm_elementwise(FP8_FOUR if FP8 else INT8_FOUR, "=l,r", [word], tl.int64, is_pure=True, pack=1)
    tl.store(output + i, four, mask=i < COUNT)


def convert(weight: Tensor) -> Tensor:
    """An 8-bit `weight` (N, K) in bfloat16, without its scale. K is a multiple of 4."""
    output = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    count = weight.numel() // 4
    with torch.cuda.device_of(weight):
        _convert[(triton.cdiv(count, BLOCK),)](
            *(weight.view(torch.int32), output.view(torch.int64), count),
            FP8=weight.dtype == torch.float8_e4m3fn,
            BLOCK=BLOCK,
        )
    return output
