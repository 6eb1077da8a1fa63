"""Computes the three-dimensional positions of rows. Knows nothing about token ids, masks or training.

All counts are in closed form, so that one function serves a whole sample and the newest tokens of a running stream.
Positions depend on what earlier slots wrote, never on what is still to come.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError
from .timeline import ANSWER, CLIP, PARTS, PROMPT, TAIL, Layout, Rows, Timeline
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
    """Positions (time, height, width) of any rows of a stream, int64 of shape (3, L). Other arguments as in
    `StreamPositions.start`."""
    stream, (parts, across) = StreamPositions(variant, layout), (len(PARTS), layout.grid[1])
    piece = torch.maximum(rows.clip, rows.slot) * parts + rows.part
    starts = torch.zeros(2, int(piece.max()) + 1, dtype=torch.long)
    pieces = piece.bincount().nonzero()[:, 0]
    start = [stream.start(each % parts, each // parts, counts, clips, bare) for each in pieces.tolist()]
    starts[:, pieces] = torch.tensor(start).T
    time, place = starts[:, piece]
    clip, index = rows.part == CLIP, rows.index
    height, width = (index // across).where(clip, index), (index % across).where(clip, index)
    return torch.stack([time + index.masked_fill(clip, 0), place + height, place + width])


class StreamPositions:
    """Where the pieces of one stream start: its prompt, a clip, its tail, or the text of a slot.

    Pieces may be asked for as the stream goes: what was computed for older slots is kept."""

    def __init__(self, variant: Variant, layout: Layout):
        self.variant, self.layout = variant, layout
        # For variants whose positions depend on what was written, by slot, from slot 0, which is the prompt.
        self._text_base = [layout.prompt]
        """The base of each slot's text."""
        self._written_before = [0]
        """Text tokens written before each slot."""

    def start(
        self, part: int, number: int, counts: Sequence[int], clips: int | None, bare: bool = False
    ) -> tuple[int, int]:
        """The position of the token of index 0, as (time, row and column). Those of further tokens of a clip are as
        many rows and columns past it as they are in the grid; those of other parts are their index past it, in all
        dimensions.

        `number` is that of the clip, N for the tail, or the slot that wrote the text, as if all text before it belonged
        to that slot. `counts` holds the answer tokens written in each slot so far, k_1, k_2, …; the slots before
        `number` must be complete. `clips` is N if the tail has been fed or is asked for, else None. `bare` is as in
        `timeline.make_timeline`.
        """
        variant, layout = self.variant, self.layout
        if part == PROMPT:
            return 0, 0
        if variant.after_video:
            if part == CLIP:
                return layout.prompt + _time(layout, number), layout.prompt
            start = variant.text_start
            if part == TAIL or variant.count == "stock":
                start = layout.prompt + _video_takes(layout, (clips or 1) - bare)
                start += layout.tail if part != TAIL else 0
        elif part in (CLIP, TAIL):
            start = self._clip_base(number, counts, clips, bare)
            start += max(layout.grid) if part == TAIL and not bare else 0
        else:
            self._extend(number, counts, clips, bare)
            start = self._text_base[number] - self._written_before[number]
        start += layout.header if part == ANSWER else 0
        return start, start

    def _text_takes(self, slot: int, counts: Sequence[int]) -> int:
        written = counts[slot - 1] if 0 < slot <= len(counts) else 0
        return written + (self.layout.header if slot == 1 else 0)  # the streaming variants write the header in slot 1

    def _clip_base(self, clip: int, counts: Sequence[int], clips: int | None, bare: bool) -> int:
        """`feed`: clips and text follow each other. `rounds`: a slot's text and the next clip both start at the end of
        the round."""
        self._extend(clip - 1, counts, clips, bare)
        after = self._text_takes(clip - 1, counts) if self.variant.count == "feed" else 0
        return self._text_base[clip - 1] + after

    def _extend(self, upto: int, counts: Sequence[int], clips: int | None, bare: bool) -> None:
        """A clip takes as many positions as its longer side has tokens (the last one also those of the tail), a slot's
        text as many as it has tokens. The longer of a slot's text and the next clip ends the round."""
        for slot in range(len(self._text_base), upto + 1):
            takes = 0 if bare and slot == clips else max(self.layout.grid)
            takes += self.layout.tail if slot == clips else 0
            written = self._text_takes(slot - 1, counts)
            ends = self._clip_base(slot, counts, clips, bare) + takes, self._text_base[-1] + written
            self._text_base.append(max(ends))
            self._written_before.append(self._written_before[-1] + written)


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


def _time(layout: Layout, clip: int) -> int:
    """Position steps in time from the first clip to `clip` (1…N), rounded as by the release, in float32."""
    return int(np.float32(clip - 1) * np.float32(layout.steps_per_clip))


def _video_takes(layout: Layout, clips: int) -> int:
    """How far the token after a video of `clips` clips is from the video's first position: see RULE."""
    return max(_time(layout, clips), max(layout.grid) - 1) + 1
