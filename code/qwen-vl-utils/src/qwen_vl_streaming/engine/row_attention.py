"""The Triton kernels for the attention of one row over the paged KV cache, in place of FlexAttention's, of which two
take twice as long. Needs Triton.

As in `split_kv.py`, each program attends to the blocks of one split for one key head, and a second kernel combines the
splits. Both start early: see `dependent_launch.py`.

    D head size
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
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET
from .paged_attention import PagedAttention


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _attend(
    query,
    cache,
    stride,
    head_stride,
    blocks,
    counts,
    starts,
    slot,
    seen_visual,
    seen_text,
    window_start,
    kept,
    slots,
    output,
    lse,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TEXT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, head = tl.program_id(0), tl.program_id(1)
    g, d, t = tl.arange(0, ROWS), tl.arange(0, SIZE), tl.arange(0, BLOCK)
    own = (g < GROUPS)[:, None]
    q = tl.load(query + (head * GROUPS + g)[:, None] * SIZE + d[None, :], mask=own, other=0.0)
    visual_end, text_end = tl.load(seen_visual), tl.load(seen_text)
    if window_start is not None:
        visual_start, text_start, of = tl.load(window_start), tl.load(window_start + 1), tl.load(slot)
        visual_kept, text_kept = tl.load(kept + of), tl.load(kept + slots + of)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    mixed = tl.full((ROWS, SIZE), 0.0, tl.float32)
    for i in range(tl.load(counts + split)):
        block = tl.load(blocks + split * WIDTH + i).to(tl.int64)
        place = cache + head * head_stride + block * (BLOCK * SIZE)
        key = tl.load(place + t[None, :] * SIZE + d[:, None])
        value = tl.load(place + stride + t[:, None] * SIZE + d[None, :])
        visual = tl.load(starts + block) + t  # as `PagedAttention._visible`
        text = visual - TEXT
        in_visual, in_text = (visual >= 0) & (visual < visual_end), (text >= 0) & (text < text_end)
        if window_start is not None:
            in_visual = in_visual & ((visual >= visual_start) | (visual < visual_kept))
            in_text = in_text & ((text >= text_start) | (text < text_kept))
        score = tl.dot(q, key, input_precision="ieee") * SCALE
        score = tl.where((in_visual | in_text)[None, :], score, float("-inf"))
        before, top = top, tl.maximum(top, tl.reduce(score, 1, _larger))
        base = tl.where(top == float("-inf"), 0.0, top)
        weight, shrink = tl.exp(score - base[:, None]), tl.exp(before - base)
        total = total * shrink + tl.reduce(weight, 1, _plus)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    row = (split * tl.num_programs(1) + head) * GROUPS + g
    tl.store(output + row[:, None] * SIZE + d[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=own)
    tl.store(lse + row, tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-30)), float("-inf")), mask=g < GROUPS)


@triton.jit
def _combine(
    output,
    lse,
    attended,
    SPLITS: tl.constexpr,
    POWER: tl.constexpr,
    SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, d = tl.arange(0, POWER), tl.arange(0, SIZE)
    row = split * tl.num_programs(0) + tl.program_id(0)
    own = tl.load(lse + row, mask=split < SPLITS, other=float("-inf"))
    top = tl.reduce(own, 0, _larger)
    weight = tl.exp(own - tl.where(top == float("-inf"), 0.0, top))
    weight = weight / tl.maximum(tl.reduce(weight, 0, _plus), 1e-30)
    mixed = tl.load(output + row[:, None] * SIZE + d[None, :], mask=(split < SPLITS)[:, None], other=0.0)
    c = tl.program_id(0) * SIZE + d
    target = c // 128 * 128 + c % 4 * 32 + c % 128 // 4  # as the next product reads it
    tl.store(attended + target, tl.reduce(mixed * weight[:, None], 0, _plus).to(attended.dtype.element_ty))


def attend_row(attention: PagedAttention, query: Tensor, layer_cache: Tensor) -> Tensor:
    """The attention output of `query` (1, heads, 1, D), over a layer's keys and values (2, key heads, tokens, D), in
    the order of `quantized_linear.interleave`, (1, heads x D). `attention` is that of a single row, with FlexAttention.
    D is a power of two from 16."""
    (_, heads, _, size), cache, splits = query.shape, attention.cache, attention.splits
    launch = launch_options(query.device)
    output = query.new_empty(splits, heads, size, dtype=torch.float32)
    lse, attended = output.new_empty(splits, heads), query.new_empty(1, heads * size)
    with torch.cuda.device_of(query):
        _attend[(splits, heads // attention.groups)](
            *(query, layer_cache, *layer_cache.stride()[:2], attention.kv_indices, attention.num_kv_blocks),
            *(cache.block_start, attention.batch_slots, attention.seen_visual, attention.seen_text),
            *(attention.window_start, cache.kept_tokens, cache.kept_tokens.shape[1], output, lse),
            SCALE=size**-0.5,
            WIDTH=attention.kv_indices.shape[-1],
            GROUPS=attention.groups,
            ROWS=max(16, triton.next_power_of_2(attention.groups)),
            SIZE=size,
            BLOCK=BLOCK_SIZE,
            TEXT=TEXT_OFFSET,
            DEPENDENT=bool(launch),
            num_warps=4,
            **launch,
        )
        _combine[(heads,)](
            *(output, lse, attended),
            SPLITS=splits,
            POWER=triton.next_power_of_2(splits),
            SIZE=size,
            DEPENDENT=bool(launch),
            num_warps=4,
            **launch,
        )
    return attended
