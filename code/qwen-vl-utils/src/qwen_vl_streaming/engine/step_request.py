"""What streams ask of a pass, and what they get of it: see `step_runner.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..timeline.timeline import Layout
from .device_event import DeviceEvent
from .kv_cache import BLOCK_SIZE, PagedKVCache
from .stream_state import DueRows


class BlockTable:
    """Where the tokens of one run of a stream lie. Past the end of its pages it turns back to the first that is not
    kept: what lay there must be out of sight by then."""

    def __init__(self, cache: PagedKVCache, blocks: list[int], offset: int, kept: int):
        """`offset` as in `PagedKVCache.block_start`; `kept` counts the tokens at the beginning that stay."""
        self.cache, self.blocks, self.offset = cache, torch.tensor(blocks), offset
        self.kept = min(-(-kept // BLOCK_SIZE), len(blocks) - 1)
        self.last_block = len(blocks) - 1

    def cache_index(self, index: Tensor) -> Tensor:
        """Where in the pool the tokens `index` (L,) of the run lie."""
        block = index // BLOCK_SIZE
        for number in range(self.last_block + 1, int(block.max()) + 1):
            self.last_block = number
            self.cache.block_start[int(self.blocks[self._wrap(number)])].fill_(self.offset + number * BLOCK_SIZE)
        return self.blocks[self._wrap(block)] * BLOCK_SIZE + index % BLOCK_SIZE

    def _wrap(self, block):
        wrapped = self.kept + (block - self.kept) % (len(self.blocks) - self.kept)
        return torch.where(block < self.kept, block, wrapped) if isinstance(block, Tensor) else wrapped


@dataclass(frozen=True)
class BatchSlot:
    """A stream's place in the passes."""

    index: int
    layout: Layout
    visual: BlockTable
    text: BlockTable


@dataclass(frozen=True)
class StepRequest:
    """What a stream wants of a pass."""

    batch_slot: BatchSlot
    decode: DueRows
    """One text row, or none."""
    prefill: DueRows
    """At most W rows of either run."""
    sample: bool
    """Choose the next word: from what came out for `word` or, where that has no row, for the last of `others` or, where
    there is none either, for the newest row before."""
    next_row: int = 0
    """Where in the text run that word will be."""


@dataclass(frozen=True)
class PendingToken:
    """The words of a pass, on their way to the host."""

    ids: Tensor
    """(S,)"""
    ready: DeviceEvent

    def get(self, batch_slot: BatchSlot) -> int:
        """The id that was chosen in `batch_slot`. Waits for it."""
        self.ready.synchronize()
        return int(self.ids[batch_slot.index])
