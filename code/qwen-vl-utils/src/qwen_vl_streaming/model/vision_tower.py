"""The layers of the vision tower, faster than those of transformers and equal up to rounding, and a loop over its
blocks. The layers have no weights of their own: `modeling_qwen2_5_vl.py` gives the stock layers these classes. "Stock"
means the classes of transformers.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

from ..common.compiling import not_compiled


class VisionPatchEmbed(stock.Qwen2_5_VisionPatchEmbed):
    """The stock patch embedding, computed as a matrix product. This is equivalent because the stride of the convolution
    equals its kernel size, and 3D convolution kernels are several times slower."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (patches, pixels of a patch) to (patches, channels)."""
        weight = self.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))


ALIGNED = 8
"""Half-precision numbers in a 16-byte load of a GPU."""


class VisionMLP(stock.Qwen2_5_VLMLP):
    """The stock MLP, zero-padded to a multiple of ALIGNED channels.

    The vision tower has 3420 channels, so in half precision rows do not start at multiples of 16 bytes. Matrix products
    then take several times as long on a GPU. The padding contributes zero to the result.
    """

    wide: tuple[Tensor, Tensor, Tensor] | None = None
    """Cached result of `_widened`."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Maps (…, channels) to the same shape."""
        if not self._plain or self.intermediate_size % ALIGNED == 0:
            return super().forward(hidden_state)
        wide = None if torch.is_grad_enabled() else self.wide  # gradients cannot flow through the cache
        gate_up, bias, down = self._widened() if wide is None else wide
        gate, up = nn.functional.linear(hidden_state, gate_up, bias).chunk(2, -1)
        return nn.functional.linear(self.act_fn(gate) * up, down, self.down_proj.bias)

    @property
    def _plain(self) -> bool:
        """Whether no layer has been replaced, for example by an adapter."""
        return all(type(layer) is nn.Linear for layer in (self.gate_proj, self.up_proj, self.down_proj))

    def _widened(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the padded tensors: the weight and the bias of gate and up, each concatenated along the first
        dimension, and the weight of down."""
        more, pad = -self.intermediate_size % ALIGNED, nn.functional.pad
        parts = self.gate_proj, self.up_proj
        gate_up = torch.cat([pad(part.weight, (0, 0, 0, more)) for part in parts])
        return gate_up, torch.cat([pad(part.bias, (0, more)) for part in parts]), pad(self.down_proj.weight, (0, more))

    @torch.no_grad()
    def widen(self) -> None:
        """Pads the weights once, for a model that is not trained. The parameters become views of the padded tensors, so
        no weight is stored twice. Moving the module to another device or data type drops the padded tensors."""
        if self.wide is not None or not self._plain or self.intermediate_size % ALIGNED == 0:
            return
        gate_up, bias, down = self.wide = self._widened()
        size = self.intermediate_size
        for part, weight, offset in zip((self.gate_proj, self.up_proj), gate_up.chunk(2), bias.chunk(2), strict=True):
            part.weight.data, part.bias.data = weight[:size], offset[:size]
        self.down_proj.weight.data = down[:, :size]

    def _apply(self, *arguments, **options):
        self.wide = None
        return super()._apply(*arguments, **options)


HALF = torch.bfloat16, torch.float16
FLASH_CAPABILITY = (8, 0)
"""CUDA compute capability from which GPUs run FlashAttention, which `varlen_attn` is."""


def has_flash(device: torch.device) -> bool:
    """Whether `device` runs `varlen_attn`, in half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Triton is only installed where PyTorch supports a GPU."""
WINDOW = 64
"""The most patches of a window that the kernel takes: those of all released models."""


# Opaque to the compiler.
@torch.library.custom_op("qwen_vl_streaming::attend_in_windows", mutates_args=())
def attend_in_windows(qkv: Tensor, bounds: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    """As `window_kernel.attend_in_windows`."""
    from . import window_kernel  # needs Triton

    return window_kernel.attend_in_windows(qkv, bounds, cosine, sine, heads)


@attend_in_windows.register_fake
def _(qkv, bounds, cosine, sine, heads):
    return qkv.new_empty(len(qkv), qkv.shape[1] // 3)


class Segments:
    """The bounds of the segments that attention is restricted to: windows, or whole clips."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device):
        bounds = cu_seqlens.cpu()
        starts, lengths = bounds[:-1], bounds.diff()
        self.longest = int(lengths.max())
        self.flash = has_flash(device)
        """Whether one variable-length call can compute all segments, in half precision."""
        self.by_length = [
            (starts[lengths == length, None] + torch.arange(length)).to(device) for length in lengths.unique().tolist()
        ]
        """For each distinct length, the patch indices of the segments with that length, (segments, length)."""

    @staticmethod
    @not_compiled
    def of(cu_seqlens: Any) -> "Segments":
        # Cached on the tensor, which layers share: reading its values makes the host wait for the GPU.
        if not hasattr(cu_seqlens, "segments"):
            cu_seqlens.segments = Segments(cu_seqlens, cu_seqlens.device)
        return cu_seqlens.segments


class VisionAttention(stock.Qwen2_5_VLVisionAttention):
    """Stock vision attention without a loop over segments.

    With SDPA, the stock tower calls attention once for every window of every clip. On an Ampere or newer GPU in half
    precision, this class computes all segments in one variable-length call, and windows, if no gradients are needed, by
    a kernel that also rotates. Otherwise it makes one call for each distinct segment length, of which there are few.
    The results are equal up to rounding.
    """

    def forward(self, hidden_states, cu_seqlens, position_embeddings: Any = None, max_seqlen: Any = None, **kwargs):
        """Maps `hidden_states` (patches, channels) to the same shape. `cu_seqlens` has the bounds of the segments.
        `max_seqlen` is the length of the longest, where `has_flash` and in half precision. Without it, a block compiles
        into several graphs, and the host waits for the GPU unless the segments are cached."""
        patches, qkv = hidden_states.shape[0], self.qkv(hidden_states)
        in_windows = max_seqlen is not None and max_seqlen <= WINDOW
        if in_windows and HAS_TRITON and qkv.is_cuda and not qkv.requires_grad:
            return self.proj(attend_in_windows(qkv, cu_seqlens, *position_embeddings, self.num_heads))
        query, key, value = qkv.reshape(patches, 3, self.num_heads, -1).unbind(1)
        query, key = stock.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        segments = Segments.of(cu_seqlens) if max_seqlen is None else None
        mixed: Tensor
        if segments is None or (segments.flash and value.dtype in HALF):
            longest: Any = max_seqlen if segments is None else segments.longest
            bounds = (cu_seqlens, cu_seqlens, longest, longest)
            mixed = varlen_attn(  # pyright: ignore[reportAssignmentType]  # a tuple only with `return_aux`
                query, key, value.contiguous(), *bounds, scale=self.scaling
            )
        else:
            mixed = torch.empty_like(value)
            for index in segments.by_length:
                # (segments, length, heads, head size) -> (segments, heads, length, head size), as SDPA expects
                q, k, v = (tensor[index].transpose(1, 2) for tensor in (query, key, value))
                mixed[index] = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2)
        return self.proj(mixed.reshape(patches, -1))


