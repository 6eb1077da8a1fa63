"""Attention of prefill chunks by a kernel that needs Triton, for torch.compile. `chunk_kernel.py` has the kernel."""

import torch
from torch import Tensor

from ..model.vision_tower import HALF, HAS_TRITON
from .dependent_launch import HOPPER
from .kv_cache import PagedKVCache

SIZE = 128
"""The head size of all released models, with which the kernel was tested on a GPU."""


def is_hopper(device: torch.device) -> bool:
    """Whether `device` is of the only kind of GPU on which the kernel was measured."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == HOPPER


def has_chunk_kernel(cache: PagedKVCache) -> bool:
    """Whether the kernel takes `cache`; otherwise it is for FlexAttention."""
    kind, size = cache.store.dtype, cache.store.shape[-1]
    return HAS_TRITON and is_hopper(cache.store.device) and kind in HALF and size == SIZE


# Opaque to the compiler.
@torch.library.custom_op("qwen_vl_streaming::attend_chunks", mutates_args=())
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
    """As `chunk_kernel.attend_chunks`."""
    from . import chunk_kernel  # needs Triton

    lists, seen = (blocks, counts), (seen_visual, seen_text, window_start)
    slots = batch_slots, kept_tokens, block_start
    return chunk_kernel.attend_chunks(query.contiguous(), cache, *lists, *seen, *slots, scale, splits)


@attend_chunks.register_fake
def _(query, cache, blocks, counts, seen_visual, *others):
    n, heads, rows, size = query.shape
    queries, splits = seen_visual.shape[1], others[-1]
    output = query.new_empty(n * splits, queries, heads * rows // queries, size)
    return output, torch.empty(output.shape[:-1], dtype=torch.float32, device=query.device)
