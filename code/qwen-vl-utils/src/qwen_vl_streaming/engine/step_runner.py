"""Passes of few fixed shapes for streams that are not known beforehand: words, pieces of clips, or both at once.

Each stream has a seat. In a pass every seat has one row for a word, and n pieces of W rows go to whoever has something
to take in; `stream_state.py` says which rows are due. All of a pass goes to the device in one copy, ids and keys stay
there, and nothing in a pass waits for the host: on a GPU each shape of pass is recorded as a CUDA graph. Knows nothing
of what decides when.

    S seats   R = S + n W rows of a pass   C hidden size
"""

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import InputError
from ..model.prompts import Template
from ..reference import PENALTY
from ..timeline.plan import Window
from ..timeline.timeline import CLIP, Layout
from .device_event import DeviceEvent
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET, PagedKVCache
from .paged_attention import MixedAttention
from .runner import Runner
from .step_request import BatchSlot, BlockTable, PendingToken, StepRequest
from .stream_state import DueRows
from .vision_encoder import ClipFeatures, VisionEncoder

ROW_FIELDS = 11  # of each row of a pass, see Passes._fill
CLIPS_AHEAD = 2
"""Clips that may be taken in before the slots begin that see them."""


class StepRunner(Runner):
    """Passes over one model for up to S streams."""

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
        windowed: bool = False,
        penalty: float = PENALTY,
    ):
        """`pages` in all, of which a seat has at most `columns`, and `longest` text tokens in sight; `clip` is the most
        visual tokens of a clip, `width` is W, and `pieces` are the numbers of pieces that passes come with. `windows`:
        streams may be without end."""
        config = model.model.language_model.config
        if model.device.type == "cuda":
            gc.collect()  # parts of earlier passes refer to each other, and would keep their memory
        super().__init__(
            model,
            batch_slots,
            PagedKVCache(config, batch_slots, num_blocks, blocks_per_slot, model.dtype, model.device),
            text_capacity,
            penalty,
        )
        self.chunk_size, self.windowed, self.chunk_counts = chunk_size, windowed, sorted(chunk_counts)
        self.all_slots = torch.arange(batch_slots, device=self.device)
        self.clip_features = torch.zeros(
            batch_slots, clip_tokens, config.hidden_size, dtype=model.dtype, device=self.device
        )
        """The visual tokens that the clip rows of each seat are made of."""
        self.last_hidden = torch.zeros(batch_slots, config.hidden_size, dtype=model.dtype, device=self.device)
        """What came out for the newest row of each seat that a word may be chosen from."""
        self.new_tokens = torch.zeros(batch_slots, dtype=torch.long, device=self.device)
        self.inputs, self.attentions = {}, {}
        for many in self.chunk_counts:
            length = ROW_FIELDS * self._rows(many) + many + 3 * batch_slots
            self.inputs[many] = torch.zeros(length, dtype=torch.long, device=self.device)
            self.attentions[many] = MixedAttention(
                self.cache, (many, chunk_size), self.groups, self.flex, self.options, windowed
            )
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.free_slots = list(range(batch_slots - 1, -1, -1))
        self._enter, self._choose = self._plain_enter, self._plain_choose_all
        self.vision_encoder = VisionEncoder(model)
        if self.fast:
            self._enter = torch.compile(self._plain_enter, dynamic=False)
            self._choose = torch.compile(self._plain_choose_all, dynamic=False, options=self._for_words())

    @staticmethod
    def token_capacity(layout: Layout, clips: int, most: int, window: Window | None) -> tuple[int, int]:
        """How many tokens of either run a stream has room for."""
        visual, text = clips * layout.tokens_per_clip, most
        if window is not None:  # and two pages more: one that is kept, and one that has just begun, are not full
            visual = (window.clips + CLIPS_AHEAD) * layout.tokens_per_clip + 2 * BLOCK_SIZE
            text = window.tokens + 1 + 2 * BLOCK_SIZE
        return layout.prompt + visual + layout.tail, layout.header + text

    @classmethod
    def single(
        cls,
        model,
        layout: Layout,
        clips: int,
        most: int,
        chunk_size: int | None,
        penalty: float,
        window: Window | None,
        chunk_counts: Sequence[int] = (0, 1),
    ) -> "StepRunner":
        """Passes for one stream of at most `clips` clips and `most` words, or one without end that sees a `window`. By
        default a whole clip and the tail go in at once."""
        visual, text = cls.token_capacity(layout, clips, most, window)
        need, whole = PagedKVCache.blocks_needed(visual, text), layout.tokens_per_clip + layout.tail
        return cls(
            model,
            1,
            need,
            blocks_per_slot=need,
            text_capacity=text,
            clip_tokens=layout.tokens_per_clip,
            chunk_size=min(chunk_size or whole, whole),
            chunk_counts=chunk_counts,
            windowed=window is not None,
            penalty=penalty,
        )

    def _rows(self, many: int) -> int:
        return len(self.all_slots) + many * self.chunk_size

    # Streams come and go

    def acquire(
        self, template: Template, layout: Layout, clips: int, most: int, window: Window | None = None
    ) -> BatchSlot:
        """A seat for a new stream: what an earlier one left is never seen. Raises InputError where there is none, or no
        memory for it."""
        visual, text = self.token_capacity(layout, clips, most, window)
        need, free = PagedKVCache.blocks_needed(visual, text), len(self.cache.free_blocks)
        each = PagedKVCache.block_bytes(self.language.config, self.model.dtype) / 2**30
        batch_slots = len(self.all_slots)
        if not self.free_slots:
            raise InputError(f"all {batch_slots} seats are taken: close a session first, or make room for more")
        if need > self.cache.block_tables.shape[1] or text > self.positions.shape[1] or (window and not self.windowed):
            raise InputError("a session of this length does not fit in passes that were made for shorter ones")
        if layout.tokens_per_clip > self.clip_features.shape[1]:
            raise InputError(
                f"a clip of {layout.tokens_per_clip} visual tokens is more than the {self.clip_features.shape[1]} "
                "that these steps were made for: give it fewer pixels"
            )
        if need > free:
            raise InputError(
                f"one more session needs {need * each:.3f} GiB for its keys and values, and {free * each:.3f} are free "
                f"beside the {batch_slots - len(self.free_slots)} that run: close one, or give it fewer clips, "
                "words or pixels"
            )
        number = self.free_slots.pop()
        self.cache.allocate(number, visual, text)
        begin = PagedKVCache.text_block_of(visual)
        self.cache.kept_tokens[0, number].fill_(layout.prompt)
        self.cache.kept_tokens[1, number].fill_(layout.header)
        for of_all in (self.ids, self.seen_ids, self.ended):
            of_all[number].zero_()
        self.ids[number, : len(template.header)] = self._put(template.header)
        used = [*template.prompt, template.video, *template.tail, *template.header]
        self.seen_ids[number].index_fill_(0, self._put(used), True)
        self.end[number].fill_(template.end)
        mine = self.cache.allocated[number]
        return BatchSlot(
            number,
            layout,
            BlockTable(self.cache, mine[:begin], 0, layout.prompt),
            BlockTable(self.cache, mine[begin:], TEXT_OFFSET, layout.header),
        )

    def release(self, batch_slot: BatchSlot) -> None:
        self.cache.free(batch_slot.index)
        self.free_slots.append(batch_slot.index)

    # Watching

    def set_clip_features(self, batch_slot: BatchSlot, sight: ClipFeatures) -> None:
        """Make the clip rows that come next in `batch_slot` of `sight`. Makes the device wait for it, not the host."""
        sight.ready.stream_wait(sight.tokens)
        self.clip_features[batch_slot.index, : len(sight.tokens)] = sight.tokens

    def prefill(self, batch_slot: BatchSlot, due: DueRows) -> None:
        """Feed rows in as many passes as they need."""
        for first in range(0, len(due), self.chunk_size):
            self.step([StepRequest(batch_slot, DueRows.empty(), due[first : first + self.chunk_size], False)])

    # Passes

    @torch.no_grad()
    def step(self, requests: Sequence[StepRequest]) -> PendingToken | None:
        """One step for all `requests`, each of a batch slot of its own. Returns the tokens, if any are chosen."""
        needed = sum(len(request.prefill) > 0 for request in requests)
        many = min(kind for kind in self.chunk_counts if kind >= needed)
        sample = any(request.sample for request in requests)
        self.inputs[many].copy_(self._put(self._fill(many, requests)), non_blocking=True)
        if (many, sample) in self.graphs:
            self.graphs[many, sample].replay()
        else:
            self._pass(many, sample)
        if not sample:
            return None
        ids = torch.empty(len(self.new_tokens), dtype=torch.long, pin_memory=self.fast)
        ids.copy_(self.new_tokens, non_blocking=True)
        return PendingToken(ids, DeviceEvent(self.device))

    def _fill(self, many: int, requests: Sequence[StepRequest]) -> Tensor:
        """The numbers of a pass: for each row position (3), place in the pool (0: idle row), what it sees (4), id,
        index in the text run and in the clip (-1: neither); the seats of the pieces; then for each seat the row to
        choose from (-1: the newest before), whether to, and where that word will be. Idle rows see what those beside
        them see, so that attention does not ask for each key whether their block sees it."""
        rows, batch_slots = self._rows(many), len(self.all_slots)
        numbers = torch.zeros(ROW_FIELDS * rows + many + 3 * batch_slots, dtype=torch.long)
        table = numbers[: ROW_FIELDS * rows].view(ROW_FIELDS, rows)
        whose = numbers[ROW_FIELDS * rows : ROW_FIELDS * rows + many]
        choose, sample, next_row = numbers[ROW_FIELDS * rows + many :].view(3, batch_slots)
        table[4], table[9:], choose[:] = 1, -1, -1
        room, piece = self.ids.shape[1], 0
        for request in requests:
            batch_slot, number = request.batch_slot, request.batch_slot.index
            for due, first in ((request.prefill, batch_slots + piece * self.chunk_size), (request.decode, number)):
                if not len(due):
                    continue
                own, text, clip = slice(first, first + len(due)), due.rows.text, due.rows.part == CLIP
                table[:3, own] = due.positions
                for run, flags in ((batch_slot.visual, ~text), (batch_slot.text, text)):
                    if flags.any():
                        table[3, own][flags] = run.cache_index(due.run_index[flags])
                table[4, own], table[5, own], table[6:8, own] = due.seen_visual, due.seen_text, due.window_start
                table[8, own] = due.ids
                table[9, own] = (due.run_index % room).where(text, -1)
                table[10, own] = due.rows.index.where(clip, -1)
                choose[number] = first + len(due) - 1
            if len(request.prefill):
                begin, sees = batch_slots + piece * self.chunk_size, table[4:8]
                last = begin + len(request.prefill) - 1
                sees[:, last + 1 : begin + self.chunk_size] = sees[:, last, None]
                if batch_slots == 1 and not len(request.decode):
                    sees[:, 0] = sees[:, begin]
                whose[piece] = number
                piece += 1
            sample[number], next_row[number] = request.sample, request.next_row % room
        return numbers

    def _pass(self, many: int, sample: bool) -> None:
        """What a CUDA graph holds. Reads only tensors of the device."""
        hidden, positions = self._enter(many)
        hidden = self.forward(hidden, positions, self.attentions[many], self._layer_of_step)
        self._choose(hidden, many, sample)

    def _plain_enter(self, many: int) -> tuple[Tensor, Tensor]:
        rows = self._rows(many)
        table = self.inputs[many][: ROW_FIELDS * rows].view(ROW_FIELDS, rows)
        whose = self.inputs[many][ROW_FIELDS * rows : ROW_FIELDS * rows + many]
        self.attentions[many].place(table[3], table[4:8], whose)
        of = torch.cat([self.all_slots, whose.repeat_interleave(self.chunk_size)])
        text, clip = table[9], table[10]
        ids = self.ids[of, text.clamp(min=0)].where(text >= 0, table[8])
        hidden = self.language.embed_tokens(ids)
        hidden = self.clip_features[of, clip.clamp(min=0)].where((clip >= 0)[:, None], hidden)
        return hidden[None], table[:3, None]

    def _plain_choose_all(self, hidden: Tensor, many: int, sample: bool) -> None:
        choose, writes, next_row = self.inputs[many][ROW_FIELDS * self._rows(many) + many :].view(3, -1)
        picked = hidden[0, choose.clamp(min=0)].where((choose >= 0)[:, None], self.last_hidden)
        self.last_hidden.copy_(picked)
        if sample:
            self._plain_choose(picked, self.all_slots, next_row, writes > 0)
            self.new_tokens.copy_(self.ids.gather(1, next_row[:, None])[:, 0])

    def warm_up(self, sample: bool = True) -> None:
        """Compiles each kind of step and captures it as a CUDA graph. Call it while nothing is due. Does nothing on a
        CPU. Without `sample` the kinds that choose tokens are skipped."""
        if not self.fast:
            return
        # The words before the vision tower, which runs on a stream of no such priority.
        stream, pool = torch.cuda.Stream(self.device, priority=-1), torch.cuda.graph_pool_handle()
        for many in self.chunk_counts:
            for samples in (False, True) if sample else (False,):
                self.inputs[many].copy_(self._put(self._fill(many, [])))
                stream.wait_stream(torch.cuda.current_stream())
                with torch.no_grad(), torch.cuda.stream(stream):
                    for _ in range(3):
                        self._pass(many, samples)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        self._pass(many, samples)
                torch.cuda.current_stream().wait_stream(stream)
                self.graphs[many, samples] = graph

    # Keys and values of visual rows, as they go from one set of pages to another

    def new_kv_buffer(self, layout: Layout) -> Tensor:
        """Room for what a clip and the tail leave behind: (2 layers, key heads, tokens of a clip + tail, D)."""
        store = self.cache.store
        return store.new_zeros(*store.shape[:2], layout.tokens_per_clip + layout.tail, store.shape[3])

    def copy_out(self, batch_slot: BatchSlot, due: DueRows, kv_buffer: Tensor) -> None:
        """Put the keys and values of the visual rows of `due` into `kv_buffer`."""
        torch.index_select(self.cache.store, 2, self._where(batch_slot, due, kv_buffer), out=kv_buffer)

    def copy_in(self, batch_slot: BatchSlot, due: DueRows, kv_buffer: Tensor) -> None:
        self.cache.store.index_copy_(2, self._where(batch_slot, due, kv_buffer), kv_buffer)

    def _where(self, batch_slot: BatchSlot, due: DueRows, kv_buffer: Tensor) -> Tensor:
        """Where the visual rows of `due` lie in the pool; rows that the carrier has beyond them go to page 0."""
        places = batch_slot.visual.cache_index(due.run_index[due.rows.visual])
        where = torch.zeros(kv_buffer.shape[2], dtype=torch.long)
        where[: len(places)] = places
        return self._put(where)
