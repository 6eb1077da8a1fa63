"""Attention of prefill chunks by a kernel that needs Triton, for torch.compile. `chunk_kernel.py` has the kernel."""

import torch
from torch import Tensor

from ..model.vision_tower import HALF, HAS_TRITON
from .dependent_launch import HOPPER
from .kv_cache import PagedKVCache

SIZES = 64, 128
"""Head sizes that the kernel takes."""


def has_chunk_kernel(cache: PagedKVCache) -> bool:
    """Whether the kernel takes `cache`. It was measured on NVIDIA Hopper; other GPUs have FlexAttention."""
    device, size = cache.store.device, cache.store.shape[-1]
    if device.type != "cuda" or not HAS_TRITON or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return False
    return cache.store.dtype in HALF and size in SIZES


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
    from . import chunk_kernel  # Triton is only installed where PyTorch supports a GPU

    lists, seen = (blocks, counts), (seen_visual, seen_text, window_start)
    slots = batch_slots, kept_tokens, block_start
    return chunk_kernel.attend_chunks(query.contiguous(), cache, *lists, *seen, *slots, scale, splits)


@attend_chunks.register_fake
def _(query, cache, blocks, counts, seen_visual, *others):
    n, heads, rows, size = query.shape
    queries, splits = seen_visual.shape[1], others[-1]
    output = query.new_empty(n * splits, queries, heads * rows // queries, size)
    return output, torch.empty(output.shape[:-1], dtype=torch.float32, device=query.device)
