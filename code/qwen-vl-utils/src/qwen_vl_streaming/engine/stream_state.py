"""What enters the model next in one live stream: rows with their ids, positions and sight, counted as things happen.

What enters is asked of `reference.Stream`, where of `positions`; what it may see are the numbers of `plan.py`, which
knows beforehand what this learns as it goes. Knows nothing of pages, devices and of what decides when.
"""

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..model.prompts import Template
from ..reference import Stream
from ..timeline.plan import Window
from ..timeline.positions import row_positions
from ..timeline.timeline import PROMPT, Layout, Rows
from ..timeline.variants import Variant


@dataclass(frozen=True)
class DueRows:
    """Rows that are to be fed, in feed order: each field's last axis has L entries."""

    rows: Rows
    ids: Tensor
    positions: Tensor
    """(3, L)"""
    run_index: Tensor
    """Index in the row's own run, visual or text."""
    seen_visual: Tensor
    seen_text: Tensor
    window_start: Tensor
    """(2, L): see `plan.Window`; 0 without one."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key) -> "DueRows":
        """The rows that a slice or a mask picks."""
        if not len(self):
            return self
        return DueRows(self.rows[key], *(getattr(self, field.name)[..., key] for field in fields(self)[1:]))

    def __add__(self, other: "DueRows") -> "DueRows":
        if not (len(self) and len(other)):
            return self if len(self) else other
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self)[1:])
        return DueRows(Rows.concatenate([self.rows, other.rows]), *(torch.cat(pair, -1) for pair in pairs))

    @staticmethod
    @functools.cache
    def empty() -> "DueRows":
        none = torch.zeros(0, dtype=torch.long)
        return DueRows(Rows.of(PROMPT, 0), none, none.expand(3, 0), none, none, none, none.expand(2, 0))


class StreamState:
    """The book-keeping of one side of a stream: what is due next, and how long the two runs have grown."""

    def __init__(self, variant: Variant, template: Template, layout: Layout, window: Window | None = None):
        self.stream, self.window = Stream(variant, template, layout), window
        self.visual_fed = self.text_fed = 0

    @staticmethod
    def prompt(variant: Variant, template: Template, layout: Layout, window: Window | None = None) -> DueRows:
        """The rows before the first clip. They can be fed at once, and `clip` leaves them out."""
        due = StreamState(variant, template, layout, window)._due(Stream(variant, template, layout).feed_clip(False))
        return due[due.rows.part == PROMPT]

    def feed_clip(self, last: bool, empty: bool = False) -> DueRows:
        due = self._due(self.stream.feed_clip(last, empty))
        return due[due.rows.part != PROMPT]

    def feed_text(self) -> DueRows:
        """The text rows that have to be fed for the next word: one, or none where the row before it was a clip's."""
        return self._due(self.stream.feed_text())

    def _due(self, pieces: list[tuple[Rows, list[int]]]) -> DueRows:
        stream = self.stream
        rows = Rows.concatenate([Rows.of(PROMPT, 0), *(rows for rows, _ in pieces)])
        if not len(rows):
            return DueRows.empty()
        ids = torch.tensor([token for _, tokens in pieces for token in tokens], dtype=torch.long)
        positions = row_positions(rows, stream.variant, stream.layout, stream.counts, stream.clips, stream.bare)
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
