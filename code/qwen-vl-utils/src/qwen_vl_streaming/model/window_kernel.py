"""The Triton kernel for attention within windows of the vision tower. Imported on a GPU only; `vision_tower.py` says
when it is used.

A program has one head of a whole window, and also rotates it.

    M patches   H heads   D head size
"""

# Triton's declarations do not fit kernels and how they are launched.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .vision_tower import WINDOW

LOG2_E = 1.4426950408889634


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _rotate(x, used, cos, sin, HALF: tl.constexpr):
    """The two halves of what is at `x`, rotated."""
    first, second = tl.load(x, mask=used, other=0.0), tl.load(x + HALF, mask=used, other=0.0)
    low, high = first.to(tl.float32), second.to(tl.float32)
    return (low * cos - high * sin).to(first.dtype), (high * cos + low * sin).to(first.dtype)


@triton.jit
def _attend_in_windows(
    qkv,
    bounds,
    cosine,
    sine,
    output,
    SCALE,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PATCHES: tl.constexpr,
    POWER: tl.constexpr,
):
    width: tl.constexpr = HEADS * SIZE
    half: tl.constexpr = SIZE // 2
    begin = tl.load(bounds + tl.program_id(0))
    length = tl.load(bounds + tl.program_id(0) + 1) - begin
    begin = begin.to(tl.int64)  # all patches together may have more than 2^31 numbers
    head = qkv + begin * (3 * width) + tl.program_id(1) * SIZE
    m = tl.arange(0, PATCHES)[:, None]
    d = tl.arange(0, POWER)[None, :]
    used = (m < length) & (d < half)
    cos = tl.load(cosine + begin * SIZE + m * SIZE + d, mask=used, other=0.0)
    sin = tl.load(sine + begin * SIZE + m * SIZE + d, mask=used, other=0.0)
    low, high = _rotate(head + m * (3 * width) + d, used, cos, sin, half)
    key_low, key_high = _rotate(head + width + m * (3 * width) + d, used, cos, sin, half)
    d = tl.arange(0, 2 * POWER)[None, :]
    used = (m < length) & (d < SIZE)
    value = tl.load(head + 2 * width + m * (3 * width) + d, mask=used, other=0.0)
    score = tl.dot(high, tl.trans(key_high), tl.dot(low, tl.trans(key_low))) * SCALE
    score = tl.where(tl.arange(0, PATCHES)[None, :] < length, score, float("-inf"))
    share = tl.exp2(score - tl.reduce(score, 1, _larger)[:, None])
    total = tl.dot(share.to(value.dtype), value) / tl.reduce(share, 1, _plus)[:, None]
    target = output + begin * width + tl.program_id(1) * SIZE + m * width + d
    tl.store(target, total.to(output.dtype.element_ty), mask=used)


def attend_in_windows(qkv: Tensor, bounds: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    """The attention (M, H D) of `qkv` (M, 3 H D), contiguous, in windows of at most WINDOW with these `bounds`
    (windows + 1,). Queries and keys are rotated by the angles with these `cosine` and `sine`, (M, D) in float32, whose
    two halves are equal."""
    size = qkv.shape[1] // (3 * heads)
    output = qkv.new_empty(len(qkv), heads * size)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        _attend_in_windows[len(bounds) - 1, heads](
            *(qkv, bounds, cosine, sine, output, size**-0.5 * LOG2_E),
            HEADS=heads,
            SIZE=size,
            PATCHES=WINDOW,
            POWER=max(triton.next_power_of_2(size // 2), 16),
            num_warps=4,
        )
    return output
