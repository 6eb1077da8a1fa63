"""Feed order as two runs. A stream's tokens, laid out as the engine keeps them. Knows nothing of models and ids.

Whatever the variant, a token may attend to a beginning of the *visual run* (prompt, clips, tail) and to a beginning of
the *text run* (header, answer): each run is fed in its own order, and the rule of `attention.allowed` looks only
backwards. Two numbers a token therefore say what a mask says, and a run never has to move.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InputError
from .positions import timeline_positions
from .timeline import ANSWER, Layout, Rows, Schedule, make_timeline
from .variants import Variant


@dataclass(frozen=True)
class Run:
    """Some tokens of a stream in feed order: each field's last axis has L entries."""

    rows: Rows
    positions: Tensor
    """(3, L)"""
    seen_visual: Tensor
    """How many tokens of the visual run each may attend to, itself included where it is one of them."""
    seen_text: Tensor
    """The same for the text run."""
    produces: Tensor
    """The answer index that each predicts, or timeline.NOTHING."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Plan:
    """Everything that enters the model for one stream, should it write as many tokens as it may."""

    visual: Run
    text: Run
    schedule: Schedule

    def slots(self, answer: int) -> list[int]:
        """The slot that wrote each of the first `answer` answer tokens."""
        rows = self.text.rows
        return rows.slot[rows.part == ANSWER][:answer].tolist()


def make_plan(variant: Variant, layout: Layout, schedule: Schedule, most: int) -> Plan:
    """The plan of a stream of `schedule.clips` clips that writes at most `most` answer tokens.

    An answer that ends early leaves the rest of the plan unused, and what came before is as planned: position and
    sight of a token depend only on the slots before it.
    """
    timeline = make_timeline(variant, layout, schedule.counts(most))
    text, visual = timeline.rows.text, timeline.rows.visual
    seen_visual, seen_text = (~text).cumsum(0), text.cumsum(0)
    if variant.parallel:
        seen_text = seen_text.masked_fill(visual, 0)
    positions = timeline_positions(timeline)

    def run(which: Tensor) -> Run:
        return Run(
            timeline.rows[which], positions[:, which], seen_visual[which], seen_text[which], timeline.produces[which]
        )

    return Plan(run(~text), run(text), schedule)


@dataclass(frozen=True)
class Window:
    """What stays in sight of a stream without end: prompt and header, the newest clips and the newest words. Positions
    stay as they were."""

    clips: int
    tokens: int

    def __post_init__(self):
        if min(self.clips, self.tokens) < 1:
            raise InputError(f"a window holds at least 1 clip and 1 token, not {self.clips} and {self.tokens}")

    def start(self, layout: Layout, seen_visual: Tensor, seen_text: Tensor, clips: int | None) -> Tensor:
        """Of tokens that see so many of either run (both (L,)), the first of each run that is still in sight, besides
        prompt and header: (2, L). `clips` is N once it is known."""
        watched = (seen_visual - layout.prompt + layout.tokens_per_clip - 1) // layout.tokens_per_clip
        if clips is not None:
            watched = watched.clamp(max=clips)  # the tail comes with the last clip
        visual = layout.prompt + (watched - self.clips) * layout.tokens_per_clip
        return torch.stack([visual.clamp(min=layout.prompt), (seen_text - self.tokens).clamp(min=layout.header)])

    def mask(self, layout: Layout, text: Tensor, clips: int | None, query: slice = slice(None)) -> Tensor:
        """Which of L tokens in feed order, of which `text` (L,) flags the text side, each of `query` has in sight:
        (Q, L). Says nothing of what is not allowed."""
        runs = (~text).cumsum(0), text.cumsum(0)
        since_visual, since_text = self.start(layout, *runs, clips)
        visual, words = runs[0] - 1, runs[1] - 1
        near_visual = (visual >= since_visual[query, None]) | (visual < layout.prompt)
        near_text = (words >= since_text[query, None]) | (words < layout.header)
        return near_text.where(text, near_visual)
