"""Passes of fixed shape over one model for many streams: visual runs taken in, words written. Knows nothing of files
and of what decides when a clip is due.

All that a word depends on lies on the device, so that nothing waits for the host between two words: the ids written,
and for each text row its position and what it may see, which the plan of a stream knows beforehand (`plan.py`). On a
GPU a step is compiled and replayed as a CUDA graph; on a CPU the same lines run as they stand.

    S seats   T text rows of a seat   n x Q rows of a pass   C hidden size   V vocabulary
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..model.prompts import Template
from ..reference import PENALTY
from ..timeline.plan import Plan
from ..timeline.timeline import NOTHING
from .decoder_layer import ONE_ROW, FusedProjections, compiled_for_one_row, run_layer
from .device_event import OTHERS_MAY_GO_ON, put
from .kv_cache import BLOCK_SIZE, PagedKVCache
from .paged_attention import PagedAttention, PrefillAttention
from .prefill import Prefill, filled_up, room_for
from .ragged_attention import RaggedAttention, blocks_of
from .sequence import PlannedSequence

PARTS = 64
"""In which the greatest of all logits is looked for."""


class Runner:
    """Up to S streams over one model."""

    flex: bool | None = None
    """FlexAttention or SDPA with a dense mask; None: FlexAttention on a GPU."""
    options: ClassVar[dict] = {"num_warps": 4, "num_stages": 3}
    """FlexAttention's kernel_options in a step, measured on an H200: by default its loads are not overlapped."""

    def __init__(self, model, batch_slots: int, cache: PagedKVCache, longest: int, penalty: float = PENALTY):
        """`longest` is T; `penalty` as in `reference.Streams`."""
        language = model.model.language_model
        self.model, self.language, self.cache, self.penalty = model, language, cache, penalty
        self.device = device = model.device
        self.fast = device.type == "cuda"
        if self.flex is None:
            self.flex = self.fast
        self.groups = language.config.num_attention_heads // language.config.num_key_value_heads
        self.layers = [FusedProjections.of(layer) for layer in language.layers]
        self.seated: dict[int, PlannedSequence] = {}

        def table(*shape, dtype=torch.long) -> Tensor:
            return torch.zeros(batch_slots, *shape, dtype=dtype, device=device)

        self.ids = table(longest + 1)
        """Token ids of the text run: the header's, then what is written, (S, T + 1)."""
        self.positions, self.seen_visual = table(longest), table(longest)
        self.produces = table(longest, dtype=torch.bool)
        """Whether a text row produces the id of the next row, (S, T)."""
        self.fed, self.due, self.end = table(), table(), table()
        self.ended = table(dtype=torch.bool)
        self.seen_ids = table(language.config.vocab_size, dtype=torch.bool)
        """The ids that the repetition penalty weakens, (S, V)."""

        everyone = torch.arange(batch_slots, device=device)
        self.view = PagedAttention(
            cache, everyone, table(1), table(1), torch.ones_like(table(1)), self.groups, self.flex, options=self.options
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.extensions: dict[int, Prefill] = {}
        """By the blocks for which they have room."""
        self.pool = torch.cuda.graph_pool_handle() if self.fast else None
        self._layer_of_step = self._layer_of_one = self.layer = run_layer
        self._aim, self._conclude = self._plain_aim, self._plain_conclude
        if self.fast:
            # Kinds and shapes of passes: beyond the defaults of 8 and 256 they would run uncompiled, without a word.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
            self._layer_of_step = torch.compile(run_layer, dynamic=False)
            self._layer_of_one = compiled_for_one_row()
            self.layer = torch.compile(run_layer)
            self._aim = torch.compile(self._plain_aim, dynamic=False)
            self._conclude = torch.compile(self._plain_conclude, dynamic=False, options=self._for_words())

    def _for_words(self) -> dict | None:
        """The compiler's options for the product that chooses a word in each seat."""
        return ONE_ROW if len(self.seen_ids) == 1 else None

    # Streams come and go

    def admit(self, batch_slot: int, plan: Plan, template: Template) -> None:
        """Give a stream the free `batch_slot`. Raises ValueError where it or its pages are not to be had."""
        text, header = plan.text, template.header
        self.cache.allocate(batch_slot, len(plan.visual), len(text))
        self.seated[batch_slot] = PlannedSequence(plan, template)
        ids = torch.zeros(len(text) + 1, dtype=torch.long)
        ids[: len(header)] = torch.tensor(header)
        own = slice(0, len(text))
        self.ids[batch_slot, : len(ids)] = self._put(ids)
        self.positions[batch_slot, own] = self._put(text.positions[0])
        self.seen_visual[batch_slot, own] = self._put(text.seen_visual)
        self.produces[batch_slot, own] = self._put(text.produces != NOTHING)
        # To fill makes nobody wait, where to assign a number does.
        for of_all, number in ((self.fed, 0), (self.due, 0), (self.end, template.end), (self.ended, False)):
            of_all[batch_slot].fill_(number)
        used = self._put([*template.prompt, template.video, *template.tail, *header])
        self.seen_ids[batch_slot].fill_(False).index_fill_(0, used, True)

    def leave(self, batch_slot: int) -> None:
        """The stream in `batch_slot` is over, and its pages are free."""
        del self.seated[batch_slot]
        self.cache.free(batch_slot)
        self.due[batch_slot].zero_()
        self.fed[batch_slot].zero_()

    # Watching

    @torch.no_grad()
    def take_in(self, batch_slots: Sequence[int], visual_tokens: Sequence[Tensor]) -> None:
        """Feed `batch_slots`, which have been fed nothing, their whole visual runs and their headers, in one row, and
        write their first words: for variants whose visual side never sees text. `visual_tokens` holds, for each, a
        tensor of (N, tokens of a clip, C)."""
        streams = [self.seated[batch_slot] for batch_slot in batch_slots]
        hidden, positions, places, leads = [], [], [], []
        for batch_slot, stream, visual in zip(batch_slots, streams, visual_tokens, strict=True):
            run, header = stream.plan.visual, self._put(stream.template.header)
            hidden += [self._embed(stream, visual), self.language.embed_tokens(header)]
            positions += [run.positions, stream.plan.text.positions[:, : len(header)]]
            row, lead = (torch.arange(length, device=self.device) for length in (len(run), len(header)))
            places.append(
                self._places(
                    [batch_slot], torch.cat([row, PagedKVCache.text_block_of(len(run)) * BLOCK_SIZE + lead])[None]
                )
            )
            seen = stream.plan.text.seen_visual[: len(header)]
            sight = row[: int(seen.max())] < self.seen_visual[batch_slot, : len(header), None]
            leads.append((len(run), torch.cat([sight, lead <= lead[:, None]], 1)))
        positions = self._put(torch.cat(positions, 1))[:, None]
        result = self.forward(
            torch.cat(hidden)[None], positions, PrefillAttention(torch.cat(places, 1), leads), self.layer
        )
        headers = torch.tensor([len(mask) for _, mask in leads])
        ends = (torch.tensor([visual for visual, _ in leads]) + headers).cumsum(0) - 1
        where, next_row = self._put(batch_slots), self._put(headers)
        self._plain_choose(result[0, self._put(ends)], where, next_row, torch.ones_like(where, dtype=torch.bool))
        self.fed[where] = next_row
        for stream in streams:
            stream.watched(len(stream.plan.visual))
            stream.text_fed = len(stream.template.header)
        self.due[where] = self._put([stream.text_due for stream in streams])

    @torch.no_grad()
    def extend(self, batch_slots: Sequence[int], visual_tokens: Sequence[Tensor]) -> None:
        """Feed `batch_slots`, which are not done, what they feed next: those that speak a word, those that wait their
        clips as far as the next text row asks. A last row that produces a word does. `visual_tokens` as
        in `take_in`."""
        streams = [self.seated[batch_slot] for batch_slot in batch_slots]
        spans = [stream.next_span() for stream in streams]
        lengths = torch.tensor([len(text) + len(visual) for text, visual in spans])
        rows, blocks = int(lengths.sum()), sum(blocks_of(count, self.groups) for count in lengths.tolist())
        if self.flex:
            rows = filled_up(rows)
        extension = self.extensions.get(room := room_for(blocks))
        if extension is None:
            extension = self.extensions[room] = Prefill(self, room)
        extension.fill(rows, batch_slots, streams, spans, visual_tokens)
        hidden = extension.run(rows)
        answers = [stream.answer_of(*span) for stream, span in zip(streams, spans, strict=True)]
        produces = torch.tensor([answer != NOTHING for answer in answers])
        next_row = [len(s.template.header) + max(answer, 0) for s, answer in zip(streams, answers, strict=True)]
        where, last = self._put(batch_slots), self._put(lengths.cumsum(0) - 1)
        self._plain_choose(hidden[last], where, self._put(next_row), self._put(produces) & ~self.ended[where])
        for stream, (text, visual) in zip(streams, spans, strict=True):
            stream.text_fed = text.stop
            if visual:
                stream.watched(visual.stop)
        self.fed[where] = self._put([stream.text_fed for stream in streams])
        self.due[where] = self._put([stream.text_due for stream in streams])

    def _put(self, numbers: Tensor | Sequence[int]) -> Tensor:
        return put(numbers, self.device)

    def _places(self, batch_slots: Sequence[int], logical: Tensor) -> Tensor:
        return self.cache.cache_index(self._put(batch_slots), logical)

    def _embed(self, stream: PlannedSequence, visual_tokens: Tensor) -> Tensor:
        """What enters the first layer for a stream's visual run, (rows, C)."""
        run = range(len(stream.plan.visual))
        embeds = self.language.embed_tokens(self._put(stream.visual_ids))
        clip, made = stream.clips_of(run, visual_tokens)
        embeds[clip] = made
        return embeds

    # Writing

    @torch.no_grad()
    def write(self) -> None:
        """Feed one text row in each seat that has one due. The row's word is the next row's id."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        for stream in self.seated.values():
            stream.text_fed = min(stream.text_fed + 1, stream.text_due)

    def capture(self) -> None:
        """Compile the step and record it as a CUDA graph, while no seat has anything due."""
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode=OTHERS_MAY_GO_ON):
                self._step()
            self.graph = graph

    def _step(self) -> None:
        ids, row, active, positions = self._aim()
        hidden = self.forward(self.language.embed_tokens(ids), positions, self.view, self._layer_of_step)
        self._conclude(hidden, row, active)

    def _plain_aim(self):
        """Set the view to the row that each seat feeds; an idle seat feeds its last again, which changes nothing."""
        active = (self.fed < self.due) & ~self.ended
        row = (self.fed - active.logical_not().long()).clamp(min=0)[:, None]
        view = self.view
        view.seen_visual.copy_(self.seen_visual.gather(1, row))
        view.seen_text.copy_(row + 1)
        token = self.cache.text_block[:, None] * BLOCK_SIZE + row
        view.places.copy_(self.cache.cache_index(view.batch_slots, token))
        view.refresh()
        return self.ids.gather(1, row), row, active, self.positions.gather(1, row).expand(3, -1, -1)

    def _plain_conclude(self, hidden: Tensor, row: Tensor, active: Tensor) -> None:
        writes = active & self.produces.gather(1, row)[:, 0]
        self._plain_choose(hidden[:, 0], self.view.batch_slots, row[:, 0] + 1, writes)
        self.fed += active

    def _plain_choose(self, hidden: Tensor, batch_slots: Tensor, next_row: Tensor, writes: Tensor) -> None:
        """Greedy choice after the repetition penalty for `hidden` (n, C), written down at `next_row` where `writes`."""
        logits = self.model.lm_head(hidden).float()
        used = self.seen_ids[batch_slots]
        weaker = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        token = first_greatest(torch.where(used, weaker, logits))
        self.ids[batch_slots, next_row] = torch.where(writes, token, self.ids[batch_slots, next_row])
        self.seen_ids[batch_slots, token] = used.gather(1, token[:, None])[:, 0] | writes
        self.ended[batch_slots] = self.ended[batch_slots] | (writes & (token == self.end[batch_slots]))

    def forward(
        self, hidden: Tensor, positions: Tensor, view: PagedAttention | RaggedAttention | PrefillAttention, layer_of
    ) -> Tensor:
        """The layers over `hidden` (n, Q, C) at `positions` (3, n, Q), normed."""
        rotary = self.language.rotary_emb(hidden, positions)
        if layer_of is self._layer_of_step and hidden.shape[:2] == (1, 1):
            layer_of = self._layer_of_one
        for layer, pool in zip(self.layers, self.cache.layers, strict=True):
            hidden = layer_of(layer, hidden, view, rotary, pool)
        return self.language.norm(hidden)


def first_greatest(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of (n, V), in parts: by itself it would be one block of a GPU's threads for each row."""
    parts = nn.functional.pad(logits, (0, -logits.shape[1] % PARTS), value=-torch.inf).unflatten(1, (PARTS, -1))
    greatest, index = parts.max(-1)
    part = greatest.argmax(-1, keepdim=True)
    return (part * parts.shape[2] + index.gather(1, part))[:, 0]
