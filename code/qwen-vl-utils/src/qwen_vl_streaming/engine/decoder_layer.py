"""A decoder layer over the paged KV cache: the arithmetic of the stock layer with fused projections.

Decoding is bound by how fast weights are read and by the number of kernels per layer. One product computes query, key
and value, and one computes gate and up. `single_row.py` runs the same layer over one row, in fewer kernels. The stock
layer's weights become views of the fused ones, so no weight is stored twice and the model saves as before.
`tests/test_batch.py` compares the result with the stock layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, apply_rotary_pos_emb

from ..common.errors import InputError
from ..model.quantization import QuantizedLinear
from .paged_attention import MixedAttention, PagedAttention, PrefillAttention
from .quantized_linear import GROUP, gated_mlp, is_silu, product
from .ragged_attention import RaggedAttention
from .rms_norm import product_and_norm, rms_norm

Attention = PagedAttention | MixedAttention | RaggedAttention | PrefillAttention


@dataclass
class FusedProjections:
    """The weights of one decoder layer."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    output: Tensor
    post_attention_norm: Tensor
    gate_up: Tensor
    down: Tensor
    heads: tuple[int, int]
    """Query heads, key heads."""
    size: int
    """D, the head size."""
    eps: float
    act: nn.Module
    qkv_scale: Tensor | None = None
    """If the weights are quantized, the scales of their outputs, as in `quantization.QuantizedLinear`."""
    output_scale: Tensor | None = None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @classmethod
    def from_layer(cls, layer: Qwen2_5_VLDecoderLayer) -> "FusedProjections":
        """Fuses the weights of a stock layer. Raises InputError if its linear layers have been replaced, for example
        by an adapter, whose part would be missing from the products."""
        attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        linear = *parts, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if {type(part) for part in linear} not in ({nn.Linear}, {QuantizedLinear}):
            odd = next((part for part in linear if type(part) is not nn.Linear), linear[0])
            raise InputError(
                f"a layer of the language model has a {type(odd).__module__}.{type(odd).__name__}: merge adapters into "
                "the model, and give one that is not quantized but by `quantization.quantize_model`"
            )
        size, scales = attention.head_dim, {}
        if isinstance(mlp.down_proj, QuantizedLinear):
            scales = {
                "qkv_scale": _fuse_scales(parts),
                "output_scale": attention.o_proj.scale,
                "gate_up_scale": _fuse_scales([mlp.gate_proj, mlp.up_proj]),
                "down_scale": mlp.down_proj.scale,
            }
        return cls(
            norm.weight,
            _fuse([part.weight for part in parts]),
            _fuse([part.bias for part in parts]),
            attention.o_proj.weight,
            layer.post_attention_layernorm.weight,
            _fuse([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight,
            (len(parts[0].weight) // size, len(parts[1].weight) // size),
            size,
            norm.variance_epsilon,
            mlp.act_fn,
            **scales,
        )

    def takes_single_row(self) -> bool:
        """Whether the kernels of `single_row.py` take weights of these sizes, as all released models have them."""
        inputs = self.qkv.shape[1], self.output.shape[1], self.down.shape[1]
        return is_silu(self.act) and all(size % GROUP == 0 for size in inputs)


def _fuse(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates `parts` along their first dimension and makes them views of the result. A second call returns the
    storage that the first one made."""
    first, length = parts[0].data, sum(len(part) for part in parts)
    if _is_fused(parts):
        return first.as_strided((length, *first.shape[1:]), first.stride())
    fused = torch.cat([part.data for part in parts])
    for part, view in zip(parts, fused.split([len(part) for part in parts]), strict=True):
        part.data = view
    return fused


def _fuse_scales(parts: Sequence[Any]) -> Tensor:
    """As `_fuse`, for the scales of quantized layers."""
    return _fuse([part.scale for part in parts])


def _is_fused(parts: Sequence[Tensor]) -> bool:
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end:
            return False
        end += part.numel()
    return True


def run_layer(weights: FusedProjections, hidden: Tensor, attention: Attention, rotary, layer_cache: Tensor) -> Tensor:
    """Runs one layer over `hidden` (n, Q, C). `rotary` are the cosine and sine of its positions and `layer_cache` the
    layer's keys and values. Returns (n, Q, C)."""
    heads, key_heads = weights.heads
    n, queries, _ = hidden.shape
    normed = rms_norm(hidden, weights.input_norm, weights.eps)
    qkv = product(normed, weights.qkv, weights.qkv_scale) + weights.qkv_bias
    qkv = qkv.view(n, queries, -1, weights.size).transpose(1, 2)
    query, new_kv = qkv.split([heads, 2 * key_heads], 1)
    query, rotated = apply_rotary_pos_emb(query, new_kv, *rotary)
    is_key = torch.arange(2 * key_heads, device=qkv.device)[:, None, None] < key_heads
    new_kv = rotated.where(is_key, new_kv).unflatten(1, (2, key_heads))
    attended = attention.forward(query, new_kv, layer_cache, weights.size**-0.5)
    attended = attended.transpose(1, 2).reshape(n, queries, -1)
    hidden, normed, interleaved = product_and_norm(
        attended, weights.output, weights.output_scale, hidden, weights.post_attention_norm, weights.eps
    )
    up, down = (weights.gate_up, weights.gate_up_scale), (weights.down, weights.down_scale)
    return gated_mlp(normed, *up, weights.act, *down, hidden, interleaved)
