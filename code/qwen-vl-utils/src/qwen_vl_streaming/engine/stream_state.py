"""What enters the model next in one live stream: rows with their ids, positions and what they may attend to.

`stream.Stream` decides which rows are due and `positions` where they lie. What they may attend to are the numbers of
`plan.py`, which has them before the stream starts, while this module counts as the stream goes. Knows nothing about
cache blocks, devices or when a clip is due.
"""

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..model.prompts import Template
from ..stream import Stream
from ..timeline.plan import Window
from ..timeline.positions import RoundSums, row_positions
from ..timeline.timeline import PROMPT, Layout, Rows
from ..timeline.variants import Variant


@dataclass(frozen=True)
class DueRows:
    """Rows to feed, in feed order. The last dimension of each field has L entries."""

    rows: Rows
    ids: Tensor
    positions: Tensor
    """(3, L)"""
    run_index: Tensor
    """Index of each row in its own run, visual or text."""
    seen_visual: Tensor
    seen_text: Tensor
    window_start: Tensor
    """(2, L), see `plan.Window.start`; 0 without a window."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, key) -> "DueRows":
        """The rows that a slice or a boolean mask selects."""
        count = len(self)
        if isinstance(key, slice):  # often all or none, for each of many streams in each step
            selected = range(count)[key]
            if len(selected) == count and selected.step == 1:
                return self
            if not len(selected):
                return DueRows.empty()
        if not count:
            return self
        return DueRows(self.rows[key], *(getattr(self, name)[..., key] for name in FIELDS))

    def __add__(self, other: "DueRows") -> "DueRows":
        if not (len(self) and len(other)):
            return self if len(self) else other
        pairs = ((getattr(self, name), getattr(other, name)) for name in FIELDS)
        return DueRows(Rows.concatenate([self.rows, other.rows]), *(torch.cat(pair, -1) for pair in pairs))

    @staticmethod
    @functools.cache
    def empty() -> "DueRows":
        none = torch.zeros(0, dtype=torch.long)
        return DueRows(Rows.of(PROMPT, 0), none, none.expand(3, 0), none, none, none, none.expand(2, 0))


FIELDS = tuple(field.name for field in fields(DueRows)[1:])
"""The tensors of `DueRows`."""


class StreamState:
    """Counts what one side of a live stream has fed, and returns the rows that are due next."""

    def __init__(self, variant: Variant, template: Template, layout: Layout, window: Window | None = None):
        self.stream, self.window = Stream(variant, template, layout), window
        self.visual_fed = self.text_fed = 0
        self.sums = RoundSums()

    @staticmethod
    def prompt(variant: Variant, template: Template, layout: Layout, window: Window | None = None) -> DueRows:
        """The rows before the first clip. They can be fed when the stream starts, so `feed_clip` leaves them out."""
        due = StreamState(variant, template, layout, window)._due(Stream(variant, template, layout).feed_clip(False))
        return due[due.rows.part == PROMPT]

    def feed_clip(self, last: bool, empty: bool = False) -> DueRows:
        """The rows that enter with the next clip. The `last` may be `empty`: see `timeline.make_timeline`."""
        due = self._due(self.stream.feed_clip(last, empty))
        return due[due.rows.part != PROMPT]

    def feed_text(self) -> DueRows:
        """The text row that produces the next token; empty if the last row of a clip produces it."""
        return self._due(self.stream.feed_text())

    def _due(self, pieces: list[tuple[Rows, list[int]]]) -> DueRows:
        stream = self.stream
        rows = Rows.concatenate([Rows.of(PROMPT, 0), *(rows for rows, _ in pieces)])
        if not len(rows):
            return DueRows.empty()
        ids = torch.tensor([token for _, tokens in pieces for token in tokens], dtype=torch.long)
        positions = row_positions(
            rows, stream.variant, stream.layout, stream.counts, stream.clips, stream.bare, self.sums
        )
        text = rows.text
        seen_visual, seen_text = self.visual_fed + (~text).cumsum(0), self.text_fed + text.cumsum(0)
        self.visual_fed, self.text_fed = int(seen_visual[-1]), int(seen_text[-1])
        run_index = torch.where(text, seen_text, seen_visual) - 1
        if self.window is None:
            window_start = torch.zeros(2, len(rows), dtype=torch.long)
        else:
            window_start = self.window.start(stream.layout, seen_visual, seen_text, stream.clips)
        if stream.variant.parallel:
            seen_text = seen_text.masked_fill(rows.visual, 0)
        return DueRows(rows, ids, positions, run_index, seen_visual, seen_text, window_start)
