"""Passes of two fixed shapes for one stream that is not known beforehand: a word, a piece of a clip, or both at once.

What enters is asked of `streaming.Stream`, where of `positions`; what it may see are the two numbers of `plan.py`,
counted as rows come. All of a pass goes to the device in one copy, ids and keys stay there, and nothing in a pass waits
for the host, so that each kind of pass can be recorded as a CUDA graph. Knows nothing of what decides when.

    R rows of a pass: the text row, then up to W others   C hidden size
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .engine import Engine
from .pages import PAGE, Pages, View
from .positions import row_positions
from .prompts import Template
from .streaming import Stream
from .timeline import CLIP, PROMPT, Layout, Rows
from .variants import Variant

NUMBERS = 9  # of each row of a pass, see Passes._fill


@dataclass(frozen=True)
class Due:
    """Rows that are to be fed, in feed order: each field's last axis has L entries."""

    rows: Rows
    ids: Tensor
    positions: Tensor
    """(3, L)"""
    place: Tensor
    """Index in the row's own run, visual or text."""
    seen_visual: Tensor
    seen_text: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> "Due":
        """The rows that a slice or a mask picks."""
        return Due(
            self.rows[key],
            self.ids[key],
            self.positions[:, key],
            self.place[key],
            self.seen_visual[key],
            self.seen_text[key],
        )


class Feed:
    """The book-keeping of one side of a stream: what is due next, and how long the two runs have grown."""

    def __init__(self, variant: Variant, template: Template, layout: Layout):
        self.stream = Stream(variant, template, layout)
        self.visual = self.text = 0

    @staticmethod
    def prompt(variant: Variant, template: Template, layout: Layout) -> Due:
        """The rows before the first clip. They can be fed at once, and `clip` leaves them out."""
        due = Feed(variant, template, layout)._due(Stream(variant, template, layout).feed_clip(False))
        return due[due.rows.part == PROMPT]

    def clip(self, last: bool) -> Due:
        due = self._due(self.stream.feed_clip(last))
        return due[due.rows.part != PROMPT]

    def word(self) -> Due:
        """The text rows that have to be fed for the next word: one, or none where the row before it was a clip's."""
        return self._due(self.stream.feed_text())

    def _due(self, pieces: list[tuple[Rows, list[int]]]) -> Due:
        stream = self.stream
        nothing = Rows.of(PROMPT, 0)
        rows = Rows.concatenate([nothing, *(rows for rows, _ in pieces)])
        ids = torch.tensor([token for _, tokens in pieces for token in tokens], dtype=torch.long)
        if not len(rows):
            return Due(rows, ids, ids.expand(3, 0), ids, ids, ids)
        positions = row_positions(rows, stream.variant, stream.layout, stream.counts, stream.clips)
        text = rows.text
        seen_visual, seen_text = self.visual + (~text).cumsum(0), self.text + text.cumsum(0)
        self.visual, self.text = int(seen_visual[-1]), int(seen_text[-1])
        place = torch.where(text, seen_text, seen_visual) - 1
        if stream.variant.parallel:
            seen_text = seen_text.masked_fill(rows.visual, 0)
        return Due(rows, ids, positions, place, seen_visual, seen_text)


