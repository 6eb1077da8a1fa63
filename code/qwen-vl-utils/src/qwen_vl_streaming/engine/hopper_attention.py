"""The kernel for attention of prefill chunks over the paged KV cache, for NVIDIA Hopper, in Gluon. Imported on a GPU
only. It visits the blocks that a FlexAttention mask would list, and computes the mask only in those that are partial.

A program takes a whole processor and 128 queries of a key head. One of its warps loads keys and values. Each of its two
warpgroups has 64 queries: while tensor cores multiply the values of one block, it computes the exponentials of the
next, as FlashAttention-3 does.

    n slots in a step   Q queries of each   H heads   F = Q x heads of a key head   S splits of the keys
    B query blocks   D head size
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

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

from ..model.window_kernel import LOG2_E
from .dependent_launch import launch_options
from .hopper_kernel import FIRST, LOADER_REGISTERS, SECOND, THREAD_REGISTERS, _blocks, _wait_for_previous_kernel
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET

REGISTERS = gl.constexpr(THREAD_REGISTERS[2])
HEIGHT, PLACES = 64, 4
"""Queries of a warpgroup; and places in the ring, each for the keys or the values of one block. Six were not faster."""


@gluon.jit
def _load(
    query,
    cache,
    lists,
    shared,
    TOKENS,
    ROWS: gl.constexpr,
    HEADS: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Loads the queries, and in turn the keys and the values of each partial and then of each full block. A place in
    the ring is `full` when all its bytes have come, and `empty` when both warpgroups have multiplied it."""
    partial_blocks, full_blocks, partial, count = lists
    queries, ring, full, empty = shared
    PLACES: gl.constexpr = ring.shape[0]
    HEIGHT: gl.constexpr = queries.shape[1]
    BYTES: gl.constexpr = 2 * ring.shape[1] * ring.shape[2]
    head = gl.program_id(1)
    if count > 0:
        mbarrier.expect(full.index(0), BYTES + 2 * queries.shape[0] * HEIGHT * ring.shape[2])
        own = (gl.program_id(2) // SPLITS * HEADS + head) * ROWS + gl.program_id(0) * 2 * HEIGHT
        for w in gl.static_range(2):
            tma.async_copy_global_to_shared(query, [own + w * HEIGHT, 0], full.index(0), queries.index(w))
    for i in range(2 * count):
        entry = gl.where(i // 2 < partial, partial_blocks + i // 2, full_blocks + i // 2 - partial)
        row = (i % 2 * HEADS + head) * TOKENS + gl.load(entry).to(gl.int32) * ring.shape[1]
        place = i % PLACES
        mbarrier.wait(empty.index(place), (i // PLACES - 1) & 1, pred=i >= PLACES)
        mbarrier.expect(full.index(place), BYTES, pred=i > 0)
        tma.async_copy_global_to_shared(cache, [row, 0], full.index(place), ring.index(place))


@gluon.jit
def _mask(score, start, limits, kept, OFFSET: gl.constexpr, WINDOWED: gl.constexpr, LAYOUT: gl.constexpr):
    """`score`, but -inf where a query may not attend to a key of the block that begins at `start`. `limits` has what
    each query has seen of the visual and the text run, and where the window starts in both."""
    is_text = start >= OFFSET
    first = gl.where(is_text, start - OFFSET, start).to(gl.int32)
    index = (first + gl.arange(0, score.shape[1], gl.SliceLayout(0, LAYOUT)))[None, :]
    visible = index < gl.where(is_text, limits[1], limits[0])[:, None]
    if WINDOWED:
        begin = gl.where(is_text, limits[3], limits[2])[:, None]
        visible = visible & ((index >= begin) | (index < gl.where(is_text, kept[1], kept[0])))
    return gl.where(visible, score, float("-inf"))


@gluon.jit
def _softmax(score, largest, weights, SCALE):
    """Returns the exponentials of `score` relative to the new largest, that largest, the new sum, and the factor for
    what was relative to the old largest. SCALE is positive."""
    new = gl.maximum(largest, gl.max(score, 1) * SCALE)
    share = gl.exp2(score * SCALE - new[:, None])
    factor = gl.exp2(largest - new)
    return share, new, weights * factor + gl.sum(share, 1), factor


@gluon.jit
def _attend(
    lists,
    seen,
    slots,
    output,
    lse,
    shared,
    SCALE,
    WARPGROUP: gl.constexpr,
    Q: gl.constexpr,
    GROUPS: gl.constexpr,
    HEADS: gl.constexpr,
    SPLITS: gl.constexpr,
    OFFSET: gl.constexpr,
    WINDOWED: gl.constexpr,
):
    """The attention of one warpgroup's queries."""
    seen_visual, seen_text, window_start = seen
    batch_slots, kept_tokens, block_start, SLOTS = slots
    partial_blocks, _, partial, count = lists
    queries, ring, full, empty = shared
    PLACES: gl.constexpr = ring.shape[0]
    HEIGHT: gl.constexpr = queries.shape[1]
    BLOCK: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    gl.static_assert(BLOCK == D, "scores and outputs have one layout")
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    kind: gl.constexpr = output.dtype.element_ty
    chunk = gl.program_id(2) // SPLITS
    row = (gl.program_id(0) * 2 + WARPGROUP) * HEIGHT + gl.arange(0, HEIGHT, OF_ROWS)
    inside = row < Q * GROUPS
    of_row = chunk * Q + row // GROUPS
    limits = (
        gl.load(seen_visual + of_row, mask=inside, other=0).to(gl.int32),
        gl.load(seen_text + of_row, mask=inside, other=0).to(gl.int32),
    )
    kept = ()
    if WINDOWED:
        slot, width = gl.load(batch_slots + chunk), gl.num_programs(2) // SPLITS * Q
        limits += (
            gl.load(window_start + of_row, mask=inside, other=0).to(gl.int32),
            gl.load(window_start + width + of_row, mask=inside, other=0).to(gl.int32),
        )
        kept = gl.load(kept_tokens + slot).to(gl.int32), gl.load(kept_tokens + SLOTS + slot).to(gl.int32)
    start = gl.load(block_start + gl.load(partial_blocks, mask=partial > 0, other=0))
    zeros = gl.full((HEIGHT, BLOCK), 0.0, gl.float32, LAYOUT)
    total = gl.full((HEIGHT, D), 0.0, gl.float32, LAYOUT)
    largest = gl.full((HEIGHT,), -1e30, gl.float32, OF_ROWS)
    weights = gl.full((HEIGHT,), 0.0, gl.float32, OF_ROWS)
    query = queries.index(WARPGROUP)
    if count > 0:
        mbarrier.wait(full.index(0), 0)
        score = warpgroup_mma(query, ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, [score])
        mbarrier.arrive(empty.index(0), count=1)
        if partial > 0:
            masked = _mask(score, start, limits, kept, OFFSET, WINDOWED, LAYOUT)
            exact, largest, weights, factor = _softmax(masked, largest, weights, SCALE)
        else:
            exact, largest, weights, factor = _softmax(score, largest, weights, SCALE)
        share = gl.convert_layout(exact.to(kind), OPERAND, assert_trivial=True)
        for i in range(1, count):
            start = gl.load(block_start + gl.load(partial_blocks + i, mask=i < partial, other=0))  # ahead
            place = 2 * i % PLACES
            mbarrier.wait(full.index(place), 2 * i // PLACES & 1)
            score = warpgroup_mma(query, ring.index(place).permute((1, 0)), zeros, use_acc=False, is_async=True)
            before = (2 * i - 1) % PLACES
            mbarrier.wait(full.index(before), (2 * i - 1) // PLACES & 1)
            total = warpgroup_mma(share, ring.index(before), total, is_async=True)
            score, total = warpgroup_mma_wait(1, [score, total])
            mbarrier.arrive(empty.index(place), count=1)
            # With one softmax behind the branch, the assembler would compute it after the values are multiplied.
            if i < partial:
                masked = _mask(score, start, limits, kept, OFFSET, WINDOWED, LAYOUT)
                exact, largest, weights, factor = _softmax(masked, largest, weights, SCALE)
            else:
                exact, largest, weights, factor = _softmax(score, largest, weights, SCALE)
            total = warpgroup_mma_wait(0, [total])
            mbarrier.arrive(empty.index(before), count=1)
            total = total * factor[:, None]
            share = gl.convert_layout(exact.to(kind), OPERAND, assert_trivial=True)
        last = 2 * count - 1
        mbarrier.wait(full.index(last % PLACES), last // PLACES & 1)
        total = warpgroup_mma(share, ring.index(last % PLACES), total, is_async=True)
        total = warpgroup_mma_wait(0, [total])
    some = weights > 0
    weights = gl.where(some, weights, 1.0)
    own = ((gl.program_id(2) * Q + row // GROUPS) * HEADS + gl.program_id(1)) * GROUPS + row % GROUPS  # (n x S, Q, H)
    exponent = (largest + gl.log2(weights)) * 0.6931471805599453  # ln 2
    gl.store(lse + own, gl.where(some, exponent, float("-inf")), mask=inside)
    target = output + own[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(target, (total / weights[:, None]).to(kind), mask=inside[:, None])


@gluon.jit(do_not_specialize=["LISTS", "WIDTH"])
def _attend_chunks(
    query,
    cache,
    blocks,
    counts,
    seen_visual,
    seen_text,
    window_start,
    batch_slots,
    kept_tokens,
    block_start,
    output,
    lse,
    SCALE,
    LISTS,
    WIDTH,
    SLOTS,
    TOKENS,
    Q: gl.constexpr,
    GROUPS: gl.constexpr,
    HEADS: gl.constexpr,
    SPLITS: gl.constexpr,
    OFFSET: gl.constexpr,
    HEIGHT: gl.constexpr,
    BLOCK: gl.constexpr,
    D: gl.constexpr,
    PLACES: gl.constexpr,
    WINDOWED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """`blocks` (2, LISTS, WIDTH) has lists of partial and of full blocks, `counts` (2, LISTS) their lengths."""
    if DEPENDENT:
        _wait_for_previous_kernel()
    number = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    partial = gl.load(counts + number)
    count = partial + gl.load(counts + LISTS + number)
    lists = blocks + number * WIDTH, blocks + (LISTS + number) * WIDTH, partial, count
    kind: gl.constexpr = output.dtype.element_ty
    queries = gl.allocate_shared_memory(kind, [2, HEIGHT, D], query.layout)
    ring = gl.allocate_shared_memory(kind, [PLACES, BLOCK, D], cache.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=2)
    fence_async_shared()
    shared = queries, ring, full, empty
    seen, slots = (seen_visual, seen_text, window_start), (batch_slots, kept_tokens, block_start, SLOTS)
    # Constants are written out, because they become tensors in a variable.
    # fmt: off
    gl.warp_specialize([
        (_attend, (lists, seen, slots, output, lse, shared, SCALE, FIRST, Q, GROUPS, HEADS, SPLITS, OFFSET, WINDOWED)),
        (_attend, (lists, seen, slots, output, lse, shared, SCALE, SECOND, Q, GROUPS, HEADS, SPLITS, OFFSET, WINDOWED)),
        (_load, (query, cache, lists, shared, TOKENS, Q * GROUPS, HEADS, SPLITS)),
    ], [4, 1], [REGISTERS, LOADER_REGISTERS])
    # fmt: on


def attend_chunks(
    query: Tensor,
    cache: Tensor,
    blocks: Tensor,
    counts: Tensor,
    seen_visual: Tensor,
    seen_text: Tensor,
    window_start: Tensor | None,
    batch_slots: Tensor,
    kept_tokens: Tensor,
    block_start: Tensor,
    scale: float,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` (n, key heads, F, D) over each split of the keys of the layer's `cache` (2, key heads,
    tokens, D): the output (n x S, Q, H, D) and its log-sum-exp (n x S, Q, H) in float32, which is -inf for queries
    without a visible key. `blocks` (2, n x S, 1, B, ...) and `counts` (2, n x S, 1, B) list the partial and
    the full blocks of each query block; all others are as in `PagedAttention` and `PagedKVCache`. In bfloat16 or
    float16, with D 128 and fewer than 2^31 numbers in the output."""
    n, heads, rows, size = query.shape
    queries = seen_visual.shape[1]
    output = query.new_empty(n * splits, queries, heads * rows // queries, size)
    lse = torch.empty(output.shape[:-1], dtype=torch.float32, device=query.device)
    launch = launch_options(query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _attend_chunks[triton.cdiv(rows, 2 * HEIGHT), heads, n * splits](
            _blocks(query.view(-1, size), HEIGHT, size, gl.bfloat16),  # or float16, which is as wide
            _blocks(cache.view(-1, size), BLOCK_SIZE, size, gl.bfloat16),
            *(blocks, counts, seen_visual, seen_text, seen_visual if window_start is None else window_start),
            *(batch_slots, kept_tokens, block_start, output, lse),
            *(scale * LOG2_E, counts[0].numel(), blocks.shape[-1], kept_tokens.shape[1], cache.shape[2]),
            Q=queries,
            GROUPS=rows // queries,
            HEADS=heads,
            SPLITS=splits,
            OFFSET=TEXT_OFFSET,
            HEIGHT=HEIGHT,
            BLOCK=BLOCK_SIZE,
            D=size,
            PLACES=PLACES,
            WINDOWED=window_start is not None,
            DEPENDENT=bool(launch),
            num_warps=4,
            **launch,
        )
    return output, lse
