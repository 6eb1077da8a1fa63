"""The state of one stream: what enters the model next, and which tokens were written. `reference.py` and the engine
share it, and the repetition penalty. Knows nothing about how a model runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .model.prompts import Template
from .timeline.timeline import ANSWER, CLIP, HEADER, PROMPT, TAIL, Layout, ModelSchedule, Rows, Schedule
from .timeline.variants import Variant

PENALTY = 1.15
"""Default repetition penalty."""


def penalize(logits: Tensor, penalized: Tensor, penalty: float) -> Tensor:
    """`logits` (…, V) after the repetition penalty on the `penalized` ids (…, V), as in transformers' `generate`."""
    weaker = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(penalized, weaker, logits)


class Piece(NamedTuple):
    """Consecutive tokens of one part, and of one clip or slot. The fields are as in `Rows`, with the `first` index."""

    part: int
    ids: Sequence[int]
    clip: int = 0
    slot: int = 0
    first: int = 0

    @property
    def rows(self) -> Rows:
        return Rows.of(self.part, len(self.ids), self.clip, self.slot, self.first)


@dataclass
class Stream:
    """Decides in which order clips and text are fed, as the timeline does for a whole sample."""

    variant: Variant
    template: Template
    layout: Layout
    counts: list[int] = field(default_factory=list)
    """Answer tokens written in each slot so far. Its length is the number of clips that have been fed."""
    complete: bool = False
    """The last clip has been fed."""
    bare: bool = False
    """The last clip was empty: see `timeline.make_timeline`."""
    written: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    fed: int = 0
    text_fed: int = 0
    header_slot: int = 0

    @property
    def ended(self) -> bool:
        return bool(self.template.ends(self.written[-1:], self.slots[-1:], self.clips))

    @property
    def clips(self) -> int | None:
        """N, once it is known."""
        return len(self.counts) if self.complete else None

    def feed_clip(self, last: bool, empty: bool = False) -> list[Piece]:
        """What enters the model with the next clip. The last clip may be `empty`. Raises ValueError after the last
        clip."""
        if self.complete:
            raise ValueError("the last clip of this stream has been fed: start a new stream for another video")
        template, layout = self.template, self.layout
        pieces = []
        if not self.counts:
            pieces.append(Piece(PROMPT, template.prompt))
        if not self.variant.parallel:
            pieces += self.feed_text(hold=0)
        self.counts.append(0)
        slot = len(self.counts)
        if not empty:
            pieces.append(Piece(CLIP, (template.video,) * layout.tokens_per_clip, clip=slot))
        if last:
            self.complete, self.bare = True, empty
            pieces.append(Piece(TAIL, template.tail, clip=slot))
        if slot == 1 if self.variant.streams else last:
            self.header_slot = slot
        # In a parallel variant the newest text token waits: it produces the next one, which may attend to a later clip.
        pieces += self.feed_text(hold=1 if self.variant.parallel else 0)
        return pieces

    def feed_text(self, hold: int = 0) -> list[Piece]:
        """The text that has not been fed yet, except the newest `hold` tokens."""
        if not self.header_slot:
            return []
        header = self.template.header
        first, end = self.text_fed, len(header) + len(self.written) - hold
        if end <= first:
            return []
        self.text_fed, pieces = end, []
        if first < len(header):
            mine = slice(first, min(end, len(header)))
            pieces.append(Piece(HEADER, header[mine], slot=self.header_slot, first=first))
        for index in range(max(first - len(header), 0), end - len(header)):
            pieces.append(Piece(ANSWER, (self.written[index],), slot=self.slots[index], first=index))
        return pieces

    def write(self, token: int) -> None:
        self.counts[-1] += 1
        self.written.append(token)
        self.slots.append(len(self.counts))

    def slot_over(self, schedule: Schedule | ModelSchedule) -> bool:
        """The newest slot, if there is one, has written what it may before the next clip is fed."""
        slot, done = len(self.counts), self.counts[-1] if self.counts else 0
        if isinstance(schedule, Schedule):
            return done >= schedule.quota(slot)
        if slot == schedule.clips:
            return False
        return done >= schedule.most or (done > 0 and self.written[-1] == self.template.end_of_slot)


@dataclass(frozen=True)
class Caption:
    """What a stream wrote: token ids, the slot of each, and k_1 … k_N (`schedule`)."""

    tokens: list[int]
    slots: list[int]
    schedule: list[int]