def run_block(
    block: Any, hidden: Tensor, added: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Runs a block of the tower over `hidden` + `added`, and returns two tensors whose sum is its output. The compiler
    fuses that sum with the norm at the start of the next block."""
    hidden = hidden + added
    normed = block.norm1(hidden)
    hidden = hidden + block.attn(normed, cu_seqlens, max_seqlen=max_seqlen, position_embeddings=rotary)
    return hidden, block.mlp(block.norm2(hidden))


@functools.cache
def compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    """`run_block`, compiled. Not an attribute of a model, which could then not be saved as a whole."""
    return torch.compile(run_block)


def run_tower(visual: Any, pixels: Tensor, layout: dict[str, Any], run: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """The visual tokens (N, C) of `pixels` (patches, pixels of a patch), as the stock tower computes them. `layout` has
    the arguments of its layers, and `run` is `run_block` or a compiled version of it."""
    layout = layout if "order" in layout else ordered_layout(visual, layout)
    hidden = visual.patch_embed(pixels)[layout["order"]]
    added = torch.zeros_like(hidden)
    for i, block in enumerate(visual.blocks):
        kind = "" if i in visual.fullatt_block_indexes else "window_"
        bounds, longest = layout[f"cu_{kind}seqlens"], layout.get(f"max_{kind}seqlen")
        hidden, added = run(block, hidden, added, bounds, longest, layout["rotary"])
    return visual.merger(hidden + added)[layout["reverse"]]


def ordered_layout(visual: Any, layout: dict[str, Any]) -> dict[str, Any]:
    """Adds to `layout` what the stock tower computes from it in each pass: the `order` of the patches, which
    is that of the windows, the `reverse` order of visual tokens, and the cosine and the sine of the `rotary` angles in
    that order, (patches, head size)."""
    windows, unit = layout["window_index"], visual.spatial_merge_unit
    order = (windows[:, None] * unit + torch.arange(unit, device=windows.device)).flatten()
    cosine, sine = visual.rotary_pos_emb(layout["position_ids"], layout["position_ids"])
    return {**layout, "order": order, "reverse": windows.argsort(), "rotary": (cosine[order], sine[order])}
