"""Parts, clips, slots, feed order, schedules and targets. Knows nothing about token ids, models or files.

A timeline lists, for each token in the order in which it enters the model, its part, its clip or answer index, and the
slot in which it was written. Positions and attention follow from it.

    L tokens   N clips   A answer tokens, the end-of-turn token included
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..common.errors import InputError
from ..common.numbers import shown
from .variants import Variant

PARTS = ("prompt", "clip", "tail", "header", "answer")
PROMPT, CLIP, TAIL, HEADER, ANSWER = range(len(PARTS))
SCHEDULE_NAME = re.compile(r"(wait|random)-([1-9][0-9]{0,5})")
MODEL_SCHEDULE_NAME = re.compile(r"model-([1-9][0-9]{0,5})")
MAX_PER_SLOT = 999_999
"""Largest K or M of a named schedule."""
NOTHING = -1
"""In `Timeline.produces`: the row predicts no answer token."""


@dataclass(frozen=True)
class Layout:
    """The sizes of a stream, known from its start. All but `steps_per_clip` are token counts."""

    prompt: int
    """System text and question, up to and including `<|vision_start|>`."""
    tail: int
    header: int
    grid: tuple[int, int]
    """Visual tokens of one clip after merging: rows × columns."""
    steps_per_clip: float = 2.0
    """Time between two clips in position steps: the model's `tokens_per_second` × seconds per clip."""

    def __post_init__(self):
        if min(self.prompt, self.tail, self.header, *self.grid) < 1 or self.steps_per_clip <= 0:
            raise ValueError(f"a layout's sizes must be at least 1, and its steps_per_clip above 0: got {self}")

    @property
    def tokens_per_clip(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Rows:
    """What the rules know of L tokens. Each field is an int64 tensor of shape (L,)."""

    part: Tensor
    clip: Tensor
    """1…N for the tokens of a clip, N for the tail, else 0."""
    index: Tensor
    """Counts within the prompt, the clip, the tail, the header or the answer, from 0."""
    slot: Tensor
    """The slot that wrote the token, 1…N; 0 for the prompt and the visual side."""

    def __len__(self) -> int:
        return self.part.shape[0]

    def __getitem__(self, key) -> "Rows":
        return Rows(self.part[key], self.clip[key], self.index[key], self.slot[key])

    @property
    def visual(self) -> Tensor:
        return (self.part == CLIP) | (self.part == TAIL)

    @property
    def text(self) -> Tensor:
        return self.part >= HEADER

    @staticmethod
    def of(part: int, count: int, clip: int = 0, slot: int = 0, first: int = 0) -> "Rows":
        """`count` tokens of one part, whose index starts at `first`."""
        full = torch.full((3, count), 0)
        full[0], full[1], full[2] = part, clip, slot
        return Rows(full[0], full[1], torch.arange(first, first + count), full[2])

    @staticmethod
    def concatenate(pieces: Sequence["Rows"]) -> "Rows":
        return Rows(*(torch.cat([getattr(piece, field.name) for piece in pieces]) for field in fields(Rows)))


@dataclass(frozen=True)
class Schedule:
    """How many answer tokens each slot may write. The last slot writes the rest and has no quota."""

    quotas: tuple[int, ...]
    """Slots 1…N-1; each at least 0."""

    def __post_init__(self):
        if min(self.quotas, default=0) < 0:
            raise ValueError(f"a slot must write at least 0 tokens, got {self.quotas}")

    @property
    def clips(self) -> int:
        return len(self.quotas) + 1

    def quota(self, slot: int) -> float:
        """Tokens that `slot` (1…N) may write. Infinite for the last."""
        return self.quotas[slot - 1] if slot < self.clips else float("inf")

    def most_tokens(self, max_new_tokens: int) -> int:
        """The most tokens of an answer that may say `max_new_tokens`: as many."""
        return max_new_tokens

    def counts(self, answer: int) -> tuple[int, ...]:
        """k_1 … k_N of an answer of `answer` tokens, which may end before the last slot."""
        counts, left = [], answer
        for quota in self.quotas:
            counts.append(min(quota, left))
            left -= counts[-1]
        return (*counts, left)


@dataclass(frozen=True)
class ModelSchedule:
    """The model decides: a slot ends with the end-of-slot token, which counts as one of its tokens, or after `most`
    tokens. The last slot writes the rest. How many tokens each slot has is known once it is over."""

    clips: int
    most: int

    def __post_init__(self):
        if min(self.clips, self.most) < 1:
            raise ValueError(f"a schedule must have at least 1 clip and 1 token per slot, got {self}")

    @property
    def name(self) -> str:
        return f"model-{self.most}"

    def most_tokens(self, max_new_tokens: int) -> int:
        """The most tokens of an answer that may say `max_new_tokens`: one more for each slot before the last, whose
        end-of-slot token says nothing. A video of many silent slots is not cut short by them."""
        return max_new_tokens + self.clips - 1


def model_schedule_most(text: str) -> int | None:
    """M, the most tokens of a slot, if `text` is model-M. None for any other text."""
    match = MODEL_SCHEDULE_NAME.fullmatch(text) if isinstance(text, str) else None
    return int(match[1]) if match else None


def model_schedule_fault(
    tokens: Sequence[int], counts: Sequence[int], most: int, end_of_slot: int | None, complete: bool = True
) -> str | None:
    """How slots of `counts` tokens differ from what a ModelSchedule with these `tokens` gives, or None. `complete`: the
    last of `counts` is the last slot, which writes the rest."""
    if end_of_slot is None:
        return "there is no end-of-slot token"
    done, answer = 0, len(tokens)
    for slot, count in enumerate(counts[: len(counts) - complete], 1):
        own, done = tokens[done : done + count], done + count
        if count > most or end_of_slot in own[:-1]:
            return f"slot {slot} goes on after its end"
        # Only the end of the answer, or of what was recorded, can stop a slot before its end.
        if done < answer and count < most and own[-1:] != [end_of_slot]:
            return f"slot {slot} has ended before its end"
    return None


def make_schedule(text: str, variant: Variant, clips: int, seed: int | str = 0) -> Schedule:
    """The schedule that `text` names, for a video of `clips` clips.

    `wait-K` writes K tokens per slot. With `random-K` each slot writes between 1 and 2K-1 tokens, drawn uniformly with
    `seed`, so K on average. Offline variants write everything in the last slot. Raises InputError for any other text.
    """
    match = SCHEDULE_NAME.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise InputError(
            f"unknown schedule {shown(text)}: give wait-K or random-K with K from 1 to {MAX_PER_SLOT}, such as wait-3"
        )
    k = int(match[2])
    if not variant.streams:
        return Schedule((0,) * (clips - 1))
    if match[1] == "wait":
        return Schedule((k,) * (clips - 1))
    draw = random.Random(f"{seed}")
    return Schedule(tuple(draw.randint(1, 2 * k - 1) for _ in range(clips - 1)))


@dataclass(frozen=True)
class Timeline:
    """All tokens of one sample in feed order."""

    variant: Variant
    layout: Layout
    counts: tuple[int, ...]
    """k_1 … k_N, the answer tokens written in each slot."""
    bare: bool
    """Clip N is empty: see `make_timeline`."""
    rows: Rows
    produces: Tensor
    """The answer index that each row predicts, or NOTHING, int64 (L,)."""

    @property
    def clips(self) -> int:
        return len(self.counts)


def make_timeline(variant: Variant, layout: Layout, counts: Sequence[int], bare: bool = False) -> Timeline:
    """The timeline of a whole sample whose N = len(counts) slots wrote `counts` answer tokens.

    `bare`: clip N is empty, so that the tail enters by itself. This is how a live source ends, because its end is only
    known when no further clip arrives. Raises InputError if there are no clips or no answer tokens, and ValueError if
    an offline variant would write before its last slot.
    """
    clips, answer = len(counts), sum(counts)
    if clips < 1 + bare:
        raise InputError("a video needs at least one clip (two frames): remove it from the data")
    if answer < 1:
        raise InputError("a caption needs at least one token: remove the sample from the data")
    if not variant.streams and answer != counts[-1]:
        raise ValueError(f"{variant.name} writes in the last slot only, got counts {tuple(counts)}")

    header_slot = 1 if variant.streams else clips
    rows = Rows.concatenate(
        [
            Rows.of(PROMPT, layout.prompt),
            *(Rows.of(CLIP, layout.tokens_per_clip, clip=clip) for clip in range(1, clips + 1 - bare)),
            Rows.of(TAIL, layout.tail, clip=clips),
            Rows.of(HEADER, layout.header, slot=header_slot),
            Rows.of(ANSWER, answer),
        ]
    )
    text = len(rows) - answer - layout.header
    rows.slot[text + layout.header :] = torch.repeat_interleave(torch.arange(1, clips + 1), torch.tensor(counts))

    # A text token is fed to produce the next one. If the next one is written in a later slot, the token is therefore
    # fed after that slot's clip.
    feed_slot = torch.maximum(rows.clip, rows.slot)
    if variant.parallel:
        last = text + layout.header - 1
        feed_slot[last:-1] = rows.slot[last + 1 :]
        feed_slot[-1] = min(int(rows.slot[-1]) + 1, clips)
    order = torch.argsort(feed_slot * len(PARTS) + rows.part, stable=True)

    # Before reordering, text is contiguous: the row before an answer token is the text token before it.
    produces = torch.full((len(rows),), NOTHING)
    if variant.parallel:
        produces[text + layout.header - 1 : -1] = torch.arange(answer)
        produces = produces[order]
    rows = rows[order]
    if not variant.parallel:
        written = (rows.part == ANSWER).nonzero().squeeze(1)
        produces[written - 1] = rows.index[written]
    return Timeline(variant, layout, tuple(counts), bare, rows, produces)
