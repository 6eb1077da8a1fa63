"""What enters the model next in one live stream: rows with their ids, positions and what they may attend to.

`stream.Stream` decides which rows are due and `positions` where they lie. What they may attend to are the numbers of
`plan.py`, which has them before the stream starts, while this module counts as the stream goes. Knows nothing about
cache blocks, devices or when a clip is due.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..model.prompts import Template
from ..stream import Piece, Stream
from ..timeline.plan import Window
from ..timeline.positions import StreamPositions
from ..timeline.timeline import CLIP, HEADER, PROMPT, Layout
from ..timeline.variants import Variant

ROW_FIELDS = 11
"""Integers that a step reads of each row, see `DueRows.table`."""
RUN_INDEX, SEEN_VISUAL, SEEN_TEXT, IDS, TEXT_ROW, CLIP_ROW, PART = 3, 4, 5, 8, 9, 10, 11


@dataclass(frozen=True)
class DueRows:
    """Rows to feed, in feed order."""

    table: np.ndarray
    """A row of integers, (ROW_FIELDS + 1, L), is: position (3), index in its own run, visual or text, `seen_visual`,
    `seen_text`, `Window.start` of both runs (0 without a window), token id, index in the text run and in the clip (-1:
    not of the text; not of a clip), and part."""

    @property
    def positions(self) -> np.ndarray:
        return self.table[:3]

    @property
    def run_index(self) -> np.ndarray:
        return self.table[RUN_INDEX]

    @property
    def seen_visual(self) -> np.ndarray:
        """Tokens of the visual run that each row may attend to: see `plan.Run`."""
        return self.table[SEEN_VISUAL]

    @property
    def seen_text(self) -> np.ndarray:
        return self.table[SEEN_TEXT]

    @functools.cached_property
    def text(self) -> np.ndarray:
        return self.table[PART] >= HEADER

    @functools.cached_property
    def visual(self) -> np.ndarray:
        """Clips and tail."""
        return (self.table[PART] > PROMPT) & (self.table[PART] < HEADER)

    def __len__(self) -> int:
        return self.table.shape[1]

    def __getitem__(self, key) -> "DueRows":
        """The rows that a slice or a boolean mask selects."""
        return DueRows(self.table[:, key])

    def split(self, count: int) -> tuple["DueRows", "DueRows"]:
        """The first `count` rows, or all, and the rest."""
        if count >= len(self):  # often all or none, for each of many streams in each step
            return self, DueRows.empty()
        return (self[:count], self[count:]) if count else (DueRows.empty(), self)

    def __add__(self, other: "DueRows") -> "DueRows":
        if not (len(self) and len(other)):
            return self if len(self) else other
        return DueRows(np.concatenate([self.table, other.table], 1))

    @staticmethod
    @functools.cache
    def empty() -> "DueRows":
        return DueRows(np.zeros((ROW_FIELDS + 1, 0), dtype=np.int64))


class StreamState:
    """Counts what one side of a live stream has fed, and returns the rows that are due next."""

    def __init__(self, variant: Variant, template: Template, layout: Layout, window: Window | None = None):
        self.stream, self.window = Stream(variant, template, layout), window
        self.visual_fed, self.text_fed = layout.prompt, 0
        self.positions = StreamPositions(variant, layout)

    @staticmethod
    def prompt(variant: Variant, template: Template, layout: Layout, window: Window | None = None) -> DueRows:
        """The rows before the first clip. They can be fed when the stream starts, so `feed_clip` leaves them out."""
        state = StreamState(variant, template, layout, window)
        state.visual_fed = 0
        return state._due([Piece(PROMPT, template.prompt)])

    def feed_clip(self, last: bool, empty: bool = False) -> DueRows:
        """The rows that enter with the next clip. The `last` may be `empty`: see `timeline.make_timeline`."""
        return self._due([piece for piece in self.stream.feed_clip(last, empty) if piece.part != PROMPT])

    def feed_text(self) -> DueRows:
        """The text row that produces the next token; empty if the last row of a clip produces it."""
        return self._due(self.stream.feed_text())

    def _due(self, pieces: Sequence[Piece]) -> DueRows:
        if len(pieces) == 1:
            return DueRows(self._table(pieces[0]))
        return DueRows(np.concatenate([self._table(piece) for piece in pieces], 1)) if pieces else DueRows.empty()

    def _table(self, piece: Piece) -> np.ndarray:
        """`DueRows.table` of a piece, in which everything but ids counts on from the first row."""
        stream, (part, ids, clip, slot, first), count = self.stream, piece, len(piece.ids)
        time, place = self.positions.start(part, clip or slot, stream.counts, stream.clips, stream.bare)
        text = part >= HEADER
        run_index, visual_fed, text_fed = (self.text_fed if text else self.visual_fed), self.visual_fed, self.text_fed
        if text:
            self.text_fed += count
        else:
            self.visual_fed += count
        window = 0, 0
        if self.window is not None:  # all rows of a piece have the same
            window = self.window.start(stream.layout, self.visual_fed, self.text_fed, stream.clips)
        row = (
            *(time + first, place + first, place + first, run_index),
            *(visual_fed + (not text), 0 if stream.variant.parallel and not text else text_fed + text, *window),
            *(ids[0], run_index if text else -1, 0 if part == CLIP else -1, part),
        )
        table = np.array(row, dtype=np.int64)[:, None]
        if count > 1:
            table = table + _counted(part, count, stream.layout.grid[1])
            table[IDS] = ids
        return table


@functools.lru_cache(maxsize=64)
def _counted(part: int, count: int, across: int) -> np.ndarray:
    """What to add to `DueRows.table` of the first of `count` rows of a piece, to get that of each."""
    table, index = np.zeros((ROW_FIELDS + 1, count), dtype=np.int64), np.arange(count)
    table[:3] = (0 * index, index // across, index % across) if part == CLIP else index
    table[RUN_INDEX] = index
    table[SEEN_TEXT if part >= HEADER else SEEN_VISUAL] = index
    if part >= HEADER:
        table[TEXT_ROW] = index
    if part == CLIP:
        table[CLIP_ROW] = index
    return table
