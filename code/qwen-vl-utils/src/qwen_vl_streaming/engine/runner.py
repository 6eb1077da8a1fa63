"""Runs an offline batch of streams whose plans are known when they are admitted: see `plan.py`. Knows nothing about
files and about which stream goes next.

The plan has the position of each text row and what it may attend to. These tables are on the device, so that a decode
step needs no input from the host: on a GPU it is one CUDA graph that is replayed.

    S batch slots   T text rows of a slot   C hidden size
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.prompts import Template
from ..stream import PENALTY
from ..timeline.plan import Plan
from ..timeline.timeline import NOTHING
from .cuda_graph import capture
from .decoder_layer import run_layer
from .kv_cache import BLOCK_SIZE, PagedKVCache
from .model_runner import ModelRunner
from .paged_attention import PagedAttention, PrefillAttention
from .prefill import Prefill, padded_query_blocks, padded_rows
from .ragged_attention import query_blocks_of
from .sequence import PlannedSequence
from .split_kv import kernel_settings


class Runner(ModelRunner):
    """Up to S planned streams. `prefill` feeds whole videos, `mixed_step` chunks of clips beside text, and `decode` one
    text row per stream."""

    def __init__(self, model, batch_slots: int, cache: PagedKVCache, text_capacity: int, penalty: float = PENALTY):
        super().__init__(model, batch_slots, cache, text_capacity, penalty)
        self.sequences: dict[int, PlannedSequence] = {}
        self.positions, self.seen_visual = self._slot_tensor(text_capacity), self._slot_tensor(text_capacity)
        self.produces = self._slot_tensor(text_capacity, dtype=torch.bool)
        """Whether a text row produces the id of the next row, (S, T)."""
        self.text_fed, self.text_due = self._slot_tensor(), self._slot_tensor()
        self.decode_attention = PagedAttention(
            cache,
            self.all_slots,
            cache_index=self._slot_tensor(1),
            seen_visual=self._slot_tensor(1),
            seen_text=torch.ones_like(self._slot_tensor(1)),
            groups=self.groups,
            use_flex=self.flex,
            **kernel_settings(cache, batch_slots, 1, self.groups, self.kernel_options),
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prefills: dict[int, Prefill] = {}
        """By the number of query blocks that they have room for."""
        self.graph_pool = torch.cuda.graph_pool_handle() if self.on_cuda else None
        self.capture_stream = torch.cuda.Stream(self.device) if self.on_cuda else None
        self.layer = run_layer
        self._prepare, self._finish = self._eager_prepare, self._eager_finish
        if self.on_cuda:
            self.layer = torch.compile(run_layer)
            self._prepare = self._compile_captured(self._eager_prepare)
            self._finish = self._compile_captured(self._eager_finish, chooses=True)

    def admit(self, batch_slot: int, plan: Plan, template: Template) -> None:
        """Starts a stream in the free `batch_slot`. Raises ValueError if the slot is occupied or too few cache blocks
        are free."""
        text = plan.text
        self.cache.allocate(batch_slot, len(plan.visual), len(text))
        self.sequences[batch_slot] = PlannedSequence(plan, template)
        self._reset_slot(batch_slot, template)
        rows = slice(0, len(text))
        self.positions[batch_slot, rows] = self._to_device(text.positions[0])
        self.seen_visual[batch_slot, rows] = self._to_device(text.seen_visual)
        self.produces[batch_slot, rows] = self._to_device(text.produces != NOTHING)
        self.text_fed[batch_slot].zero_()
        self.text_due[batch_slot].zero_()

    def release(self, batch_slot: int) -> None:
        """Ends the stream in `batch_slot` and frees its cache blocks."""
        del self.sequences[batch_slot]
        self.cache.free(batch_slot)
        self.text_due[batch_slot].zero_()
        self.text_fed[batch_slot].zero_()

    @torch.no_grad()
    def prefill(self, batch_slots: Sequence[int], visual_tokens: Sequence[Tensor]) -> None:
        """Feeds the whole visual run and the header of `batch_slots`, which have been fed nothing, and chooses their
        first tokens. Only for variants whose visual side never attends to text. `visual_tokens` holds a tensor (N,
        tokens of a clip, C) for each."""
        sequences = [self.sequences[batch_slot] for batch_slot in batch_slots]
        hidden, positions, cache_index, headers = [], [], [], []
        for batch_slot, sequence, visual in zip(batch_slots, sequences, visual_tokens, strict=True):
            run, header = sequence.plan.visual, self._to_device(sequence.template.header)
            hidden += [self._embed(sequence, visual), self.language.embed_tokens(header)]
            positions += [run.positions, sequence.plan.text.positions[:, : len(header)]]
            visual_row, text_row = (torch.arange(length, device=self.device) for length in (len(run), len(header)))
            logical = torch.cat([visual_row, PagedKVCache.text_block_of(len(run)) * BLOCK_SIZE + text_row])
            cache_index.append(self.cache.cache_index(self._to_device([batch_slot]), logical[None]))
            seen = int(sequence.plan.text.seen_visual[: len(header)].max())
            sees_visual = visual_row[:seen] < self.seen_visual[batch_slot, : len(header), None]
            headers.append((len(run), torch.cat([sees_visual, text_row <= text_row[:, None]], 1)))
        positions = self._to_device(torch.cat(positions, 1))[:, None]
        attention = PrefillAttention(torch.cat(cache_index, 1), headers)
        output = self.forward(torch.cat(hidden)[None], positions, attention, self.layer)
        lengths = torch.tensor([len(mask) for _, mask in headers])
        last = (torch.tensor([visual for visual, _ in headers]) + lengths).cumsum(0) - 1
        slots, next_row = self._to_device(batch_slots), self._to_device(lengths)
        self._choose(output[0, self._to_device(last)], slots, next_row, torch.ones_like(slots, dtype=torch.bool))
        self.text_fed[slots] = next_row
        for sequence in sequences:
            sequence.advance_visual(len(sequence.plan.visual))
            sequence.text_fed = len(sequence.template.header)
        self.text_due[slots] = self._to_device([sequence.text_due for sequence in sequences])

    @torch.no_grad()
    def mixed_step(self, batch_slots: Sequence[int], visual_tokens: Sequence[Tensor]) -> None:
        """Feeds `batch_slots`, which are not done, their next spans: text up to the row that produces the next token,
        or else the clips that the next text row requires. A last row that produces a token chooses it. `visual_tokens`
        as in `prefill`."""
        sequences = [self.sequences[batch_slot] for batch_slot in batch_slots]
        spans = [sequence.next_spans() for sequence in sequences]
        lengths = torch.tensor([len(text) + len(visual) for text, visual in spans])
        rows, blocks = int(lengths.sum()), sum(query_blocks_of(count, self.groups) for count in lengths.tolist())
        if self.flex:
            rows = padded_rows(rows)
        prefill = self.prefills.get(capacity := padded_query_blocks(blocks))
        if prefill is None:
            prefill = self.prefills[capacity] = Prefill(self, capacity)
        prefill.fill(rows, batch_slots, sequences, spans, visual_tokens)
        hidden = prefill.run(rows)
        answers = [sequence.answer_index(*span) for sequence, span in zip(sequences, spans, strict=True)]
        produces = torch.tensor([answer != NOTHING for answer in answers])
        next_row = [len(s.template.header) + max(answer, 0) for s, answer in zip(sequences, answers, strict=True)]
        slots, last = self._to_device(batch_slots), self._to_device(lengths.cumsum(0) - 1)
        writes = self._to_device(produces) & ~self.ended[slots]
        self._choose(hidden[last], slots, self._to_device(next_row), writes)
        for sequence, (text, visual) in zip(sequences, spans, strict=True):
            sequence.text_fed = text.stop
            if visual:
                sequence.advance_visual(visual.stop)
        self.text_fed[slots] = self._to_device([sequence.text_fed for sequence in sequences])
        self.text_due[slots] = self._to_device([sequence.text_due for sequence in sequences])

    def _embed(self, sequence: PlannedSequence, visual_tokens: Tensor) -> Tensor:
        """The input embeddings of a stream's visual run, (rows, C)."""
        embeds = self.language.embed_tokens(self._to_device(sequence.visual_ids))
        clip_rows, features = sequence.clip_rows(range(len(sequence.plan.visual)), visual_tokens)
        embeds[clip_rows] = features
        return embeds

    @torch.no_grad()
    def decode(self) -> None:
        """Feeds one text row in each slot that has one due. Its token is the id of the next row."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._decode()
        for sequence in self.sequences.values():
            sequence.text_fed = min(sequence.text_fed + 1, sequence.text_due)

    def capture(self) -> None:
        """Compiles the decode step and captures it as a CUDA graph. Call it while no slot has anything due. Does
        nothing on the CPU."""
        if self.capture_stream is not None:
            self.graph, _ = capture(self._decode, self.capture_stream)

    def _decode(self) -> None:
        ids, row, active, positions = self._prepare()
        hidden = self.forward(self.language.embed_tokens(ids), positions, self.decode_attention, self._step_layer)
        self._finish(hidden, row, active)

    def _eager_prepare(self):
        """Points the attention at the row that each slot feeds. An idle slot feeds its last row again, which changes
        nothing."""
        active = (self.text_fed < self.text_due) & ~self.ended
        row = (self.text_fed - active.logical_not().long()).clamp(min=0)[:, None]
        attention = self.decode_attention
        attention.seen_visual.copy_(self.seen_visual.gather(1, row))
        attention.seen_text.copy_(row + 1)
        token = self.cache.text_block[:, None] * BLOCK_SIZE + row
        attention.cache_index.copy_(self.cache.cache_index(attention.batch_slots, token))
        attention.refresh()
        return self.text_ids.gather(1, row), row, active, self.positions.gather(1, row).expand(3, -1, -1)

    def _eager_finish(self, hidden: Tensor, row: Tensor, active: Tensor) -> None:
        writes = active & self.produces.gather(1, row)[:, 0]
        self._choose(hidden[:, 0], self.all_slots, row[:, 0] + 1, writes)
        self.text_fed += active
