"""What the host knows of one stream in a batch: how far each of its runs has been fed. Knows nothing of the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.prompts import Template
from ..timeline.plan import Plan, Run
from ..timeline.timeline import CLIP, NOTHING, PROMPT, TAIL
from .kv_cache import BLOCK_SIZE, PagedKVCache

ROW_FIELDS = 9
"""What a pass has to know of a row: position (3), token of its seat's pages, how much of either run it sees (2), id,
text row whose id is taken instead (-1: none), whether it is of a clip."""


@dataclass
class PlannedSequence:
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
        visual, text, template = self.plan.visual, self.plan.text, self.template
        part, index = visual.rows.part, visual.rows.index
        clip = part == CLIP
        first = int(clip.int().argmax())
        self.clips = range(first, first + int(clip.sum()))
        """The rows of the visual run that are of clips: in feed order they lie together."""
        self.visual_ids = torch.full((len(visual),), template.video)
        for kind, source in ((PROMPT, template.prompt), (TAIL, template.tail)):
            self.visual_ids[part == kind] = torch.tensor(source)[index[part == kind]]
        row, begin = torch.arange(max(len(visual), len(text))), PagedKVCache.text_block_of(len(visual)) * BLOCK_SIZE
        none = torch.zeros_like(row)

        def numbers(run: Run, token: Tensor, ids: Tensor, text_row: Tensor, clip: Tensor) -> Tensor:
            rest = (each[: len(run)] for each in (token, run.seen_visual, run.seen_text, ids, text_row, clip))
            return torch.stack([*run.positions, *rest])

        self.visual_numbers = numbers(visual, row, self.visual_ids, none - 1, clip.long())
        """ROW_FIELDS of each row of the visual run, (ROW_FIELDS, L)."""
        self.text_numbers = numbers(text, row + begin, none, row, none)
        """The same for the text run."""

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
        """What a stream that is not done feeds next: rows of the text run, up to one that produces a word where one is
        due, else all that are due and after them rows of the visual run, up to what the next text row asks for."""
        if self.speaks:
            end = self.produces.index(True, self.text_fed) + 1
            return range(self.text_fed, end), range(self.visual_fed, self.visual_fed)
        upto = int(self.plan.text.seen_visual[self.text_due])
        return range(self.text_fed, self.text_due), range(self.visual_fed, upto)

    def answer_of(self, text: range, visual: range) -> int:
        """The answer index that the last row of such spans produces, or timeline.NOTHING."""
        run, last = (self.plan.visual, visual.stop) if visual else (self.plan.text, text.stop)
        return int(run.produces[last - 1])

    def clips_of(self, span: range, visual_tokens: Tensor) -> tuple[slice, Tensor]:
        """Which rows of a `span` of the visual run are of clips, and what of `visual_tokens` (N, tokens of a clip, C)
        they are."""
        first = self.clips.start
        begin = max(span.start, first)
        end = max(begin, min(span.stop, self.clips.stop))
        own = visual_tokens.flatten(0, 1)[begin - first : end - first]
        return slice(begin - span.start, end - span.start), own

    def watched(self, upto: int) -> None:
        self.visual_fed = upto
        self.text_due = min(int((self.plan.text.seen_visual <= upto).sum()), self.last)
