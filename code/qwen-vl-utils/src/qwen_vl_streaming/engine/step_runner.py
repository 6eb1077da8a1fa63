"""Runs steps of live streams, whose text and clips are not known in advance: text rows, chunks of clips, or both.

A step has D decode rows, each of another batch slot, and n prefill chunks of W rows, each of any slot; several may be
of one. Each request takes a decode row, even if its slot only prefills. D is one of a few numbers and not S, since idle
rows are computed, too. `stream_state.py` says which rows are due. The host sends all inputs of a step in one copy;
token ids, keys and values stay on the device, and no step waits for the host. On a GPU each kind of step is one CUDA
graph. Knows nothing about when a clip is due.

    S batch slots   R = D + n W rows of a step   C hidden size
"""

import functools
import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import InputError
from ..model.prompts import Template
from ..stream import PENALTY
from ..timeline.plan import Window
from ..timeline.timeline import Layout
from .cuda_graph import capture
from .device_event import DeviceEvent
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET, BlockTable, PagedKVCache
from .model_runner import ModelRunner
from .paged_attention import MixedAttention
from .step_inputs import StepInputs
from .step_request import BatchSlot, PendingToken, StepRequest
from .stream_state import DueRows
from .vision_encoder import ClipFeatures, VisionEncoder

StepShape = tuple[int, int]
"""Decode rows and chunks of a step, (D, n)."""
StepKind = tuple[StepShape, bool]
"""The shape of a step, and whether tokens are chosen in it."""
CLIPS_AHEAD = 2
"""Clips that may be fed before the slots that attend to them begin."""


def chunk_counts_of(chunks: int) -> list[int]:
    """The numbers of chunks that steps have if a clip is `chunks` of them: powers of two, which leave at most every
    second chunk idle, so that few kinds of steps are captured."""
    return [*(1 << power for power in range((chunks - 1).bit_length())), chunks]


FEW_DECODE_ROWS = 32
"""Decode rows of steps in which few of many slots take part."""


def decode_counts_of(batch_slots: int) -> list[int]:
    """The numbers of decode rows that steps of `batch_slots` slots have. These are few, since each is compiled and
    captured with each number of chunks."""
    return [FEW_DECODE_ROWS, batch_slots] if batch_slots >= 4 * FEW_DECODE_ROWS else [batch_slots]


