"""Passes that feed some seats text rows and the clips that come after them. Knows nothing of when.

On a GPU a number of rows that comes again is recorded as a CUDA graph where they are few: with those the host is slower
than the device.

    R rows of the pass   C hidden size
"""

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from .mark import OTHERS_MAY_GO_ON, put
from .packed import BLOCK, Packed
from .pages import PAGE, Pages
from .seated import Seated

NUMBERS = 10  # of each row, see Extension.blank
RECORD_AT = 3
"""The time of asking at which a number of rows is recorded: before it is compiled, and may be rare."""
RECORD_TO = 1024
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
    """The least of 2^k and three halves of it that is not less: FlexAttention is compiled for each number of blocks,
    and a block of nothing costs it little."""
    power = 1 << (blocks - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= blocks else power


class Extension:
    """Passes of so many `blocks` or fewer: what they read lies in tensors of their own, which are filled before."""

    def __init__(self, engine, blocks: int):
        """`engine` is an `engine.Engine`; `blocks` as in `packed.py`."""
        device, width = engine.device, engine.language.config.hidden_size
        self.engine, self.view = engine, Packed(engine.pages, blocks, engine.groups, engine.flex)
        room = filled_up(blocks * BLOCK // engine.groups)
        self.numbers = self.blank(room).to(device)
        self.clips = torch.zeros(room, width, dtype=engine.model.dtype, device=device)
        """The visual tokens, at the rows that are made of them."""
        self.times: collections.Counter[int] = collections.Counter()
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """By R: what is replayed, and what comes out of it."""

    @staticmethod
    def blank(rows: int) -> Tensor:
        """Numbers for rows that write to nobody's page and see nothing, (NUMBERS, R): position (3), token of the seat's
        pages (-1: none), how much of either run is seen (2), id, text row whose id is taken instead (-1: none), whether
        `clips` is, seat."""
        numbers = torch.zeros(NUMBERS, rows, dtype=torch.long)
        numbers[3] = numbers[7] = -1
        return numbers

    def fill(
        self,
        rows: int,
        seats: Sequence[int],
        streams: Sequence[Seated],
        spans: Sequence[tuple[range, range]],
        visual_tokens: Sequence[Tensor],
    ) -> None:
        """Have the next `run` feed `seats` the `spans` of their text and then of their visual runs, at most `rows` in
        all. `visual_tokens` holds, for each, a tensor of (N, tokens of a clip, C)."""
        numbers, first = self.blank(rows), 0
        for seat, stream, (text, visual), tokens in zip(seats, streams, spans, visual_tokens, strict=True):
            plan, begin = stream.plan, first
            for run, span, page in ((plan.text, text, Pages.text_page_of(len(plan.visual))), (plan.visual, visual, 0)):
                own, mine = slice(span.start, span.stop), numbers[:, first : first + len(span)]
                mine[:3], mine[3] = run.positions[:, own], torch.arange(span.start, span.stop) + page * PAGE
                mine[4], mine[5] = run.seen_visual[own], run.seen_text[own]
                first += len(span)
            middle = begin + len(text)
            numbers[6, middle:first] = stream.visual_ids(visual)
            numbers[7, begin:middle] = torch.arange(text.start, text.stop)
            clip, made = stream.clips_of(visual, tokens)
            own = slice(middle + clip.start, middle + clip.stop)
            numbers[8, own], numbers[9, begin:first] = 1, seat
            self.clips[own] = made
        self.numbers[:, :rows] = put(numbers, self.engine.device)
        self.view.lay_out(seats, [len(text) + len(visual) for text, visual in spans])

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
        *positions, token, seen_visual, seen_text, ids, text, clip, seats = self.numbers[:, :rows]
        places = engine.pages.places(seats, token.clamp(min=0)[:, None])[:, 0].where(token >= 0, 0)
        self.view.put(places, seen_visual, seen_text)
        ids = engine.ids[seats, text.clamp(min=0)].where(text >= 0, ids)
        hidden = self.clips[:rows].where((clip > 0)[:, None], engine.language.embed_tokens(ids))
        return engine.forward(hidden[None], torch.stack(positions)[:, None], self.view, engine.layer)[0]
