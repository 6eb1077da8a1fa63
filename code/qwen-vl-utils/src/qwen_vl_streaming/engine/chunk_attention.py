"""Attention of prefill chunks by the kernel for NVIDIA Hopper in `hopper_attention.py`, for torch.compile."""

import torch
from torch import Tensor

from ..model.vision_tower import HALF
from .hopper import hopper_processors
from .kv_cache import PagedKVCache

SIZE = 128
"""The head size of all released models, with which the kernel was tested on a GPU."""


def has_chunk_kernel(cache: PagedKVCache) -> bool:
    """Whether the kernel takes `cache`; otherwise it is for FlexAttention."""
    store = cache.store
    return store.dtype in HALF and store.shape[-1] == SIZE and hopper_processors(store.device) > 0


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
    """As `hopper_attention.attend_chunks`."""
    from . import hopper_attention  # needs Triton

    lists, seen = (blocks, counts), (seen_visual, seen_text, window_start)
    slots = batch_slots, kept_tokens, block_start
    return hopper_attention.attend_chunks(query.contiguous(), cache, *lists, *seen, *slots, scale, splits)


@attend_chunks.register_fake
def _(query, cache, blocks, counts, seen_visual, *others):
    n, heads, rows, size = query.shape
    queries, splits = seen_visual.shape[1], others[-1]
    output = query.new_empty(n * splits, queries, heads * rows // queries, size)
    return output, torch.empty(output.shape[:-1], dtype=torch.float32, device=query.device)
