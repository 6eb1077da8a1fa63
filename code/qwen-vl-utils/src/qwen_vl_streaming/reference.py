"""Streaming in its plainest form, with which every faster implementation is compared. Knows nothing about data sets and
video files.

Feeds clips, decodes tokens, or both in one step; each stream of a batch is at a stage of its own. What enters the
model, at which positions and with which mask comes from the same functions that training uses.

    B streams   T tokens fed in one step   N clips   C hidden size   V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .model.prompts import Template
from .stream import PENALTY, Caption, Piece, Stream, penalize
from .timeline.attention import dense_mask
from .timeline.plan import Window
from .timeline.positions import row_positions
from .timeline.timeline import CLIP, Layout, ModelSchedule, Rows, Schedule
from .timeline.variants import Variant

CACHE_BLOCK = 256
"""Tokens by which the cache grows."""


class StreamCache:
    """Keys and values of B streams in feed order, each with a length of its own.

    Call `set_index` before each step. The model then calls `update` once per layer.
    """

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.index: Tensor | None = None
        self.filled = 0

    def set_index(self, index: Tensor) -> None:
        """Sets where the next step writes, (B, T). Padding after the end of a stream is overwritten later."""
        self.index, self.filled = index, int(index.max()) + 1

    def update(self, keys: Tensor, values: Tensor, layer: int, *unused, **unused_options) -> tuple[Tensor, Tensor]:
        """Stores the keys and values (B, heads, T, size) of one layer. Returns all that are filled, (B, heads, filled,
        size)."""
        if self.index is None:
            raise RuntimeError("call StreamCache.set_index before running the model")
        if layer == len(self.layers):
            empty = keys.new_zeros(*keys.shape[:2], 0, keys.shape[3])
            self.layers.append((empty, empty))
        stored = []
        for old, new in zip(self.layers[layer], (keys, values), strict=True):
            if self.filled > old.shape[2]:
                more = -(-self.filled // CACHE_BLOCK) * CACHE_BLOCK - old.shape[2]
                old = nn.functional.pad(old, (0, 0, 0, more))
            old[torch.arange(len(old))[:, None], :, self.index] = new.transpose(1, 2)
            stored.append(old)
        self.layers[layer] = tuple(stored)
        return tuple(tensor[:, :, : self.filled] for tensor in stored)


class Streams:
    """B streams over one model, with one cache and one forward pass per step."""

    def __init__(
        self,
        model,
        variant: Variant,
        templates: Sequence[Template],
        layouts: Sequence[Layout],
        penalty: float = PENALTY,
        window: Window | None = None,
        bare: bool = False,
    ):
        """`penalty` is the repetition penalty: it weakens all ids of the template and all ids written so far, except
        the end-of-slot token, which is written once per slot. 1.0 turns it off. Tokens outside a `window` are masked,
        but stay in the cache. `bare`: the last clip is empty, see `timeline.make_timeline`."""
        self.model, self.variant, self.penalty, self.window, self.bare = model, variant, penalty, window, bare
        self.streams = [Stream(variant, *pair) for pair in zip(templates, layouts, strict=True)]
        self.cache = StreamCache()
        size = len(self.streams), CACHE_BLOCK
        self.visual, self.text = (torch.zeros(size, dtype=torch.bool, device=model.device) for _ in range(2))
        self.logits = torch.zeros(len(self.streams), model.config.text_config.vocab_size, device=model.device)
        """Logits of the row that each stream fed last, before the penalty, (B, V) float32."""
        self.penalized = torch.zeros_like(self.logits, dtype=torch.bool)
        for penalized, template in zip(self.penalized, templates, strict=True):
            penalized[template.penalized] = True

    def feed(self, clips: Sequence[Tensor | None], last: Sequence[bool]) -> None:
        """Feeds the next clips of each stream: (n, tokens of a clip, C) visual tokens, or None for no clip. `last`
        flags the streams whose video ends with these clips."""
        self.step(clips, last, [False] * len(self.streams))

    def decode(self, which: Sequence[bool]) -> list[int | None]:
        """Writes one token in each stream flagged by `which`. Returns their ids, None for the others."""
        return self.step([None] * len(self.streams), [False] * len(self.streams), which)

    @torch.no_grad()
    def step(self, clips: Sequence[Tensor | None], last: Sequence[bool], decode: Sequence[bool]) -> list[int | None]:
        """`feed`, then `decode`, in one forward pass. Raises ValueError if a stream cannot."""
        pieces = []
        for stream, new, is_last, decodes in zip(self.streams, clips, last, decode, strict=True):
            mine = []
            count = 0 if new is None else len(new)
            for i in range(count):
                mine += stream.feed_clip(is_last and not self.bare and i == count - 1)
            if is_last and self.bare:
                mine += stream.feed_clip(True, empty=True)
            if decodes and (stream.ended or not stream.header_slot):
                raise ValueError("a stream can write after its first clip (offline: after its last) and until its end")
            if decodes:
                mine += stream.feed_text()
            pieces.append(mine)
        if any(pieces):
            visual_tokens = [new.flatten(0, 1) for new in clips if new is not None]
            self._feed(pieces, torch.cat(visual_tokens) if visual_tokens else None)

        chosen = self._choose() if any(decode) else []
        tokens: list[int | None] = [None] * len(self.streams)
        for i, stream in enumerate(self.streams):
            if decode[i]:
                tokens[i] = chosen[i]
                stream.write(chosen[i])
                self.penalized[i, chosen[i]] = chosen[i] != stream.template.end_of_slot
        return tokens

    def _choose(self) -> list[int]:
        """Greedy choice of each stream's next token, after the repetition penalty."""
        return penalize(self.logits, self.penalized, self.penalty).argmax(-1).tolist()

    def _feed(self, pieces: list[list[Piece]], visual_tokens: Tensor | None) -> None:
        """Runs the model over the newest tokens of all streams and keeps the logits of the last row of each."""
        device, streams = self.model.device, self.streams
        lengths = [sum(len(piece.ids) for piece in mine) for mine in pieces]
        width = max(lengths)
        start = torch.tensor([stream.fed for stream in streams], device=device)
        index = start[:, None] + torch.arange(width, device=device)
        if (missing := int(index.max()) + 1 - self.visual.shape[1]) > 0:
            self.visual, self.text = (
                nn.functional.pad(flags, (0, max(missing, flags.shape[1]))) for flags in (self.visual, self.text)
            )

        # Shorter feeds are padded at their end. No real token attends to the padding, and the next feed overwrites it.
        ids = torch.full((len(streams), width), streams[0].template.header[0])
        positions = torch.zeros(3, len(streams), width, dtype=torch.long)
        clip_rows = torch.zeros(len(streams), width, dtype=torch.bool)
        for i, (stream, mine, length) in enumerate(zip(streams, pieces, lengths, strict=True)):
            if not length:
                continue
            rows = Rows.concatenate([piece.rows for piece in mine])
            clip_rows[i, :length] = rows.part == CLIP
            ids[i, :length] = torch.tensor([token for piece in mine for token in piece.ids])
            positions[:, i, :length] = row_positions(
                rows, stream.variant, stream.layout, stream.counts, stream.clips, stream.bare
            )
            fresh = slice(stream.fed, stream.fed + length)
            self.visual[i, fresh], self.text[i, fresh] = rows.visual.to(device), rows.text.to(device)
            stream.fed += length

        self.cache.set_index(index)
        mask = dense_mask(
            self.visual[:, : self.cache.filled], self.text[:, : self.cache.filled], self.variant.parallel, index
        )
        if self.window is not None:
            for i, stream in enumerate(streams):
                text = self.text[i, : self.cache.filled]
                mask[i] &= self.window.mask(stream.layout, text, stream.clips)[index[i].clamp(max=len(text) - 1)]
        score = torch.arange(width, device=device) == torch.tensor(lengths, device=device)[:, None] - 1
        result = self.model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask,
            visual_tokens=visual_tokens,
            visual_rows=clip_rows.to(device),  # by part, because a model may write the id that stands for visual tokens
            past_key_values=self.cache,
            score=score,
        )
        self.logits[score.any(1)] = result.logits.float()


