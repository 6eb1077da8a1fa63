"""Feed order as two runs. A stream's tokens, laid out as the engine keeps them. Knows nothing of models and ids.

Whatever the variant, a token may attend to a beginning of the *visual run* (prompt, clips, tail) and to a beginning of
the *text run* (header, answer): each run is fed in its own order, and the rule of `attention.allowed` looks only
backwards. Two numbers a token therefore say what a mask says, and a run never has to move.
"""

from dataclasses import dataclass

from torch import Tensor

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