class StepRunner(ModelRunner):
    """Steps over one model for up to S live streams."""

    def __init__(
        self,
        model,
        batch_slots: int,
        num_blocks: int,
        *,
        blocks_per_slot: int,
        text_capacity: int,
        clip_tokens: int,
        chunk_size: int,
        chunk_counts: Sequence[int] = (0, 1),
        decode_counts: Sequence[int] | None = None,
        clip_chunks: int = 1,
        windowed: bool = False,
        penalty: float = PENALTY,
    ):
        """Allocates `num_blocks` cache blocks, of which a slot has at most `blocks_per_slot`. `text_capacity` is the
        most text tokens that a slot attends to, `clip_tokens` the most visual tokens of a clip, and `chunk_size` is W.
        Steps have one of `chunk_counts` chunks, of which a slot has at most `clip_chunks`, and one of `decode_counts`
        decode rows, or one for each slot; default: as `decode_counts_of`. `windowed` allows endless streams with a
        sliding window."""
        config = model.model.language_model.config
        if model.device.type == "cuda":
            gc.collect()  # an earlier runner's tensors are in reference cycles, and would keep their memory
        cache = PagedKVCache(config, batch_slots, num_blocks, blocks_per_slot, model.dtype, model.device)
        super().__init__(model, batch_slots, cache, text_capacity, penalty)
        self.chunk_size, self.windowed, self.chunk_counts = chunk_size, windowed, sorted({*chunk_counts})
        self.clip_chunks = clip_chunks
        counts = decode_counts_of(batch_slots) if decode_counts is None else decode_counts
        self.decode_counts = sorted({*(count for count in counts if count < batch_slots), batch_slots})
        # Each chunk may be of another slot, which needs a row.
        self.shapes: list[StepShape] = [
            (rows, chunks)
            for rows in self.decode_counts
            for chunks in self.chunk_counts
            if rows >= min(chunks, batch_slots)
        ]
        fewest = {shape[1]: shape for shape in reversed(self.shapes) if shape[1]}
        self.kinds: list[StepKind] = [
            *((fewest[chunks], False) for chunks in sorted(fewest)),
            *((shape, True) for shape in self.shapes),
        ]
        """All kinds of steps. In one that chooses no token, each slot has a chunk, so it has the fewest decode rows."""
        hidden = {"dtype": model.dtype, "device": self.device}
        self.clip_features = torch.zeros(batch_slots, clip_tokens, config.hidden_size, **hidden)
        """The features of the clip that each slot feeds, (S, tokens of a clip, C)."""
        self.last_hidden = torch.zeros(batch_slots, config.hidden_size, **hidden)
        """The hidden state from which each slot's next token is chosen, (S, C)."""
        self.new_tokens = self._slot_tensor()
        self.inputs: dict[StepShape, StepInputs] = {}
        self.attentions: dict[StepShape, MixedAttention] = {}
        for shape in self.shapes:
            self.inputs[shape] = StepInputs(batch_slots, *shape, chunk_size, text_capacity, self.device)
            chunks = shape[1], chunk_size
            self.attentions[shape] = MixedAttention(
                cache, shape[0], chunks, self.groups, self.flex, self.kernel_options, windowed
            )
        self.graphs: dict[StepKind, torch.cuda.CUDAGraph] = {}
        self.free_slots = list(range(batch_slots - 1, -1, -1))
        self.vision_encoder = VisionEncoder(model)
        self._prepare, self._keep_hidden = self._eager_prepare, self._eager_keep_hidden
        self._choose_tokens = self._eager_choose_tokens
        if self.on_cuda:
            self._prepare = self._compile_captured(self._eager_prepare)
            self._keep_hidden = self._compile_captured(self._eager_keep_hidden)
            self._choose_tokens = self._compile_captured(self._eager_choose_tokens, chooses=True)

    @staticmethod
    def token_capacity(layout: Layout, clips: int, max_new_tokens: int, window: Window | None) -> tuple[int, int]:
        """Tokens of the visual and of the text run that a stream needs room for."""
        visual, text = clips * layout.tokens_per_clip, max_new_tokens
        if window is not None:  # and two blocks, because the last one that is kept and the newest are not full
            visual = (window.clips + CLIPS_AHEAD) * layout.tokens_per_clip + 2 * BLOCK_SIZE
            text = window.tokens + 1 + 2 * BLOCK_SIZE
        return layout.prompt + visual + layout.tail, layout.header + text

    @classmethod
    def single(
        cls,
        model,
        layout: Layout,
        clips: int,
        max_new_tokens: int,
        chunk_size: int | None,
        penalty: float,
        window: Window | None,
        chunks: int = 1,
        chunk_counts: Sequence[int] | None = None,
    ) -> "StepRunner":
        """A runner for one stream of at most `clips` clips and `max_new_tokens` tokens, or for an endless one with a
        `window`. A clip and the tail are at most `chunks` chunks, or several steps if `chunk_size` is smaller."""
        visual, text = cls.token_capacity(layout, clips, max_new_tokens, window)
        blocks, whole = PagedKVCache.blocks_needed(visual, text), layout.tokens_per_clip + layout.tail
        return cls(
            model,
            1,
            blocks,
            blocks_per_slot=blocks,
            text_capacity=text,
            clip_tokens=layout.tokens_per_clip,
            chunk_size=min(chunk_size or -(-whole // chunks), whole),
            chunk_counts=chunk_counts or [0, *chunk_counts_of(chunks)],
            clip_chunks=chunks,
            windowed=window is not None,
            penalty=penalty,
        )

    def acquire(
        self, template: Template, layout: Layout, clips: int, max_new_tokens: int, window: Window | None = None
    ) -> BatchSlot:
        """Gives a new stream a batch slot and cache blocks. What an earlier stream left there is never visible. Raises
        InputError if no slot is free or the stream does not fit."""
        visual, text = self.token_capacity(layout, clips, max_new_tokens, window)
        needed, free = PagedKVCache.blocks_needed(visual, text), len(self.cache.free_blocks)
        gib = PagedKVCache.block_bytes(self.language.config, self.model.dtype) / 2**30
        batch_slots = len(self.all_slots)
        if not self.free_slots:
            raise InputError(f"all {batch_slots} batch slots are in use: close a session first, or allow more sessions")
        if needed > self.cache.block_tables.shape[1] or text > self.text_capacity or (window and not self.windowed):
            raise InputError(
                f"a session of {clips} clips and {max_new_tokens} tokens does not fit in a StepRunner made for shorter "
                "ones: give it fewer clips or tokens"
            )
        if layout.tokens_per_clip > self.clip_features.shape[1]:
            raise InputError(
                f"a clip of {layout.tokens_per_clip} visual tokens does not fit in a StepRunner made for at most "
                f"{self.clip_features.shape[1]}: give it fewer pixels"
            )
        if needed > free:
            raise InputError(
                f"one more session needs {needed * gib:.3f} GiB for its keys and values, but {free * gib:.3f} are free "
                f"with {batch_slots - len(self.free_slots)} sessions running: close one, or give it fewer clips, "
                "tokens or pixels"
            )
        index = self.free_slots.pop()
        self.cache.allocate(index, visual, text)
        self.cache.kept_tokens[0, index].fill_(layout.prompt)
        self.cache.kept_tokens[1, index].fill_(layout.header)
        self._reset_slot(index, template)
        blocks, text_block = self.cache.allocated[index], PagedKVCache.text_block_of(visual)
        return BatchSlot(
            index,
            layout,
            BlockTable(self.cache, blocks[:text_block], 0, layout.prompt),
            BlockTable(self.cache, blocks[text_block:], TEXT_OFFSET, layout.header),
        )

    def release(self, batch_slot: BatchSlot) -> None:
        """Frees the slot and its cache blocks."""
        self.cache.free(batch_slot.index)
        self.free_slots.append(batch_slot.index)

    def set_clip_features(self, batch_slot: BatchSlot, features: ClipFeatures) -> None:
        """Sets what the next clip rows of `batch_slot` are made of. The device waits for `features`, the host does
        not."""
        features.ready.stream_wait(features.tokens)
        self.clip_features[batch_slot.index, : len(features.tokens)] = features.tokens

    def prefill(self, batch_slot: BatchSlot, due: DueRows) -> None:
        """Feeds `due` in as many steps as it takes."""
        width = self.chunk_size * self.clip_chunks
        for first in range(0, len(due), width):
            self.step([StepRequest(batch_slot, DueRows.empty(), due[first : first + width], False)])

    def kind_of(self, requests: Sequence[StepRequest]) -> StepKind:
        """The kind of the step for `requests`: the one with the fewest rows that has room for them."""
        chunks, sample = sum(each.chunks(self.chunk_size) for each in requests), any(each.sample for each in requests)
        shapes = [shape for shape, samples in self.kinds if samples == sample]
        fitting = [(rows, most) for rows, most in shapes if rows >= len(requests) and most >= chunks]
        return min(fitting, key=lambda shape: shape[0] + shape[1] * self.chunk_size), sample

    @torch.no_grad()
    def step(self, requests: Sequence[StepRequest]) -> PendingToken | None:
        """Runs one step for `requests`, each of a different batch slot. Returns the tokens if any are chosen."""
        shape, sample = kind = self.kind_of(requests)
        self.inputs[shape].set(requests)
        if kind in self.graphs:
            self.graphs[kind].replay()
        else:
            self._step(shape, sample)
        if not sample:
            return None
        ids = torch.empty(len(self.new_tokens), dtype=torch.long, pin_memory=self.on_cuda)
        ids.copy_(self.new_tokens, non_blocking=True)
        return PendingToken(ids, DeviceEvent(self.device))

    def _step(self, shape: StepShape, sample: bool) -> None:
        """What a CUDA graph contains. Reads only tensors on the device."""
        hidden, rotary = self._prepare(shape)
        hidden = self._run_layers(hidden, rotary, self.attentions[shape], self._step_layer)
        chosen = self._keep_hidden(hidden, shape)
        if sample:
            self._choose_tokens(chosen, shape)

    def _eager_prepare(self, shape: StepShape) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs = self.inputs[shape]
        table, slots, _ = inputs.split(inputs.values)
        self.attentions[shape].update(table[3], table[4:8], slots)
        decode_slots, chunk_slots = slots.split(shape)
        slots = torch.cat([decode_slots, chunk_slots.repeat_interleave(self.chunk_size)])
        text, clip = table[9], table[10]
        ids = self.text_ids[slots, text.clamp(min=0)].where(text >= 0, table[8])
        hidden = self.language.embed_tokens(ids)
        hidden = self.clip_features[slots, clip.clamp(min=0)].where((clip >= 0)[:, None], hidden)
        return hidden[None], self.language.rotary_emb(hidden[None], table[:3, None])

    def _eager_keep_hidden(self, hidden: Tensor, shape: StepShape) -> Tensor:
        """Returns the hidden states to choose tokens from, (D, C). Not with what chooses them, whose product with one
        row would normalize `hidden` again for each output."""
        inputs = self.inputs[shape]
        _, slots, (choose, _, _) = inputs.split(inputs.values)
        slots = slots[: shape[0]]
        chosen = self.language.norm(hidden[0, choose.clamp(min=0)])
        chosen = chosen.where((choose >= 0)[:, None], self.last_hidden[slots])
        self.last_hidden[slots] = chosen
        return chosen

    def _eager_choose_tokens(self, chosen: Tensor, shape: StepShape) -> None:
        inputs = self.inputs[shape]
        _, slots, (_, samples, next_row) = inputs.split(inputs.values)
        slots = slots[: shape[0]]
        self._choose(chosen, slots, next_row, samples > 0)
        self.new_tokens[slots] = self.text_ids[slots, next_row]

    def warm_up(self, sample: bool = True) -> None:
        """Compiles each kind of step and captures it as a CUDA graph. Call it while nothing is due. Does nothing on the
        CPU. With `sample=False` the kinds that choose tokens are skipped."""
        if not self.on_cuda:
            return
        # A high priority, so that steps go before the vision tower, whose stream has the default one.
        stream, pool = torch.cuda.Stream(self.device, priority=-1), torch.cuda.graph_pool_handle()
        for shape, samples in reversed(self.kinds):  # the largest first: smaller ones reuse its memory
            if sample or not samples:
                self.inputs[shape].set([])
                step = functools.partial(self._step, shape, samples)
                self.graphs[shape, samples], _ = capture(step, stream, pool)