def caption(
    streams: Streams, clips: Sequence[Tensor], schedules: Sequence[Schedule | ModelSchedule], max_new_tokens=300
) -> list[Caption]:
    """Runs new `streams` to their ends by `schedules` and returns a Caption for each. `clips` holds (N, tokens of a
    clip, C) for each stream, or N-1 clips if the last one is bare. An answer has at most
    `schedule.most_tokens(max_new_tokens)` tokens. Raises ValueError if the number of clips does not match.
    """
    running = streams.streams
    for stream_clips, schedule in zip(clips, schedules, strict=True):
        if len(stream_clips) + streams.bare != schedule.clips:
            raise ValueError(f"a schedule for {schedule.clips} clips does not fit a video of {len(stream_clips)}")
    while True:
        new: list[Tensor | None] = [None] * len(running)
        last, decode = [False] * len(running), [False] * len(running)
        for i, (stream, schedule) in enumerate(zip(running, schedules, strict=True)):
            if stream.ended or len(stream.written) >= schedule.most_tokens(max_new_tokens):
                continue
            first = slot = len(stream.counts)
            slot += slot == 0 or stream.slot_over(schedule)
            while slot > first and isinstance(schedule, Schedule) and schedule.quota(slot) == 0:
                slot += 1
            if slot > first:
                new[i], last[i] = clips[i][first:slot], slot == schedule.clips
            decode[i] = True
        if not any(decode):
            break
        streams.step(new, last, decode)
    return [
        Caption(stream.written, stream.slots, stream.counts + [0] * (schedule.clips - len(stream.counts)))
        for stream, schedule in zip(running, schedules, strict=True)
    ]
