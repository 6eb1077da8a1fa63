"""The host's state of one stream in an offline batch: how far each of its runs has been fed. Knows nothing about the
device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.prompts import Template
from ..timeline.plan import Plan, Run
from ..timeline.timeline import CLIP, NOTHING
from .kv_cache import BLOCK_SIZE, PagedKVCache

ROW_FIELDS = 9
"""Integers that describe a row to a step: position (3), logical cache token, how much of each run it may attend to (2),
token id, text row to take the id from instead (-1: none), and whether it is a clip row."""


@dataclass
class PlannedSequence:
    """A stream with a known plan, and its progress. Only an early end of the answer has to be read from the device."""

    plan: Plan
    template: Template
    visual_fed: int = 0
    text_fed: int = 0
    text_due: int = 0
    """Text rows that may be fed, given the visual rows that have been."""

    def __post_init__(self):
        producing = (self.plan.visual.produces != NOTHING).nonzero()
        self.visual_end = int(producing.max()) + 1 if len(producing) else 0
        """How far the visual run must be fed for the tokens that its own rows produce."""
        self.produces = (self.plan.text.produces != NOTHING).tolist()
        visual, text, template = self.plan.visual, self.plan.text, self.template
        clip = visual.rows.part == CLIP
        first = int(clip.int().argmax())
        self.clip_range = range(first, first + int(clip.sum()))
        """The clip rows of the visual run, which are contiguous."""
        self.visual_ids = template.ids(visual.rows)
        row = torch.arange(max(len(visual), len(text)))
        text_start, zeros = PagedKVCache.text_block_of(len(visual)) * BLOCK_SIZE, torch.zeros_like(row)

        def inputs(run: Run, token: Tensor, ids: Tensor, text_row: Tensor, clip: Tensor) -> Tensor:
            rest = (each[: len(run)] for each in (token, run.seen_visual, run.seen_text, ids, text_row, clip))
            return torch.stack([*run.positions, *rest])

        self.visual_inputs = inputs(visual, row, self.visual_ids, zeros - 1, clip.long())
        """The ROW_FIELDS of each row of the visual run, (ROW_FIELDS, L)."""
        self.text_inputs = inputs(text, row + text_start, zeros, row, zeros)
        """The same for the text run."""

    @property
    def text_end(self) -> int:
        """Text rows that are ever fed. The row of the last answer token would produce one too many."""
        return len(self.plan.text) - 1

    @property
    def done(self) -> bool:
        return self.text_fed == self.text_end and self.visual_fed >= self.visual_end

    @property
    def can_decode(self) -> bool:
        """Whether a text row that produces a token is due."""
        return any(self.produces[self.text_fed : self.text_due])

    @property
    def needs_clips(self) -> bool:
        """Whether the next token requires more visual rows. Text rows that are due can be fed with those."""
        return not (self.done or self.can_decode)

    def next_spans(self) -> tuple[range, range]:
        """The rows of the text and of the visual run to feed next, if the stream is not done. If a token can be
        decoded, these are text rows up to the one that produces it. Otherwise they are all text rows that are due,
        followed by the visual rows that the next text row requires."""
        if self.can_decode:
            end = self.produces.index(True, self.text_fed) + 1
            return range(self.text_fed, end), range(self.visual_fed, self.visual_fed)
        visual_end = int(self.plan.text.seen_visual[self.text_due])
        return range(self.text_fed, self.text_due), range(self.visual_fed, visual_end)

    def answer_index(self, text: range, visual: range) -> int:
        """The answer index that the last row of these spans produces, or `timeline.NOTHING`."""
        run, last = (self.plan.visual, visual.stop) if visual else (self.plan.text, text.stop)
        return int(run.produces[last - 1])

    def clip_rows(self, span: range, visual_tokens: Tensor) -> tuple[slice, Tensor]:
        """Which rows within `span` of the visual run are clip rows, and their features out of `visual_tokens` (N,
        tokens of a clip, C)."""
        first = self.clip_range.start
        begin = max(span.start, first)
        end = max(begin, min(span.stop, self.clip_range.stop))
        features = visual_tokens.flatten(0, 1)[begin - first : end - first]
        return slice(begin - span.start, end - span.start), features

    def advance_visual(self, end: int) -> None:
        """The visual run has been fed up to row `end`."""
        self.visual_fed = end
        self.text_due = min(int((self.plan.text.seen_visual <= end).sum()), self.text_end)
