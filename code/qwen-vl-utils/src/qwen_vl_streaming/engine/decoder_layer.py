"""A decoder layer over pages: the arithmetic of the stock layer with its products side by side.

Writing is bound by how fast weights are read, and by how many kernels a layer takes. One product gives query, key and
value, one gate and up; the stock layer's weights become views of the joined ones, so nothing is held twice and the
model saves as before. `tests/test_batch.py` compares with the stock layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from .paged_attention import PagedAttention, PrefillAttention
from .ragged_attention import RaggedAttention

ONE_ROW = {"coordinate_descent_tuning": True}
"""The compiler's options for products with one row."""


@dataclass
class FusedProjections:
    """The weights of one decoder layer."""

    norm_in: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    norm_mid: Tensor
    gate_up: Tensor
    down: Tensor
    heads: tuple[int, int]
    """Query heads, key heads."""
    size: int
    """D, the size of a head."""
    eps: float
    act: nn.Module

    @classmethod
    def of(cls, layer: nn.Module) -> "FusedProjections":
        """Join the weights of a stock layer."""
        attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        size = attention.head_dim
        return cls(
            norm.weight,
            _join([part.weight for part in parts]),
            _join([part.bias for part in parts]),
            attention.o_proj.weight,
            layer.post_attention_layernorm.weight,
            _join([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight,
            (len(parts[0].weight) // size, len(parts[1].weight) // size),
            size,
            norm.variance_epsilon,
            mlp.act_fn,
        )


def _join(parts: list[nn.Parameter]) -> Tensor:
    """The parts below each other in one storage, of which they become views. A second call finds them so."""
    first, length = parts[0].data, sum(len(part) for part in parts)
    whole = first.as_strided((length, *first.shape[1:]), first.stride()) if _side_by_side(parts) else None
    if whole is None:
        whole = torch.cat([part.data for part in parts])
        for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = piece
    return whole


def _side_by_side(parts: list[nn.Parameter]) -> bool:
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end:
            return False
        end += part.numel()
    return True


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As stock: the mean square in float32."""
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def run_layer(
    joined: FusedProjections,
    hidden: Tensor,
    view: PagedAttention | RaggedAttention | PrefillAttention,
    rotary,
    pool: Tensor,
) -> Tensor:
    """One layer over `hidden` (n, Q, C), with cosine and sine `rotary` of its positions and its `pool` of keys and
    values; returns (n, Q, C)."""
    return _down(joined, *_up(joined, hidden, _mix(joined, hidden, view, rotary, pool)))


def _mix(
    joined: FusedProjections,
    hidden: Tensor,
    view: PagedAttention | RaggedAttention | PrefillAttention,
    rotary,
    pool: Tensor,
) -> Tensor:
    """What attention makes of `hidden`, (n, Q, heads x D)."""
    heads, key_heads = joined.heads
    n, many, _ = hidden.shape
    qkv = nn.functional.linear(rms_norm(hidden, joined.norm_in, joined.eps), joined.qkv) + joined.qkv_bias
    qkv = qkv.view(n, many, -1, joined.size).transpose(1, 2)
    query, fresh = qkv.split([heads, 2 * key_heads], 1)
    query, turned = apply_rotary_pos_emb(query, fresh, *rotary)
    is_key = torch.arange(2 * key_heads, device=qkv.device)[:, None, None] < key_heads
    fresh = turned.where(is_key, fresh).unflatten(1, (2, key_heads))
    mixed = view.attend(query, fresh, pool, joined.size**-0.5)
    return mixed.transpose(1, 2).reshape(n, many, -1)


def _up(joined: FusedProjections, hidden: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """The sum after attention, (n, Q, C), and what enters the last product, (n, Q, channels)."""
    hidden = hidden + nn.functional.linear(mixed, joined.out)
    gate, up = nn.functional.linear(rms_norm(hidden, joined.norm_mid, joined.eps), joined.gate_up).chunk(2, -1)
    return hidden, joined.act(gate) * up


def _down(joined: FusedProjections, hidden: Tensor, wide: Tensor) -> Tensor:
    return hidden + nn.functional.linear(wide, joined.down)


def compiled_for_one_row():
    """`run_layer`, compiled for one row, in three. There the compiler's own product reads weights faster than the
    library's, if it may try how; but it computes what enters a product anew for each number that comes out, which
    attention and a long input are too much for."""
    mix, up, down = (torch.compile(part, dynamic=False, options=ONE_ROW) for part in (_mix, _up, _down))

    def layer(joined: FusedProjections, hidden: Tensor, *rest) -> Tensor:
        return down(joined, *up(joined, hidden, mix(joined, hidden, *rest)))

    return layer
