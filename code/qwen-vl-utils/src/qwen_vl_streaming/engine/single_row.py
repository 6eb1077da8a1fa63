"""Decoder layers for a step of one row, in six kernels each. Such a step takes as long as its weights take to be read.
The compiler makes eleven kernels of a layer, and between two of them the GPU reads nothing. Needs Triton.

A kernel leaves its outputs as the next one reads them: the product before a norm also multiplies by the norm's weight
and adds up squares, and the product after it divides by their root mean; the product of query, key and value rotates
queries and keys, and writes the cache. `tests/test_gpu.py` compares the result with `decoder_layer.run_layer`.

    C hidden size   D head size   N outputs of a product
"""

# As in `few_rows_kernel.py`.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.compiling import CompileOptions
from .decoder_layer import FusedProjections
from .few_rows_kernel import Scaled, _sums, few_rows_product, prepare
from .paged_attention import MixedAttention, PagedAttention
from .quantized_linear import interleave
from .split_kv import combine_splits


@triton.jit
def _rotated(
    x,
    weight,
    scale,
    squares,
    bias,
    cosine,
    sine,
    place,
    query,
    cache,
    stride,
    head_stride,
    N,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
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
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = n // 2 // HALF * (2 * HALF) + n // 2 % HALF + n % 2 * HALF  # the two that are rotated together
    sums = _sums(
        x, weight, scale, squares, row, n < N, N, K, M, OUTPUTS, WORDS, COUNT, KIND, PARTS, POWER, EPS, DEPENDENT
    )
    kind: tl.constexpr = query.dtype.element_ty
    total = sums[0].to(kind).to(tl.float32) + tl.load(bias + row, mask=n < N, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(total.to(kind).to(tl.float32), (OUTPUTS // 2, 2)))
    pair = tl.program_id(0) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
    head, d, inside = pair // HALF, pair % HALF, pair < N // 2
    rotary = inside & (head < HEADS + KEY_HEADS)  # values are not rotated
    cos0 = tl.load(cosine + d, mask=rotary, other=1.0).to(tl.float32)
    cos1 = tl.load(cosine + d + HALF, mask=rotary, other=1.0).to(tl.float32)
    sin0 = tl.load(sine + d, mask=rotary, other=0.0).to(tl.float32)
    sin1 = tl.load(sine + d + HALF, mask=rotary, other=0.0).to(tl.float32)
    low, high = (first * cos0 - second * sin0).to(kind), (second * cos1 + first * sin1).to(kind)
    target = query + head * (2 * HALF) + d
    tl.store(target, low, mask=head < HEADS)
    tl.store(target + HALF, high, mask=head < HEADS)
    kv_head = (head - HEADS).to(tl.int64)  # of the keys, then of the values
    target = cache + kv_head // KEY_HEADS * stride + kv_head % KEY_HEADS * head_stride + tl.load(place) * (2 * HALF) + d
    tl.store(target, low, mask=inside & (head >= HEADS))
    tl.store(target + HALF, high, mask=inside & (head >= HEADS))


def rotated_query(
    weights: FusedProjections, x: Scaled, rotary: tuple[Tensor, Tensor], place: Tensor, cache: Tensor
) -> Tensor:
    """The query (1, heads, 1, D) of the row `x`, whose key and value are written at `place` (1,) of the layer's `cache`
    (2, key heads, tokens, D). `rotary` are the cosine and sine of its position, (1, 1, D)."""
    values, programs, arguments, options = prepare(x, weights.qkv, weights.qkv_scale)
    (heads, key_heads), size = weights.heads, weights.size
    query = values.new_empty(1, heads, 1, size)
    with torch.cuda.device_of(values):
        _rotated[(programs,)](
            *(*arguments, weights.qkv_bias, *rotary, place, query, cache, *cache.stride()[:2], len(weights.qkv)),
            HALF=size // 2,
            HEADS=heads,
            KEY_HEADS=key_heads,
            **options,
        )
    return query


def attend(attention: PagedAttention, query: Tensor, cache: Tensor) -> Tensor:
    """The attention output (1, heads x D), interleaved, of a `query` (1, heads, 1, D)."""
    output, lse = attention.attend_splits(query, cache, query.shape[-1] ** -0.5)
    # Before the splits are combined, so that one kernel does both.
    lse = None if lse is None else interleave(lse.flatten(1))
    return combine_splits(interleave(output.flatten(1)), lse, attention.splits)


def scaled(hidden: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the squares of `hidden` (1, C), as in `Scaled`."""
    return interleave(hidden * norm), hidden.float().pow(2).sum(-1, keepdim=True)


class SingleRow:
    """The layers of a model for one row. What is not a product is compiled with `options`."""

    def __init__(self, layers: Sequence[FusedProjections], options: CompileOptions):
        self.layers = layers
        self._attend = torch.compile(attend, dynamic=False, options=options)
        self._scaled = torch.compile(scaled, dynamic=False, options=options)

    def run(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], attention: Any, caches: Sequence[Tensor]) -> Tensor:
        """As `decoder_layer.run_layer` in turn, for `hidden` (1, 1, C)."""
        part = attention.parts[0] if isinstance(attention, MixedAttention) else attention
        row, eps, (cosine, sine) = hidden[0], self.layers[0].eps, rotary
        rotary = cosine.contiguous(), sine.contiguous()
        x = Scaled(*self._scaled(row, self.layers[0].input_norm), eps)
        norms = [*(weights.input_norm for weights in self.layers[1:]), None]
        for weights, cache, norm in zip(self.layers, caches, norms, strict=True):
            query = rotated_query(weights, x, rotary, part.cache_index, cache)
            attended = self._attend(part, query, cache)
            row, x = few_rows_product(
                attended, weights.output, weights.output_scale, row, norm=weights.post_attention_norm, eps=eps
            )
            gated = few_rows_product(x, weights.gate_up, weights.gate_up_scale, gated=True)
            found = few_rows_product(gated, weights.down, weights.down_scale, row, norm=norm, eps=eps)
            row, x = found if norm is not None else (found, x)
        return row[None]
