"""Computes the three-dimensional positions of rows. Knows nothing about token ids, masks or training.

All counts are in closed form, so that one function serves a whole sample and the newest tokens of a running stream.
Positions depend on what earlier slots wrote, never on what is still to come.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InputError
from .timeline import CLIP, HEADER, PROMPT, TAIL, Layout, Rows, Timeline
from .variants import Variant

RULE = "largest+1"
"""Name of the rule for what follows a video in `origin`, `batch`, `group` and `gap`. A trained checkpoint's config.json
has it as `position_rule`.

The next token is one after the largest position that the video has in any of the three dimensions. Qwen2.5-VL was
trained with this rule; transformers up to 5.2, vLLM and SGLang use it. transformers 5.3 to 5.23 start at max(rows,
columns) past the video's first position, which is inside the range of a video of more than a few seconds.
"""


def timeline_positions(timeline: Timeline) -> Tensor:
    """Positions of a whole sample, int64 of shape (3, L)."""
    of = timeline
    return row_positions(of.rows, of.variant, of.layout, of.counts, of.clips, of.bare)


@dataclass
class RoundSums:
    """What a running stream need not add up again for each of its rows: the sums over its oldest slots."""

    slot: int = 0
    """The newest of these slots; 0 for none."""
    base_of_text: int = 0
    """Of that slot, after the prompt."""
    written_before: int = 0
    """Text tokens written before that slot."""


def row_positions(
    rows: Rows,
    variant: Variant,
    layout: Layout,
    counts: Sequence[int],
    clips: int | None,
    bare: bool = False,
    sums: RoundSums | None = None,
) -> Tensor:
    """Positions (time, height, width) of any rows of a stream, int64 of shape (3, L).

    `counts` holds the answer tokens written in each slot so far, k_1, k_2, …; the slots before that of a row must be
    complete. `clips` is N if the tail has been fed or is among the rows, else None. `bare` is as in
    `timeline.make_timeline`. `sums`, which this updates, belong to one stream: its rows must come in the order in which
    they are fed.
    """
    across = layout.grid[1]
    text_index = torch.where(rows.part == HEADER, rows.index, rows.index + layout.header)

    if variant.after_video:
        base, time = torch.full_like(rows.index, layout.prompt), _time(layout, rows.clip)
        after = layout.prompt + _video_takes(layout, (clips or 1) - bare)
        tail = after + rows.index
        text = text_index + (after + layout.tail if variant.count == "stock" else variant.text_start)
    else:
        slots = torch.maximum(rows.clip, rows.slot)
        upto = max(1, int(slots.max()))
        sums = sums or RoundSums()
        base_of_clip, base_of_text, written_before = _rounds(variant, layout, counts, clips, bare, upto, sums)
        at = (slots - sums.slot).clamp(min=0)  # the prompt has no slot
        base, time = base_of_clip[at], torch.zeros_like(rows.index)
        tail = base + (0 if bare else max(layout.grid)) + rows.index
        text = base_of_text[at] + text_index - written_before[at]
        # The newest token that was written before may still have to be fed.
        wrote = written_before.diff().nonzero()
        place = min(int(torch.where(slots > 0, at, upto).min()) - 2, int(wrote[-1]) if len(wrote) else 0)
        if place > 0:
            sums.base_of_text = int(base_of_text[place]) - layout.prompt
            sums.slot, sums.written_before = sums.slot + place, int(written_before[place])

    in_clip = torch.stack([base + time, base + rows.index // across, base + rows.index % across])
    flat = torch.where(rows.part == PROMPT, rows.index, torch.where(rows.part == TAIL, tail, text))
    return torch.where(rows.part == CLIP, in_clip, flat)


def clips_before_text(variant: Variant, layout: Layout) -> int | None:
    """The largest number of clips whose positions, with the tail's, stay below those of the text. None if the two may
    share positions or the text comes after the video. With more clips, positions that a variant keeps apart would
    overlap."""
    if not variant.text_start:
        return None
    left = variant.text_start - layout.prompt - layout.tail - 1  # for the newest clip's time, or its rows and columns
    return max(0, math.ceil((left + 1) / layout.steps_per_clip)) if left >= max(layout.grid) - 1 else 0


def check_clips(variant: Variant, layout: Layout, clips: int) -> None:
    """Raises InputError if a video has more clips than `clips_before_text`."""
    most = clips_before_text(variant, layout)
    if most is not None and clips > most:
        raise InputError(
            f"{clips} clips are too many for {variant.name}: after {most} their positions reach {variant.text_start}, "
            "where those of its text start; give a shorter video, or use group"
        )


def _time(layout: Layout, clip: Tensor) -> Tensor:
    """Position steps in time from the first clip to each `clip` (1…N), int64."""
    return ((clip - 1) * layout.steps_per_clip).long()


def _video_takes(layout: Layout, clips: int) -> int:
    """How far the token after a video of `clips` clips is from the video's first position: see RULE."""
    return max(int(_time(layout, torch.tensor(clips))), max(layout.grid) - 1) + 1


def _rounds(
    variant: Variant, layout: Layout, counts: Sequence[int], clips: int | None, bare: bool, upto: int, sums: RoundSums
) -> tuple[Tensor, Tensor, Tensor]:
    """For slots `sums.slot`…upto: the base of the clip (unused for the first), the base of the slot's text, and the
    text written before.

    `feed`: clips and text follow each other. A clip takes as many positions as its longer side has tokens (the last
    one also those of the tail), a slot's text as many as it has tokens. `rounds`: a slot's text and the next clip both
    start at the end of the round, and the longer of the two ends the next round.
    """
    first = sums.slot
    clip_takes = torch.full((upto + 1 - first,), max(layout.grid))
    if clips is not None and clips <= upto:
        clip_takes[clips - first] = layout.tail + (0 if bare else max(layout.grid))
    clip_takes[0] = 0  # in the sums
    text_takes = torch.zeros(upto + 1 - first, dtype=torch.long)
    known = torch.tensor(counts[max(first - 1, 0) : upto], dtype=torch.long)
    begin = int(first == 0)  # there is no slot 0
    text_takes[begin : begin + len(known)] = known
    if first <= 1:
        text_takes[1 - first] += layout.header  # the streaming variants write the header in slot 1

    start, written_here = layout.prompt + sums.base_of_text, text_takes.cumsum(0) - text_takes
    written_before = sums.written_before + written_here
    if variant.count == "feed":
        base_of_text = start + clip_takes.cumsum(0) + written_here
        return base_of_text - clip_takes, base_of_text, written_before
    round_takes = torch.maximum(clip_takes, text_takes.roll(1))
    round_takes[0] = 0
    base_of_text = start + round_takes.cumsum(0)
    return base_of_text.roll(1), base_of_text, written_before
