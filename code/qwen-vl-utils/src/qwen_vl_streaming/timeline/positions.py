"""Computes the three-dimensional positions of rows. Knows nothing about token ids, masks or training.

All counts are in closed form, so that one function serves a whole sample and the newest tokens of a running stream.
Positions depend on what earlier slots wrote, never on what is still to come.
"""

import math
from collections.abc import Sequence

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


def row_positions(
    rows: Rows, variant: Variant, layout: Layout, counts: Sequence[int], clips: int | None, bare: bool = False
) -> Tensor:
    """Positions (time, height, width) of any rows of a stream, int64 of shape (3, L).

    `counts` holds the answer tokens written in each slot so far, k_1, k_2, …; the slots before that of a row must be
    complete. `clips` is N if the tail has been fed or is among the rows, else None. `bare` is as in
    `timeline.make_timeline`.
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
        base_of_clip, base_of_text, written_before = _rounds(variant, layout, counts, clips, bare, upto)
        base, time = base_of_clip[slots], torch.zeros_like(rows.index)
        tail = base + (0 if bare else max(layout.grid)) + rows.index
        text = base_of_text[slots] + text_index - written_before[slots]

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


def _rounds(variant: Variant, layout: Layout, counts: Sequence[int], clips: int | None, bare: bool, upto: int):
    """For slots 0…upto (0 is unused): the base of the clip, the base of the slot's text, and the text written before.

    `feed`: clips and text follow each other. A clip takes as many positions as its longer side has tokens (the last
    one also those of the tail), a slot's text as many as it has tokens. `rounds`: a slot's text and the next clip both
    start at the end of the round, and the longer of the two ends the next round.
    """
    clip_takes = torch.full((upto + 1,), max(layout.grid))
    if clips is not None and clips <= upto:
        clip_takes[clips] = layout.tail + (0 if bare else max(layout.grid))
    text_takes = torch.zeros(upto + 1, dtype=torch.long)
    known = torch.tensor(counts[:upto], dtype=torch.long)
    text_takes[1 : 1 + len(known)] = known
    text_takes[1:2] += layout.header  # the streaming variants write the header in slot 1
    clip_takes[0] = 0

    written_before = text_takes.cumsum(0) - text_takes
    if variant.count == "feed":
        base_of_text = layout.prompt + clip_takes.cumsum(0) + written_before
        return base_of_text - clip_takes, base_of_text, written_before
    round_takes = torch.maximum(clip_takes, text_takes.roll(1))
    round_takes[:2] = clip_takes[:2]
    base_of_text = layout.prompt + round_takes.cumsum(0)
    base_of_clip = base_of_text.roll(1)
    return base_of_clip, base_of_text, written_before
