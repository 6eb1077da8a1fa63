"""What a live stream asks of a step, and what it gets back: see `step_runner.py`."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..timeline.timeline import Layout
from .device_event import DeviceEvent
from .kv_cache import BlockTable
from .stream_state import DueRows


@dataclass(frozen=True)
class BatchSlot:
    """A live stream's slot of the batch, with the blocks of its two runs."""

    index: int
    layout: Layout
    visual: BlockTable
    text: BlockTable

    def cache_index(self, due: DueRows) -> np.ndarray:
        """Indices into the cache's tokens of the rows of `due`."""
        index, text = due.run_index.copy(), due.text
        for run, flags in ((self.visual, ~text), (self.text, text)):
            if flags.any():
                index[flags] = run.cache_index(index[flags])
        return index

    def visual_index(self, due: DueRows) -> Tensor:
        """Indices into the cache's tokens of the visual rows of `due`."""
        return torch.from_numpy(self.visual.cache_index(due.run_index[due.visual]))


@dataclass(frozen=True)
class StepRequest:
    """What one stream feeds in a step, and whether it chooses a token."""

    batch_slot: BatchSlot
    decode: DueRows
    """One text row, or none."""
    prefill: DueRows
    """Rows of either run, which fill one chunk after another: at most `StepRunner.clip_chunks` of them."""
    sample: bool
    """Choose the next token from the hidden state of the row in `decode`; if there is none, of the last row in
    `prefill`; if there is none either, of the last row that was fed before."""
    next_row: int = 0
    """Index of that token in the text run."""

    def chunks(self, chunk_size: int) -> int:
        """How many chunks the rows in `prefill` take."""
        return -(-len(self.prefill) // chunk_size)


@dataclass(frozen=True)
class PendingToken:
    """The tokens that a step chose, while they are copied to the host."""

    ids: Tensor
    """(S,)"""
    ready: DeviceEvent

    def get(self, batch_slot: BatchSlot) -> int:
        """The token id of `batch_slot`. Blocks until the copy has completed."""
        return self._copied[batch_slot.index]

    @functools.cached_property
    def _copied(self) -> list[int]:
        self.ready.synchronize()
        return self.ids.tolist()
