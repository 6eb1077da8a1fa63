"""Passes that feed some seats text rows, and some the clips that come after them. Knows nothing of when.

On a GPU a number of rows that comes again is recorded as a CUDA graph where they are few: with those the host is slower
than the device.

    R rows of the pass   C hidden size
"""

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from .device_event import OTHERS_MAY_GO_ON, put
from .ragged_attention import QUERY_BLOCK, RaggedAttention
from .sequence import ROW_FIELDS, PlannedSequence

RECORD_AT = 3
"""The time of asking at which a number of rows is recorded: before it is compiled, and may be rare."""
RECORD_TO = 2048
"""Rows with which the device is slower than the host anyway, so that no more of them are recorded."""
GRAPHS = 32
"""Recorded passes that are kept."""
ROUND = 16
"""Rows are filled up by at most a part of so many, and few rows to a multiple of so many: a number that comes again is
recorded."""


def filled_up(rows: int) -> int:
    """The next of the numbers of rows that are fed."""
    part = max(ROUND, (1 << rows.bit_length()) // (2 * ROUND))
    return -(-rows // part) * part


def room_for(blocks: int) -> int:
    """The least power of two that is not less: FlexAttention is compiled for each number of blocks, and a block of
    nothing costs it little."""
    return 1 << (blocks - 1).bit_length()


class Prefill:
    """Passes of so many `blocks` or fewer: what they read lies in tensors of their own, which are filled before."""

    def __init__(self, engine, blocks: int):
        """`engine` is an `runner.Runner`; `blocks` as in `ragged_attention.py`."""
        device, width = engine.device, engine.language.config.hidden_size
        self.engine, self.view = engine, RaggedAttention(engine.cache, blocks, engine.groups, engine.flex)
        room = filled_up(blocks * QUERY_BLOCK // engine.groups)
        self.numbers = self.blank(room).to(device)
        self.clips = torch.zeros(room, width, dtype=engine.model.dtype, device=device)
        """The visual tokens, at the rows that are made of them."""
        self.times: collections.Counter[int] = collections.Counter()
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """By R: what is replayed, and what comes out of it."""

    @staticmethod
    def blank(rows: int) -> Tensor:
        """ROW_FIELDS and the seat for rows that write to nobody's page and see nothing, (ROW_FIELDS + 1, R)."""
        numbers = torch.zeros(ROW_FIELDS + 1, rows, dtype=torch.long)
        numbers[3] = numbers[7] = -1
        return numbers

    def fill(
        self,
        rows: int,
        batch_slots: Sequence[int],
        streams: Sequence[PlannedSequence],
        spans: Sequence[tuple[range, range]],
        visual_tokens: Sequence[Tensor],
    ) -> None:
        """Have the next `run` feed `batch_slots` the `spans` of their text and then of their visual runs, at most
        `rows` in all. `visual_tokens` holds, for each, a tensor of (N, tokens of a clip, C)."""
        parts, counts, first = [], [], 0
        for stream, (text, visual), tokens in zip(streams, spans, visual_tokens, strict=True):
            parts.append(stream.text_numbers[:, text.start : text.stop])
            if visual:
                parts.append(stream.visual_numbers[:, visual.start : visual.stop])
                own, made = stream.clips_of(visual, tokens)
                self.clips[first + len(text) :][own] = made
            counts.append(len(text) + len(visual))
            first += counts[-1]
        numbers = self.blank(rows)
        numbers[:-1, :first] = torch.cat(parts, 1)
        numbers[-1, :first] = torch.tensor(batch_slots).repeat_interleave(torch.tensor(counts))
        self.numbers[:, :rows] = put(numbers, self.engine.device)
        self.view.lay_out(batch_slots, counts)

    @torch.no_grad()
    def run(self, rows: int) -> Tensor:
        """What comes out of the `rows` that were filled in, (R, C), to be read before another pass runs."""
        self.times[rows] += 1
        worth = self.engine.fast and rows <= RECORD_TO and self.times[rows] >= RECORD_AT
        if worth and rows not in self.recorded:
            if len(self.recorded) == GRAPHS:
                self.recorded.pop(next(iter(self.recorded)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.engine.pool, capture_error_mode=OTHERS_MAY_GO_ON):
                hidden = self._pass(rows)
            self.recorded[rows] = graph, hidden
        if rows not in self.recorded:
            return self._pass(rows)
        graph, hidden = self.recorded[rows]
        graph.replay()
        return hidden

    def _pass(self, rows: int) -> Tensor:
        engine = self.engine
        *positions, token, seen_visual, seen_text, ids, text, clip, batch_slots = self.numbers[:, :rows]
        places = engine.cache.cache_index(batch_slots, token.clamp(min=0)[:, None])[:, 0].where(token >= 0, 0)
        self.view.place(places, seen_visual, seen_text)
        ids = engine.ids[batch_slots, text.clamp(min=0)].where(text >= 0, ids)
        hidden = self.clips[:rows].where((clip > 0)[:, None], engine.language.embed_tokens(ids))
        return engine.forward(hidden[None], torch.stack(positions)[:, None], self.view, engine.layer)[0]
