"""What the host knows of one stream in a batch: how far each of its runs has been fed. Knows nothing of the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Plan
from .prompts import Template
from .timeline import CLIP, NOTHING, PROMPT, TAIL


@dataclass
class Seated:
    """A stream and how far it is. That its words ended early is all that has to be read back from the device."""

    plan: Plan
    template: Template
    visual_fed: int = 0
    text_fed: int = 0
    text_due: int = 0
    """Text rows that may be fed, given what has been watched."""

    def __post_init__(self):
        writes = (self.plan.visual.produces != NOTHING).nonzero()
        self.visual_last = int(writes.max()) + 1 if len(writes) else 0
        """How far the visual run has to be fed for the words that its rows produce."""
        self.produces = (self.plan.text.produces != NOTHING).tolist()

    @property
    def last(self) -> int:
        """Text rows that are ever fed: the row of the last answer token would produce one too many."""
        return len(self.plan.text) - 1

    @property
    def done(self) -> bool:
        return self.text_fed == self.last and self.visual_fed >= self.visual_last

    @property
    def speaks(self) -> bool:
        """A text row is due that produces a word."""
        return any(self.produces[self.text_fed : self.text_due])

    @property
    def waits(self) -> bool:
        """No word comes before more has been watched. Text rows that are due can be fed with that."""
        return not (self.done or self.speaks)

    def next_span(self) -> tuple[range, range]:
        """What a stream that waits feeds next: rows of the text run, and after them of the visual run."""
        upto = int(self.plan.text.seen_visual[self.text_due])
        return range(self.text_fed, self.text_due), range(self.visual_fed, upto)

    def visual_ids(self, span: range) -> Tensor:
        """The ids of some rows of the visual run, (rows,)."""
        rows = self.plan.visual.rows[span.start : span.stop]
        ids = torch.full((len(span),), self.template.video)
        for part, source in ((PROMPT, self.template.prompt), (TAIL, self.template.tail)):
            ids[rows.part == part] = torch.tensor(source)[rows.index[rows.part == part]]
        return ids

    def clips_of(self, span: range, visual_tokens: Tensor) -> tuple[slice, Tensor]:
        """Which rows of `span` are of clips, and what of `visual_tokens` (N, tokens of a clip, C) they are."""
        rows = self.plan.visual.rows[span.start : span.stop]
        clip = (rows.part == CLIP).nonzero()[:, 0].tolist()
        if not clip:
            return slice(0, 0), visual_tokens[0, :0]
        # In feed order a clip's tokens lie together, and so do clips that are fed together.
        first = (int(rows.clip[clip[0]]) - 1) * visual_tokens.shape[1] + int(rows.index[clip[0]])
        return slice(clip[0], clip[-1] + 1), visual_tokens.flatten(0, 1)[first : first + len(clip)]

    def watched(self, upto: int) -> None:
        self.visual_fed = upto
        self.text_due = min(int((self.plan.text.seen_visual <= upto).sum()), self.last)
