"""Steps of the offline runner that feed text rows to some streams and chunks of clips to others. Knows nothing about
when a clip is due.

On a GPU, steps with few rows are bound by the host. Row counts that recur are therefore captured as CUDA graphs.

    R rows of the step   C hidden size
"""

import collections
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda_graph import capture
from .device_event import to_device
from .ragged_attention import QUERY_BLOCK, RaggedAttention
from .sequence import ROW_FIELDS, PlannedSequence

CAPTURE_AFTER = 3
"""The use of a row count at which it is captured. Before that it is being compiled, and may be rare."""
MAX_CAPTURE_ROWS = 2048
"""Steps with more rows are bound by the device and are not captured."""
MAX_GRAPHS = 32
"""Captured graphs that are kept per Prefill."""
ROW_MULTIPLE = 16
"""Row counts are padded so that they recur: few rows to a multiple of this, many by at most a sixteenth."""


def padded_rows(rows: int) -> int:
    """The row count to which `rows` rows are padded."""
    multiple = max(ROW_MULTIPLE, (1 << rows.bit_length()) // (2 * ROW_MULTIPLE))
    return -(-rows // multiple) * multiple


def padded_query_blocks(query_blocks: int) -> int:
    """The next power of two. FlexAttention compiles for each number of query blocks, and an empty one costs little."""
    return 1 << (query_blocks - 1).bit_length()


class Prefill:
    """Steps of up to `query_blocks` query blocks, whose inputs are tensors that `fill` overwrites."""

    def __init__(self, runner, query_blocks: int):
        """`runner` is a `runner.Runner`; `query_blocks` as in `ragged_attention.py`."""
        device, width = runner.device, runner.language.config.hidden_size
        self.runner = runner
        self.attention = RaggedAttention(runner.cache, query_blocks, runner.groups, runner.flex)
        capacity = padded_rows(query_blocks * QUERY_BLOCK // runner.groups)
        self.inputs = self.padding(capacity).to(device)
        self.clip_features = torch.zeros(capacity, width, dtype=runner.model.dtype, device=device)
        """The features of the clip rows, at the rows' own indices."""
        self.uses: collections.Counter[int] = collections.Counter()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """By R: the graph and its output."""

    @staticmethod
    def padding(rows: int) -> Tensor:
        """ROW_FIELDS and batch slot of rows that write to block 0 and attend to nothing, (ROW_FIELDS + 1, R)."""
        inputs = torch.zeros(ROW_FIELDS + 1, rows, dtype=torch.long)
        inputs[3] = inputs[7] = -1
        return inputs

    def fill(
        self,
        rows: int,
        batch_slots: Sequence[int],
        sequences: Sequence[PlannedSequence],
        spans: Sequence[tuple[range, range]],
        visual_tokens: Sequence[Tensor],
    ) -> None:
        """Sets the inputs of the next `run`: for each of `batch_slots`, the `spans` of its text and then of its visual
        run, at most `rows` rows in all. `visual_tokens` holds a tensor (N, tokens of a clip, C) for each."""
        parts, counts, first = [], [], 0
        for sequence, (text, visual), tokens in zip(sequences, spans, visual_tokens, strict=True):
            parts.append(sequence.text_inputs[:, text.start : text.stop])
            if visual:
                parts.append(sequence.visual_inputs[:, visual.start : visual.stop])
                clip_rows, features = sequence.clip_rows(visual, tokens)
                self.clip_features[first + len(text) :][clip_rows] = features
            counts.append(len(text) + len(visual))
            first += counts[-1]
        inputs = self.padding(rows)
        inputs[:-1, :first] = torch.cat(parts, 1)
        inputs[-1, :first] = torch.tensor(batch_slots).repeat_interleave(torch.tensor(counts))
        self.inputs[:, :rows] = to_device(inputs, self.runner.device)
        self.attention.set_rows(batch_slots, counts)

    @torch.no_grad()
    def run(self, rows: int) -> Tensor:
        """Hidden states of the `rows` that were filled in, (R, C). The next step may overwrite them."""
        self.uses[rows] += 1
        recurs = self.runner.on_cuda and rows <= MAX_CAPTURE_ROWS and self.uses[rows] >= CAPTURE_AFTER
        if recurs and rows not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            work = functools.partial(self._forward, rows)
            self.graphs[rows] = capture(work, self.runner.capture_stream, self.runner.graph_pool, runs=0)
        if rows not in self.graphs:
            return self._forward(rows)
        graph, hidden = self.graphs[rows]
        graph.replay()
        return hidden

    def _forward(self, rows: int) -> Tensor:
        runner = self.runner
        *positions, token, seen_visual, seen_text, ids, text, clip, batch_slots = self.inputs[:, :rows]
        cache_index = runner.cache.cache_index(batch_slots, token.clamp(min=0)[:, None])[:, 0].where(token >= 0, 0)
        self.attention.update(cache_index, seen_visual, seen_text)
        ids = runner.text_ids[batch_slots, text.clamp(min=0)].where(text >= 0, ids)
        hidden = self.clip_features[:rows].where((clip > 0)[:, None], runner.language.embed_tokens(ids))
        return runner.forward(hidden[None], torch.stack(positions)[:, None], self.attention, runner.layer)[0]
