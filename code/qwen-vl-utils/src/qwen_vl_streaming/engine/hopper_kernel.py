"""The kernel for products of 3 to 288 rows with 8-bit weights on NVIDIA Hopper, in Gluon. Imported on a GPU only.

A program takes a whole processor. One of its warps loads weights and rows into shared memory, several groups of inputs
ahead. Each of its two or three warpgroups converts the weights of 64 outputs in registers, one of four parts at a time,
while tensor cores multiply the part before. The first weights are loaded while the previous kernel still runs.

    M rows   N outputs   K inputs   S parts of a sum over the inputs
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dependent_launch import launch_options
from .quantized_kernel import pair_of_byte
from .quantized_linear import GROUP, WARPGROUP_OUTPUTS, Tiles

INT8_PAIRS = gl.constexpr(tuple(pair_of_byte(torch.int8, byte) for byte in range(4)))
FP8_PAIRS = gl.constexpr(tuple(pair_of_byte(torch.float8_e4m3fn, byte) for byte in range(4)))
FIRST, SECOND, THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
THREAD_REGISTERS = {2: 240, 3: 160}
"""Of a thread that multiplies, by warpgroups. Triton gives the first of them what the others leave: 240, or 168."""
LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _load(
    weight,
    rows,
    more_rows,
    words,
    inputs,
    more_inputs,
    full,
    empty,
    first,
    last,
    groups,
    MORE_ROWS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Loads groups `first` to `last`. A stage is `full` when all its bytes have come, and `empty` when each warpgroup
    has multiplied it."""
    STAGES: gl.constexpr = inputs.shape[0]
    ROWS: gl.constexpr = inputs.shape[1]
    BYTES: gl.constexpr = 4 * words.numel // STAGES + 2 * (ROWS + MORE_ROWS) * inputs.shape[2]
    m = gl.program_id(1) * (ROWS + MORE_ROWS)
    ahead = gl.minimum(last - first, STAGES)
    for i in range(ahead):
        mbarrier.expect(full.index(i), BYTES)
        _load_weights(weight, words, full, first + i, groups, i, STAGES)
    if DEPENDENT:
        _wait_for_previous_kernel()
    for i in range(ahead):
        _load_rows(rows, more_rows, inputs, more_inputs, full, (first + i) % groups, m, i, MORE_ROWS)
    for i in range(STAGES, last - first):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(full.index(stage), BYTES)
        _load_weights(weight, words, full, first + i, groups, stage, STAGES)
        _load_rows(rows, more_rows, inputs, more_inputs, full, (first + i) % groups, m, stage, MORE_ROWS)


@gluon.jit
def _load_weights(weight, words, full, unit, groups, stage, STAGES: gl.constexpr):
    WARPGROUPS: gl.constexpr = words.shape[0] // STAGES
    n = unit // groups * WARPGROUPS * words.shape[1]
    k = unit % groups * words.shape[2]
    for w in gl.static_range(WARPGROUPS):
        target = words.index(stage * WARPGROUPS + w)
        tma.async_copy_global_to_shared(weight, [n + w * words.shape[1], k], full.index(stage), target)


@gluon.jit
def _load_rows(rows, more_rows, inputs, more_inputs, full, group, m, stage, MORE_ROWS: gl.constexpr):
    k = group * inputs.shape[2]
    tma.async_copy_global_to_shared(rows, [m, k], full.index(stage), inputs.index(stage))
    if MORE_ROWS:
        m += inputs.shape[1]
        tma.async_copy_global_to_shared(more_rows, [m, k], full.index(stage), more_inputs.index(stage))


@gluon.jit
def _wait_for_previous_kernel():
    """As Triton's `gdc_wait` and `gdc_launch_dependents`, which Gluon does not have."""
    code: gl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(code, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _multiply(
    scale,
    output,
    words,
    inputs,
    more_inputs,
    full,
    empty,
    first,
    last,
    groups,
    M,
    N,
    SHARE,
    WARPGROUP: gl.constexpr,
    MORE_ROWS: gl.constexpr,
    FP8: gl.constexpr,
):
    """Multiplies groups `first` to `last` of one warpgroup's outputs. The words of the next group are read while the
    last part of this one is multiplied. No operand is converted across groups: the assembler would wait for each
    multiplication."""
    STAGES: gl.constexpr = inputs.shape[0]
    ROWS: gl.constexpr = inputs.shape[1]
    WARPGROUPS: gl.constexpr = words.shape[0] // STAGES
    HEIGHT: gl.constexpr = words.shape[1]
    WORDS: gl.constexpr = words.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    MORE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE_ROWS or ROWS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    MORE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MORE_LAYOUT, 2)
    m = gl.program_id(1) * (ROWS + MORE_ROWS)
    mbarrier.wait(full.index(0), 0)
    word = words.index(WARPGROUP).load(OPERAND)
    i = 0
    for tile in range(first // groups, (last + groups - 1) // groups):
        total = gl.full((HEIGHT, ROWS), 0.0, gl.float32, LAYOUT)
        more_total = gl.full((HEIGHT, MORE_ROWS or 16), 0.0, gl.float32, MORE_LAYOUT)
        for _ in range(gl.maximum(first - tile * groups, 0), gl.minimum(last - tile * groups, groups)):
            stage = i % STAGES
            x = inputs.index(stage)
            more_x = more_inputs.index(stage)
            i += 1
            for byte in gl.static_range(4):
                value = gl.inline_asm_elementwise(
                    FP8_PAIRS[byte] if FP8 else INT8_PAIRS[byte],
                    "=r,r,r",
                    [word],
                    gl.bfloat16,
                    is_pure=True,
                    pack=2,
                )
                part = x.slice(byte * WORDS, WORDS, 1).permute((1, 0))
                total = warpgroup_mma(value, part, total, is_async=True)
                if MORE_ROWS:
                    value = gl.convert_layout(value, MORE_OPERAND, assert_trivial=True)
                    part = more_x.slice(byte * WORDS, WORDS, 1).permute((1, 0))
                    more_total = warpgroup_mma(value, part, more_total, is_async=True)
                if byte == 3:
                    mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1, pred=i < last - first)
                    word = words.index(i % STAGES * WARPGROUPS + WARPGROUP).load(OPERAND)
                if MORE_ROWS:
                    total, more_total = warpgroup_mma_wait(0 if byte == 3 else 2, [total, more_total])
                else:
                    total = warpgroup_mma_wait(0 if byte == 3 else 1, [total])
            mbarrier.arrive(empty.index(stage), count=1)
        s = gl.program_id(0) - tile * groups // SHARE  # programs before this one that have a part of the tile
        n = (tile * WARPGROUPS + WARPGROUP) * HEIGHT
        _store(total, scale, output, s, n, m, M, N, HEIGHT, ROWS, LAYOUT)
        if MORE_ROWS:
            _store(more_total, scale, output, s, n, m + ROWS, M, N, HEIGHT, MORE_ROWS, MORE_LAYOUT)


