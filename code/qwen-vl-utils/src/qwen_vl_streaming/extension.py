"""A pass of one shape that feeds some seats text rows and the clips that come after them. Knows nothing of when.

On a GPU a shape that comes again is recorded as a CUDA graph: for few seats the host is slower than the device.

    n seats in a pass   Q rows of each   C hidden size
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .mark import OTHERS_MAY_GO_ON, put
from .pages import PAGE, Pages
from .seated import Seated
from .views import View, tuned

NUMBERS = 9  # of each row, see Extension.blank
RECORD_AT = 3
"""The time of asking at which a shape is recorded: before it is compiled, and may be rare."""


class Extension:
    """What such a pass reads lies in its own tensors, which are filled before it runs."""

    def __init__(self, engine, n: int, rows: int):
        """`engine` is an `engine.Engine`, `rows` is Q."""
        pages, device = engine.pages, engine.device
        self.engine, self.times, self.graph = engine, 0, None
        self.numbers = self.blank(n, rows).to(device)
        self.seats = torch.zeros(n, dtype=torch.long, device=device)
        self.clips = torch.zeros(n, rows, engine.language.config.hidden_size, dtype=engine.model.dtype, device=device)
        """The visual tokens, at the rows that are made of them."""
        self.hidden: Tensor | None = None
        """What came out of the recorded pass."""
        empty = torch.zeros(n, rows, dtype=torch.long, device=device)
        self.view = View(
            pages,
            self.seats,
            empty,
            empty + 1,
            empty.clone(),
            engine.groups,
            engine.flex,
            apart=engine.fast,
            **tuned(pages, n, rows, engine.groups, engine.options),
        )

    @staticmethod
    def blank(n: int, rows: int) -> Tensor:
        """Numbers for rows that write to nobody's page and see the first token, (NUMBERS, n, Q): position (3), token of
        the seat's pages (-1: none), how much of either run is seen (2), id, text row whose id is taken instead (-1:
        none), whether `clips` is."""
        numbers = torch.zeros(NUMBERS, n, rows, dtype=torch.long)
        numbers[3], numbers[4], numbers[7] = -1, 1, -1
        return numbers

    def fill(
        self,
        seats: Sequence[int],
        streams: Sequence[Seated],
        spans: Sequence[tuple[range, range]],
        visual_tokens: Sequence[Tensor],
    ) -> None:
        """Have the next `run` feed up to n `seats` the `spans` of their text and then of their visual runs, which have
        at most Q rows. `visual_tokens` holds, for each, a tensor of (N, tokens of a clip, C)."""
        n, rows = self.clips.shape[:2]
        numbers = self.blank(n, rows)
        for i, (stream, (text, visual), tokens) in enumerate(zip(streams, spans, visual_tokens, strict=True)):
            plan, first = stream.plan, 0
            begin = Pages.text_page_of(len(plan.visual)) * PAGE
            for run, span, start in ((plan.text, text, begin), (plan.visual, visual, 0)):
                own, mine = slice(span.start, span.stop), numbers[:, i, first : first + len(span)]
                mine[:3], mine[3] = run.positions[:, own], torch.arange(span.start, span.stop) + start
                mine[4], mine[5] = run.seen_visual[own], run.seen_text[own]
                first += len(span)
            numbers[7, i, : len(text)] = torch.arange(text.start, text.stop)
            numbers[6, i, len(text) : first] = stream.visual_ids(visual)
            clip, made = stream.clips_of(visual, tokens)
            own = slice(len(text) + clip.start, len(text) + clip.stop)
            numbers[8, i, own] = 1
            self.clips[i, own] = made
        device = self.seats.device
        self.numbers.copy_(put(numbers, device))
        self.seats.copy_(put([*seats, *[seats[0]] * (n - len(seats))], device))

    @torch.no_grad()
    def run(self) -> Tensor:
        """(n, Q, C), to be read before another pass runs."""
        self.times += 1
        if self.engine.fast and self.times == RECORD_AT:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.engine.pool, capture_error_mode=OTHERS_MAY_GO_ON):
                self.hidden = self._pass()
        if self.graph is None:
            return self._pass()
        self.graph.replay()
        return self.hidden

    def _pass(self) -> Tensor:
        engine, view = self.engine, self.view
        *positions, token, seen_visual, seen_text, ids, text, clip = self.numbers
        view.places.copy_(engine.pages.places(self.seats, token.clamp(min=0)).where(token >= 0, 0))
        view.seen_visual.copy_(seen_visual)
        view.seen_text.copy_(seen_text)
        view.refresh()
        ids = engine.ids[self.seats[:, None], text.clamp(min=0)].where(text >= 0, ids)
        hidden = self.clips.where((clip > 0)[..., None], engine.language.embed_tokens(ids))
        return engine.forward(hidden, torch.stack(positions), view, engine.layer)
