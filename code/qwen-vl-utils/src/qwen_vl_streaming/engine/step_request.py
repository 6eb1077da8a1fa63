"""What streams ask of a pass, and what they get of it: see `step_runner.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..timeline.timeline import Layout
from .device_event import DeviceEvent
from .kv_cache import PAGE, PagedKVCache
from .stream_state import DueRows


class BlockTable:
    """Where the tokens of one run of a stream lie. Past the end of its pages it turns back to the first that is not
    kept: what lay there must be out of sight by then."""

    def __init__(self, pages: PagedKVCache, mine: list[int], begin: int, kept: int):
        """`begin` as in `PagedKVCache.first`; `kept` counts the tokens at the beginning that stay."""
        self.pages, self.mine, self.begin = pages, torch.tensor(mine), begin
        self.kept = min(-(-kept // PAGE), len(mine) - 1)
        self.newest = len(mine) - 1

    def places(self, index: Tensor) -> Tensor:
        """Where in the pool the tokens `index` (L,) of the run lie."""
        page = index // PAGE
        for number in range(self.newest + 1, int(page.max()) + 1):
            self.newest = number
            self.pages.first[int(self.mine[self._turn(number)])].fill_(self.begin + number * PAGE)
        return self.mine[self._turn(page)] * PAGE + index % PAGE

    def _turn(self, page):
        turned = self.kept + (page - self.kept) % (len(self.mine) - self.kept)
        return torch.where(page < self.kept, page, turned) if isinstance(page, Tensor) else turned


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
