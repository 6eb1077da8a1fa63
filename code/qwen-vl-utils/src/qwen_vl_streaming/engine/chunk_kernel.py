"""The Triton kernel for attention of prefill chunks over the paged KV cache. Imported on a GPU only.

It visits the blocks that a FlexAttention mask would list, and computes the mask only in those that are partial.
`paged_attention.py` says what queries may attend to.

    n slots in a step   Q queries of each   H heads   F = Q x heads of a key head   S splits of the keys
    B query blocks   D head size
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..model.window_kernel import LOG2_E, _larger, _plus
from .dependent_launch import launch_options
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET

QUERIES, KEYS, WARPS, STAGES = 64, 64, 4, 2
"""Queries of a program, at most BLOCK_SIZE, keys that it reads at once, its warps, and how far ahead it reads: the
fastest for chunks of 91 tokens on an H200."""


@triton.jit
def _visit(
    state,
    query,
    keys,
    values,
    blocks,
    count,
    limits,
    kept,
    block_start,
    SCALE,
    OFFSET: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attends to `count` of the cache's `blocks`. `limits` has what each query has seen of the visual and the text run,
    and where the window starts in both."""
    total, largest, weights = state
    parts: tl.constexpr = BLOCK // KEYS
    n, d = tl.arange(0, KEYS), tl.arange(0, D)
    for i in range(0, count * parts):
        block = tl.load(blocks + i // parts).to(tl.int64)
        place = block * BLOCK + i % parts * KEYS + n
        score = tl.dot(query, tl.load(keys + place[None, :] * D + d[:, None])) * SCALE
        if MASKED:
            start = tl.load(block_start + block)
            is_text = start >= OFFSET
            index = (tl.where(is_text, start - OFFSET, start) + i % parts * KEYS).to(tl.int32) + n[None, :]
            visible = index < tl.where(is_text, limits[1], limits[0])[:, None]
            if WINDOWED:
                begin = tl.where(is_text, limits[3], limits[2])[:, None]
                visible = visible & ((index >= begin) | (index < tl.where(is_text, kept[1], kept[0])))
            score = tl.where(visible, score, -2e30)  # less than any `largest`, so that its share is 0
        new = tl.maximum(largest, tl.reduce(score, 1, _larger))
        share, factor = tl.exp2(score - new[:, None]), tl.exp2(largest - new)
        weights = weights * factor + tl.reduce(share, 1, _plus)
        value = tl.load(values + place[:, None] * D + d[None, :])
        total = tl.dot(share.to(value.dtype), value, total * factor[:, None])
        largest = new
    return total, largest, weights


@triton.jit(do_not_specialize=["LISTS", "WIDTH"])
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
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    OFFSET: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`blocks` (2, LISTS, WIDTH) has lists of partial and of full blocks, `counts` (2, LISTS) their lengths."""
    rows: tl.constexpr = Q * GROUPS
    query_blocks: tl.constexpr = (rows + BLOCK - 1) // BLOCK
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(2) // SPLITS
    row, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    inside = row < rows
    of_row = chunk * Q + row // GROUPS
    limits = (
        tl.load(seen_visual + of_row, mask=inside, other=0).to(tl.int32),
        tl.load(seen_text + of_row, mask=inside, other=0).to(tl.int32),
    )
    kept = ()
    if WINDOWED:
        slot, width = tl.load(batch_slots + chunk), tl.num_programs(2) // SPLITS * Q
        limits += (
            tl.load(window_start + of_row, mask=inside, other=0).to(tl.int32),
            tl.load(window_start + width + of_row, mask=inside, other=0).to(tl.int32),
        )
        kept = tl.load(kept_tokens + slot).to(tl.int32), tl.load(kept_tokens + SLOTS + slot).to(tl.int32)
    head = tl.program_id(1)
    own = (chunk * HEADS + head) * rows
    queries = tl.load(query + (own + row)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    keys = cache + head.to(tl.int64) * TOKENS * D
    values = keys + HEADS * TOKENS.to(tl.int64) * D
    state = (
        tl.full((QUERIES, D), 0.0, tl.float32),
        tl.full((QUERIES,), -1e30, tl.float32),
        tl.full((QUERIES,), 0.0, tl.float32),
    )
    number = tl.program_id(2) * query_blocks + tl.program_id(0) * QUERIES // BLOCK
    for kind in tl.static_range(2):
        state = _visit(
            *(state, queries, keys, values),
            *(blocks + (kind * LISTS + number) * WIDTH, tl.load(counts + kind * LISTS + number)),
            *(limits, kept, block_start, SCALE, OFFSET, KEYS, BLOCK, D, kind == 0, WINDOWED),
        )
    total, largest, weights = state
    own = ((tl.program_id(2) * Q + row // GROUPS) * HEADS + head) * GROUPS + row % GROUPS  # (n x S, Q, H)
    some = weights > 0
    total = total / tl.where(some, weights, 1.0)[:, None]
    tl.store(output + own[:, None] * D + d[None, :], total.to(output.dtype.element_ty), mask=inside[:, None])
    exponent = (largest + tl.log2(tl.where(some, weights, 1.0))) * 0.6931471805599453  # ln 2
    tl.store(lse + own, tl.where(some, exponent, float("-inf")), mask=inside)


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
    the full blocks of each query block; all others are as in `PagedAttention` and `PagedKVCache`."""
    n, heads, rows, size = query.shape
    queries = seen_visual.shape[1]
    output = query.new_empty(n * splits, queries, heads * rows // queries, size)
    lse = torch.empty(output.shape[:-1], dtype=torch.float32, device=query.device)
    launch = launch_options(query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _attend_chunks[triton.cdiv(rows, QUERIES), heads, n * splits](
            *(
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
            ),
            *(output, lse, scale * LOG2_E, counts[0].numel(), blocks.shape[-1], kept_tokens.shape[1], cache.shape[2]),
            Q=queries,
            GROUPS=rows // queries,
            HEADS=heads,
            SPLITS=splits,
            OFFSET=TEXT_OFFSET,
            QUERIES=QUERIES,
            KEYS=KEYS,
            BLOCK=BLOCK_SIZE,
            D=size,
            WINDOWED=window_start is not None,
            DEPENDENT=bool(launch),
            num_warps=WARPS,
            num_stages=STAGES,
            **launch,
        )
    return output, lse