@gluon.jit
def _store(total, scale, output, s, n, m, M, N, HEIGHT: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    outputs = n + gl.arange(0, HEIGHT, gl.SliceLayout(1, LAYOUT))
    rows = m + gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    factor = gl.load(scale + outputs, mask=outputs < N, other=0.0)
    target = output + (s * M + rows).to(gl.int64)[None, :] * N + outputs[:, None]
    inside = (outputs < N)[:, None] & (rows < M)[None, :]
    gl.store(target, (total * factor[:, None]).to(output.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["M", "SHARE"])
def _product(
    weight,
    rows,
    more_rows,
    scale,
    output,
    M,
    N,
    K,
    SHARE,
    ROWS: gl.constexpr,
    MORE_ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    HEIGHT: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    FP8: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    groups = K // GROUP
    first = gl.program_id(0) * SHARE
    last = gl.minimum(first + SHARE, (N + HEIGHT * WARPGROUPS - 1) // (HEIGHT * WARPGROUPS) * groups)
    words = gl.allocate_shared_memory(gl.int32, [STAGES * WARPGROUPS, HEIGHT, GROUP // 4], weight.layout)
    inputs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, GROUP], rows.layout)
    if MORE_ROWS:
        more_inputs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, MORE_ROWS, GROUP], more_rows.layout)
    else:
        more_inputs = inputs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    # Arguments are written out, because constants become tensors in a variable.
    # fmt: off
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_multiply, (scale, output, words, inputs, more_inputs, full, empty, first, last, groups,
                         M, N, SHARE, FIRST, MORE_ROWS, FP8)),
            (_multiply, (scale, output, words, inputs, more_inputs, full, empty, first, last, groups,
                         M, N, SHARE, SECOND, MORE_ROWS, FP8)),
            (_load, (weight, rows, more_rows, words, inputs, more_inputs, full, empty, first, last, groups,
                     MORE_ROWS, DEPENDENT)),
        ], [4, 1], [REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([
            (_multiply, (scale, output, words, inputs, more_inputs, full, empty, first, last, groups,
                         M, N, SHARE, FIRST, MORE_ROWS, FP8)),
            (_multiply, (scale, output, words, inputs, more_inputs, full, empty, first, last, groups,
                         M, N, SHARE, SECOND, MORE_ROWS, FP8)),
            (_multiply, (scale, output, words, inputs, more_inputs, full, empty, first, last, groups,
                         M, N, SHARE, THIRD, MORE_ROWS, FP8)),
            (_load, (weight, rows, more_rows, words, inputs, more_inputs, full, empty, first, last, groups,
                     MORE_ROWS, DEPENDENT)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, LOADER_REGISTERS])
    # fmt: on


@functools.cache
def _layout(rows: int, inputs: int, kind: gl.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, inputs], kind)


def _blocks(x: Tensor, rows: int, inputs: int, kind: gl.dtype) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, inputs], _layout(rows, inputs, kind))


def partial_products(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles) -> Tensor:
    """As `quantized_kernel.partial_products`, for `tiles` with warpgroups. `x` and `weight` begin at multiples of 16
    bytes, as all tensors do that are no views."""
    (m, k), n = x.shape, len(weight)
    parts, share = tiles.parts(n, k)
    output = torch.empty(parts, m, n, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    programs = triton.cdiv(triton.cdiv(n, tiles.outputs) * (k // GROUP), share)
    rows = _blocks(x, tiles.rows, GROUP, gl.bfloat16)
    launch = launch_options(x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _product[programs, triton.cdiv(m, tiles.rows + tiles.more_rows)](
            _blocks(weight.view(torch.int32), WARPGROUP_OUTPUTS, GROUP // 4, gl.int32),
            rows,
            _blocks(x, tiles.more_rows, GROUP, gl.bfloat16) if tiles.more_rows else rows,
            *(scale, output, m, n, k, share),
            ROWS=tiles.rows,
            MORE_ROWS=tiles.more_rows,
            GROUP=GROUP,
            HEIGHT=WARPGROUP_OUTPUTS,
            WARPGROUPS=tiles.warpgroups,
            STAGES=tiles.stages,
            REGISTERS=THREAD_REGISTERS[tiles.warpgroups],
            FP8=weight.dtype == torch.float8_e4m3fn,
            DEPENDENT=bool(launch),
            num_warps=4,
            **launch,
        )
    return output
