"""Computes a recorded session again, serially and in one full forward pass, and compares every token.

Neither uses the engine: `reference.py` and `model.forward`, with the stock layers, compute what should have been
written, with weights quantized as they were in the session.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from ..common.errors import InputError
from ..common.ties import tie_margin
from ..reference import Streams, caption
from ..sessions import GREEDY
from ..sessions.record import Record, describe_precision, identity
from ..sessions.serial import clip_shapes
from ..stream import penalize
from ..timeline.attention import dense_mask
from ..timeline.plan import Window
from ..timeline.positions import timeline_positions
from ..timeline.timeline import CLIP, NOTHING, Schedule, make_schedule, make_timeline, model_schedule_most
from ..timeline.variants import get_variant
from .clips import check_clips

ROWS = 2048
"""Rows of a full pass that are computed at a time."""
MOST_ROWS = 200_000
"""Rows of a full pass at most: their keys and values are kept."""


@dataclass(frozen=True)
class Difference:
    """A token for which the replay gives another one."""

    how: str
    """"serial" or "full pass"."""
    index: int
    slot: int
    recorded: int
    replayed: int
    margin: float
    """The logit of the replayed token minus that of the recorded one, in the full pass, after the penalty. Negative if
    only the serial run gives the replayed token."""
    allowed: float
    """A margin up to this is a tie, decided by rounding: see `tie_margin`."""

    @property
    def tie(self) -> bool:
        return abs(self.margin) <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.how}: token {self.index} (slot {self.slot}) was {self.recorded}, is replayed as {self.replayed}, "
            f"margin {self.margin:.3g}{', a tie' if self.tie else ''}"
        )


def replay(record: Record, model, clips: Sequence[Tensor], tie: float | None = None) -> list[Difference]:
    """The differences between the tokens of `record` and those of a replay; empty if all are the same.

    Args:
        clips: The clips that were fed.
        tie: Margin up to which a difference is a tie; default: the rounding error of the model's dtype.

    The serial run is free-running: only its first difference is listed, because it continues differently from there.
    The full pass is given the recorded tokens, and predicts each of them. Raises InputError if the model or the clips
    are not the recorded ones.
    """
    mine, theirs = identity(model), record.model
    if mine.get("weights") != theirs.get("weights"):
        raise InputError(
            f"the record is of {describe_precision(theirs)}, but the model is in {describe_precision(mine)}: load it "
            "with the recorded weights"
        )
    if mine["fingerprint"] != theirs["fingerprint"]:
        raise InputError(
            f"the record is of the model {theirs['path']!r}, but {mine['path']!r} has other weights: give the recorded "
            "model"
        )
    check_clips(record, clips)
    if not record.tokens:
        return []
    template = record.template
    newest = max(
        *record.tokens, *template.prompt, *template.tail, *template.header, template.video, template.end_of_slot or 0
    )
    if newest >= model.config.text_config.vocab_size:
        raise InputError(f"the record has token {newest}, which is not in the vocabulary of {mine['path']!r}")
    check_schedule(record)
    check_shapes(record, model, clips)
    seen = clips[: len(record.counts)]
    with torch.no_grad():
        tokens = [
            clip.to(model.device, model.dtype)
            if len(clip) == record.layout.tokens_per_clip
            else model.perceive(clip[None], record.layout.grid)[0]
            for clip in seen
        ]
    # If the session was cancelled, the last clip was not the last of the video: add one that no token attends to.
    counts = record.counts
    if not record.complete:
        tokens, counts = [*tokens, torch.zeros_like(tokens[0])], [*counts, 0]
    visual = torch.stack(tokens)
    serial = _serially(record, model, visual, counts)
    apart = next((i for i, token in enumerate(serial) if token != record.tokens[i]), None)
    if apart is None and len(serial) < len(record.tokens):
        raise ValueError(f"the serial run ends after {len(serial)} of {len(record.tokens)} tokens")
    found = []
    for index, logits in _full_pass(record, model, visual, counts):
        recorded, best = record.tokens[index], int(logits.argmax())
        allowed = tie_margin(logits, model.dtype) if tie is None else tie
        for how, token in (("serial", serial[index] if index == apart else recorded), ("full pass", best)):
            if token != recorded:
                margin = float(logits[token] - logits[recorded])
                found.append(Difference(how, index, record.slots[index], recorded, token, margin, allowed))
    return found


def check_shapes(record: Record, model, clips: Sequence[Tensor]) -> None:
    """Raises InputError if `clips` do not have the shape that the recorded layout says, or are fewer than the slots."""
    shapes = clip_shapes(model, record.layout)
    if len(clips) < len(record.counts) - record.bare:
        raise InputError(f"the record is of {len(record.arrived)} clips, but only {len(clips)} were given")
    for number, clip in enumerate(clips, 1):
        if tuple(clip.shape) not in shapes:
            rows, columns = record.layout.grid
            raise InputError(
                f"clip {number} has shape {tuple(clip.shape)}, but the record is of clips of {rows} x {columns} visual "
                f"tokens, which have shape {shapes[0]} or {shapes[1]}: give the video and the model of the record"
            )


def check_schedule(record: Record) -> None:
    """Raises InputError if slots have other lengths than the recorded schedule. The last slot and `greedy` are not
    checked, because the schedule does not determine them. That of model-M was checked when the record was read."""
    variant, slots, asked = get_variant(record.variant), len(record.counts), record.schedule
    if asked == GREEDY or (isinstance(asked, str) and model_schedule_most(asked) is not None):
        return
    schedule = make_schedule(asked, variant, slots + 1) if isinstance(asked, str) else Schedule(tuple(asked))
    quotas = schedule.quotas if variant.streams else (0,) * slots
    for slot, (count, quota) in enumerate(zip(record.counts[:-1], quotas, strict=False), 1):
        if count != quota:
            raise InputError(
                f"the record contradicts itself: {count} tokens in slot {slot}, for which {asked} gives {quota}"
            )


def _serially(record: Record, model, visual: Tensor, counts: Sequence[int]) -> list[int]:
    variant = get_variant(record.variant)
    options = record.penalty, Window.of(record.window), record.bare
    streams = Streams(model, variant, [record.template], [record.layout], *options)
    (written,) = caption(streams, [visual], [Schedule(tuple(counts[:-1]))], len(record.tokens))
    return written.tokens


@torch.no_grad()
def _full_pass(record: Record, model, visual: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """For each recorded token, its index and the logits (V,), after the penalty, of a forward pass over all tokens. The
    pass is computed ROWS rows at a time, because its mask would take quadratic memory."""
    template = record.template
    timeline = make_timeline(get_variant(record.variant), record.layout, counts, record.bare)
    rows, window, cache, device = timeline.rows, Window.of(record.window), DynamicCache(), model.device
    if len(rows) > MOST_ROWS:
        raise InputError(
            f"a full pass over {len(rows)} tokens exceeds the maximum of {MOST_ROWS}: replay a shorter session"
        )
    ids = template.ids(rows, record.tokens)
    positions, clip = timeline_positions(timeline)[:, None], rows.part[None] == CLIP
    predicts = timeline.produces != NOTHING
    seen = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool, device=device)
    seen[template.penalized] = True
    visual_tokens = iter(visual.flatten(0, 1).split([int(part.sum()) for part in clip[0].split(ROWS)]))
    for first in range(0, len(rows), ROWS):
        end = min(first + ROWS, len(rows))
        own = slice(first, end)
        flags = rows.visual[None, :end], rows.text[None, :end]
        mask = dense_mask(*flags, timeline.variant.parallel, torch.arange(first, end)[None])
        if window is not None:
            mask &= window.mask(record.layout, rows.text, timeline.clips, own)[:, :end]
        scored = model(
            input_ids=ids[None, own].to(device),
            position_ids=positions[..., own].to(device),
            attention_mask=mask.to(device),
            visual_tokens=next(visual_tokens),
            visual_rows=clip[:, own].to(device),
            past_key_values=cache,
            score=predicts[None, own].to(device),
        ).logits.float()
        for index, logits in zip(timeline.produces[own][predicts[own]].tolist(), scored, strict=True):
            if index:
                seen[record.tokens[index - 1]] = record.tokens[index - 1] != template.end_of_slot
            yield index, penalize(logits, seen, record.penalty)