class Passes(Engine):
    """One seat of an engine, with room for `clips` clips and `most` words, fed row by row as things happen."""

    def __init__(self, model, layout: Layout, clips: int, most: int, width: int | None = None, penalty: float = 1.15):
        """`width` is W; by default a whole clip and the tail go in at once."""
        config = model.model.language_model.config
        visual = layout.prompt + clips * layout.tokens_per_clip + layout.tail
        text = layout.header + most
        need = Pages.need(visual, text)
        super().__init__(model, 1, Pages(config, 1, need, need, model.dtype, model.device), text, penalty)
        self.pages.take(0, visual, text)
        self.layout = layout
        self.width = min(width or visual, layout.tokens_per_clip + layout.tail)
        self.text_begin = Pages.text_page_of(visual) * PAGE
        self.next_row, self.yes = torch.zeros_like(self.due), torch.ones_like(self.ended)
        self.seat = torch.zeros(1, dtype=torch.long, device=self.device)
        self.clip = torch.zeros(layout.tokens_per_clip, config.hidden_size, dtype=model.dtype, device=self.device)
        """The visual tokens that clip rows are made of."""
        self.picked = torch.zeros(1, config.hidden_size, dtype=model.dtype, device=self.device)
        """What came out for the newest row that a word may be chosen from."""
        self.numbers, self.views = {}, {}
        for rows in {1, 1 + self.width}:
            self.numbers[rows] = torch.zeros(NUMBERS * rows + 1, dtype=torch.long, device=self.device)
            some = [torch.ones(1, rows, dtype=torch.long, device=self.device) for _ in range(3)]
            places = some[0].zero_()
            self.views[rows] = View(
                self.pages, self.seat, places, some[1], some[2], self.groups, self.flex, options=self.options
            )

    def begin(self, template: Template) -> None:
        """A new stream: what an earlier one left is never seen."""
        self.ids.zero_(), self.seen_ids.zero_(), self.ended.zero_()
        self.ids[0, : len(template.header)] = self._put(torch.tensor(template.header))
        used = [*template.prompt, template.video, *template.tail, *template.header]
        self.seen_ids[0, self._put(torch.tensor(used))] = True
        self.end.fill_(template.end)
        self.next_row.fill_(len(template.header))

    @torch.no_grad()
    def look(self, clip: Tensor) -> None:
        """Have `clip`, (patches, pixels of a patch) or (tokens of a clip, C), for the clip rows that come next."""
        if len(clip) != self.layout.tokens_per_clip:
            clip = self.model.perceive(clip[None], self.layout.grid)[0]
        self.clip.copy_(clip)

    def feed(self, due: Due) -> None:
        """Feed rows in as many passes as they need."""
        for first in range(0, len(due), self.width):
            self.round(None, due[first : first + self.width], False)

    @torch.no_grad()
    def round(self, word: Due | None, others: Due | None, write: bool) -> None:
        """One pass over the row of `word` and up to W `others`. `write`: choose the next word, from what came out for
        `word` or, where that has no row, for the newest row before."""
        if word is not None and not len(word):
            word = None
        if others is not None and not len(others):
            others = None
        if word is not None or others is not None:
            rows = 1 if others is None else 1 + self.width
            self.numbers[rows].copy_(self._put(self._fill(rows, word, others)), non_blocking=True)
            self._pass(rows)
        if write:
            self._put_down()

    def newest(self) -> int:
        """The id of the word that was written last. Waits for the device."""
        return int(self.ids.gather(1, self.next_row[:, None] - 1))

    def _fill(self, rows: int, word: Due | None, others: Due | None) -> Tensor:
        """The numbers of a pass: for each row position (3), place in the pool's logical tokens (-1: idle row), what it
        sees (2), id, index in the text run and in the clip (-1: neither); then the row to choose from."""
        numbers = torch.zeros(NUMBERS * rows + 1, dtype=torch.long)
        table = numbers[:-1].view(NUMBERS, rows)
        table[3], table[4], table[7:] = -1, 1, -1
        for due, first in ((word, 0), (others, 1)):
            if due is None:
                continue
            own, text, clip = slice(first, first + len(due)), due.rows.text, due.rows.part == CLIP
            table[:3, own] = due.positions
            table[3, own] = due.place + text * self.text_begin
            table[4, own], table[5, own], table[6, own] = due.seen_visual, due.seen_text, due.ids
            table[7, own] = due.place.where(text, -1)
            table[8, own] = due.rows.index.where(clip, -1)
        numbers[-1] = 0 if word is not None else len(others)
        return numbers

    def _pass(self, rows: int) -> None:
        """What a CUDA graph would hold for this number of rows. Reads only tensors of the device."""
        numbers, view = self.numbers[rows], self.views[rows]
        table = numbers[:-1].view(NUMBERS, 1, rows)
        logical, text, clip = table[3], table[7], table[8]
        view.places.copy_(self.pages.places(self.seat, logical.clamp(min=0)).where(logical >= 0, 0))
        view.seen_visual.copy_(table[4])
        view.seen_text.copy_(table[5])
        view.refresh()
        ids = self.ids.gather(1, text.clamp(min=0)).where(text >= 0, table[6])
        hidden = self.language.embed_tokens(ids)
        hidden = self.clip[clip.clamp(min=0)].where((clip >= 0)[..., None], hidden)
        hidden = self._forward(hidden, table[:3], view, self._layer_of_step)
        self.picked.copy_(hidden[0].index_select(0, numbers[-1:]))

    def _put_down(self) -> None:
        self._plain_choose(self.picked, self.seat, self.next_row, self.yes)
        self.next_row += 1

    # Keys and values of visual rows, as they go from one set of pages to another

    def carrier(self) -> Tensor:
        """Room for what a clip and the tail leave behind: (2 layers, key heads, tokens of a clip + tail, D)."""
        keys, _ = self.pages.layers[0]
        rows = self.layout.tokens_per_clip + self.layout.tail
        return keys.new_zeros(2 * len(self.pages.layers), keys.shape[0], rows, keys.shape[2])

    def copy_out(self, due: Due, carrier: Tensor) -> None:
        """Put the keys and values of the visual rows of `due` into `carrier`."""
        where = self._where(due)
        for i, pool in enumerate(pool for pair in self.pages.layers for pool in pair):
            torch.index_select(pool, 1, where, out=carrier[i])

    def copy_in(self, due: Due, carrier: Tensor) -> None:
        where = self._where(due)
        for i, pool in enumerate(pool for pair in self.pages.layers for pool in pair):
            pool.index_copy_(1, where, carrier[i])

    def _where(self, due: Due) -> Tensor:
        """Where the visual rows of `due` lie in the pool; rows that the carrier has beyond them go to page 0."""
        place = due.place[due.rows.visual]
        logical = torch.full((1, self.layout.tokens_per_clip + self.layout.tail), -1)
        logical[0, : len(place)] = place
        logical = self._put(logical)
        return self.pages.places(self.seat, logical.clamp(min=0)).where(logical >= 0, 0)[0]
