"""Feed order as two runs, which is how the engine stores a stream's tokens. Knows nothing about models and token ids.

In every variant, a token attends to a prefix of the *visual run* (prompt, clips, tail) and to a prefix of the *text
run* (header, answer), because each run is fed in order and `attention.allowed` only looks backwards. Two numbers per
token therefore replace a mask, and the tokens of a run never move in the cache.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ..common.errors import InputError
from ..common.numbers import check_count, shown
from .positions import timeline_positions
from .timeline import ANSWER, Layout, Rows, Schedule, make_timeline
from .variants import Variant

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Run:
    """The visual or the text tokens of a stream, in feed order. The last dimension of each field has L entries."""

    rows: Rows
    positions: Tensor
    """(3, L)"""
    seen_visual: Tensor
    """How many tokens of the visual run each may attend to, itself included if it is one of them."""
    seen_text: Tensor
    """The same for the text run."""
    produces: Tensor
    """The answer index that each predicts, or `timeline.NOTHING`."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Plan:
    """Everything that enters the model for one stream that writes as many tokens as it may."""

    visual: Run
    text: Run
    schedule: Schedule

    def slots(self, answer: int) -> list[int]:
        """The slot that wrote each of the first `answer` answer tokens."""
        rows = self.text.rows
        return rows.slot[rows.part == ANSWER][:answer].tolist()


def make_plan(variant: Variant, layout: Layout, schedule: Schedule, most: int) -> Plan:
    """The plan of a stream of `schedule.clips` clips that writes at most `most` answer tokens.

    If the answer ends early, the rest of the plan is not used and what came before is as planned, because the position
    and the attention of a token depend only on the slots before it.
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


def _clamp(number: Count, least: int = -sys.maxsize, most: int = sys.maxsize) -> Count:
    return number.clamp(least, most) if isinstance(number, Tensor) else max(least, min(number, most))


@dataclass(frozen=True)
class Window:
    """A sliding window for endless streams: tokens attend to the prompt, the header and the newest clips and tokens.
    Positions do not change."""

    clips: int
    tokens: int

    def __post_init__(self):
        if min(self.clips, self.tokens) < 1:
            raise InputError(f"a window must have at least 1 clip and 1 token, not {self.clips} and {self.tokens}")

    @classmethod
    def of(cls, window: Sequence[int] | None) -> "Window | None":
        """From (clips, tokens), or None for no window. Raises InputError for anything else."""
        if window is None:
            return None
        if isinstance(window, Sequence) and len(window) == 2 and all(type(size) is int for size in window):
            check_count("window: each size", max(window))
            return cls(*window)
        raise InputError(f"window {shown(window)} must be two integers, (clips, tokens), such as (60, 300)")

    def start(self, layout: Layout, seen_visual: Count, seen_text: Count, clips: int | None) -> tuple[Count, Count]:
        """The index in the visual and in the text run of the first token that is still visible, besides the prompt and
        the header, to tokens that attend to `seen_visual` and `seen_text` tokens without a window: numbers or (L,).
        `clips` is N once it is known."""
        watched = (seen_visual - layout.prompt + layout.tokens_per_clip - 1) // layout.tokens_per_clip
        if clips is not None:
            watched = _clamp(watched, most=clips)  # the tail belongs to the last clip
        visual = layout.prompt + (watched - self.clips) * layout.tokens_per_clip
        return _clamp(visual, layout.prompt), _clamp(seen_text - self.tokens, layout.header)

    def mask(self, layout: Layout, text: Tensor, clips: int | None, query: slice = slice(None)) -> Tensor:
        """Which of L tokens in feed order are inside the window of each token of `query`: (Q, L). `text` (L,) flags the
        text side. To be combined with the mask of `attention`."""
        runs = (~text).cumsum(0), text.cumsum(0)
        visual_start, text_start = self.start(layout, *runs, clips)
        visual, tokens = runs[0] - 1, runs[1] - 1
        near_visual = (visual >= visual_start[query, None]) | (visual < layout.prompt)
        near_text = (tokens >= text_start[query, None]) | (tokens < layout.header)
        return near_text.where(text, near_visual)
