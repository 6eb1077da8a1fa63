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
from .kv_cache import PAGE, TEXT, PagedKVCache
from .paged_attention import MixedAttention
from .runner import Runner
from .step_request import BatchSlot, PendingToken, Run, StepRequest
from .stream_state import DueRows
from .vision_encoder import ClipFeatures, VisionEncoder

NUMBERS = 11  # of each row of a pass, see Passes._fill
AHEAD = 2
"""Clips that may be taken in before the slots begin that see them."""


class StepRunner(Runner):
    """Passes over one model for up to S streams."""

    def __init__(
        self,
        model,
        batch_slots: int,
        pages: int,
        *,
        columns: int,
        longest: int,
        clip: int,
        width: int,
        pieces: Sequence[int] = (0, 1),
        windows: bool = False,
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
            PagedKVCache(config, batch_slots, pages, columns, model.dtype, model.device),
            longest,
            penalty,
        )
        self.width, self.windows, self.kinds = width, windows, sorted(pieces)
        self.everyone = torch.arange(batch_slots, device=self.device)
        self.clip = torch.zeros(batch_slots, clip, config.hidden_size, dtype=model.dtype, device=self.device)
        """The visual tokens that the clip rows of each seat are made of."""
        self.picked = torch.zeros(batch_slots, config.hidden_size, dtype=model.dtype, device=self.device)
        """What came out for the newest row of each seat that a word may be chosen from."""
        self.newest = torch.zeros(batch_slots, dtype=torch.long, device=self.device)
        self.numbers, self.views = {}, {}
        for many in self.kinds:
            length = NUMBERS * self._rows(many) + many + 3 * batch_slots
            self.numbers[many] = torch.zeros(length, dtype=torch.long, device=self.device)
            self.views[many] = MixedAttention(self.pages, (many, width), self.groups, self.flex, self.options, windows)
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.empty = list(range(batch_slots - 1, -1, -1))
        self._enter, self._choose = self._plain_enter, self._plain_choose_all
        self.vision_encoder = VisionEncoder(model)
        if self.fast:
            self._enter = torch.compile(self._plain_enter, dynamic=False)
            self._choose = torch.compile(self._plain_choose_all, dynamic=False, options=self._for_words())

    @staticmethod
    def room(layout: Layout, clips: int, most: int, window: Window | None) -> tuple[int, int]:
        """How many tokens of either run a stream has room for."""
        visual, text = clips * layout.tokens_per_clip, most
        if window is not None:  # and two pages more: one that is kept, and one that has just begun, are not full
            visual = (window.clips + AHEAD) * layout.tokens_per_clip + 2 * PAGE
            text = window.words + 1 + 2 * PAGE
        return layout.prompt + visual + layout.tail, layout.header + text

    @classmethod
    def single(
        cls,
        model,
        layout: Layout,
        clips: int,
        most: int,
        width: int | None,
        penalty: float,
        window: Window | None,
        pieces: Sequence[int] = (0, 1),
    ) -> "StepRunner":
        """Passes for one stream of at most `clips` clips and `most` words, or one without end that sees a `window`. By
        default a whole clip and the tail go in at once."""
        visual, text = cls.room(layout, clips, most, window)
        need, whole = PagedKVCache.need(visual, text), layout.tokens_per_clip + layout.tail
        return cls(
            model,
            1,
            need,
            columns=need,
            longest=text,
            clip=layout.tokens_per_clip,
            width=min(width or whole, whole),
            pieces=pieces,
            windows=window is not None,
            penalty=penalty,
        )

    def _rows(self, many: int) -> int:
        return len(self.everyone) + many * self.width

    # Streams come and go

    def take(
        self, template: Template, layout: Layout, clips: int, most: int, window: Window | None = None
    ) -> BatchSlot:
        """A seat for a new stream: what an earlier one left is never seen. Raises InputError where there is none, or no
        memory for it."""
        visual, text = self.room(layout, clips, most, window)
        need, free = PagedKVCache.need(visual, text), len(self.pages.free)
        each = PagedKVCache.bytes_each(self.language.config, self.model.dtype) / 2**30
        batch_slots = len(self.everyone)
        if not self.empty:
            raise InputError(f"all {batch_slots} seats are taken: close a session first, or make room for more")
        if need > self.pages.table.shape[1] or text > self.positions.shape[1] or (window and not self.windows):
            raise InputError("a session of this length does not fit in passes that were made for shorter ones")
        if layout.tokens_per_clip > self.clip.shape[1]:
            raise InputError(
                f"a clip of {layout.tokens_per_clip} visual tokens is more than the {self.clip.shape[1]} that the "
                "passes were made for: give it fewer pixels"
            )
        if need > free:
            raise InputError(
                f"one more session needs {need * each:.3f} GiB for its keys and values, and {free * each:.3f} are free "
                f"beside the {batch_slots - len(self.empty)} that run: close one, or give it fewer clips, "
                "words or pixels"
            )
        number = self.empty.pop()
        self.pages.take(number, visual, text)
        begin = PagedKVCache.text_page_of(visual)
        self.pages.kept[0, number].fill_(layout.prompt)
        self.pages.kept[1, number].fill_(layout.header)
        for of_all in (self.ids, self.seen_ids, self.ended):
            of_all[number].zero_()
        self.ids[number, : len(template.header)] = self._put(template.header)
        used = [*template.prompt, template.video, *template.tail, *template.header]
        self.seen_ids[number].index_fill_(0, self._put(used), True)
        self.end[number].fill_(template.end)
        mine = self.pages.held[number]
        return BatchSlot(
            number,
            layout,
            Run(self.pages, mine[:begin], 0, layout.prompt),
            Run(self.pages, mine[begin:], TEXT, layout.header),
        )

    def release(self, batch_slot: BatchSlot) -> None:
        self.pages.give_back(batch_slot.number)
        self.empty.append(batch_slot.number)

    # Watching

    def show(self, batch_slot: BatchSlot, sight: ClipFeatures) -> None:
        """Make the clip rows that come next in `batch_slot` of `sight`. Makes the device wait for it, not the host."""
        sight.ready.stream_wait(sight.tokens)
        self.clip[batch_slot.number, : len(sight.tokens)] = sight.tokens

    def feed(self, batch_slot: BatchSlot, due: DueRows) -> None:
        """Feed rows in as many passes as they need."""
        for first in range(0, len(due), self.width):
            self.run([StepRequest(batch_slot, DueRows.nothing(), due[first : first + self.width], False)])

    # Passes

    @torch.no_grad()
    def run(self, asks: Sequence[StepRequest]) -> PendingToken | None:
        """One pass for all `asks`, of which each is of a seat of its own. Returns the words, where any are written."""
        needed = sum(len(ask.others) > 0 for ask in asks)
        many = min(kind for kind in self.kinds if kind >= needed)
        write = any(ask.write for ask in asks)
        self.numbers[many].copy_(self._put(self._fill(many, asks)), non_blocking=True)
        if (many, write) in self.graphs:
            self.graphs[many, write].replay()
        else:
            self._pass(many, write)
        if not write:
            return None
        ids = torch.empty(len(self.newest), dtype=torch.long, pin_memory=self.fast)
        ids.copy_(self.newest, non_blocking=True)
        return PendingToken(ids, DeviceEvent(self.device))

    def _fill(self, many: int, asks: Sequence[StepRequest]) -> Tensor:
        """The numbers of a pass: for each row position (3), place in the pool (0: idle row), what it sees (4), id,
        index in the text run and in the clip (-1: neither); the seats of the pieces; then for each seat the row to
        choose from (-1: the newest before), whether to, and where that word will be. Idle rows see what those beside
        them see, so that attention does not ask for each key whether their block sees it."""
        rows, batch_slots = self._rows(many), len(self.everyone)
        numbers = torch.zeros(NUMBERS * rows + many + 3 * batch_slots, dtype=torch.long)
        table = numbers[: NUMBERS * rows].view(NUMBERS, rows)
        whose = numbers[NUMBERS * rows : NUMBERS * rows + many]
        choose, write, next_row = numbers[NUMBERS * rows + many :].view(3, batch_slots)
        table[4], table[9:], choose[:] = 1, -1, -1
        room, piece = self.ids.shape[1], 0
        for ask in asks:
            batch_slot, number = ask.batch_slot, ask.batch_slot.number
            for due, first in ((ask.others, batch_slots + piece * self.width), (ask.word, number)):
                if not len(due):
                    continue
                own, text, clip = slice(first, first + len(due)), due.rows.text, due.rows.part == CLIP
                table[:3, own] = due.positions
                for run, flags in ((batch_slot.visual, ~text), (batch_slot.text, text)):
                    if flags.any():
                        table[3, own][flags] = run.places(due.place[flags])
                table[4, own], table[5, own], table[6:8, own] = due.seen_visual, due.seen_text, due.since
                table[8, own] = due.ids
                table[9, own] = (due.place % room).where(text, -1)
                table[10, own] = due.rows.index.where(clip, -1)
                choose[number] = first + len(due) - 1
            if len(ask.others):
                begin, sees = batch_slots + piece * self.width, table[4:8]
                last = begin + len(ask.others) - 1
                sees[:, last + 1 : begin + self.width] = sees[:, last, None]
                if batch_slots == 1 and not len(ask.word):
                    sees[:, 0] = sees[:, begin]
                whose[piece] = number
                piece += 1
            write[number], next_row[number] = ask.write, ask.next_row % room
        return numbers

    def _pass(self, many: int, write: bool) -> None:
        """What a CUDA graph holds. Reads only tensors of the device."""
        hidden, positions = self._enter(many)
        hidden = self.forward(hidden, positions, self.views[many], self._layer_of_step)
        self._choose(hidden, many, write)

    def _plain_enter(self, many: int) -> tuple[Tensor, Tensor]:
        rows = self._rows(many)
        table = self.numbers[many][: NUMBERS * rows].view(NUMBERS, rows)
        whose = self.numbers[many][NUMBERS * rows : NUMBERS * rows + many]
        self.views[many].place(table[3], table[4:8], whose)
        of = torch.cat([self.everyone, whose.repeat_interleave(self.width)])
        text, clip = table[9], table[10]
        ids = self.ids[of, text.clamp(min=0)].where(text >= 0, table[8])
        hidden = self.language.embed_tokens(ids)
        hidden = self.clip[of, clip.clamp(min=0)].where((clip >= 0)[:, None], hidden)
        return hidden[None], table[:3, None]

    def _plain_choose_all(self, hidden: Tensor, many: int, write: bool) -> None:
        choose, writes, next_row = self.numbers[many][NUMBERS * self._rows(many) + many :].view(3, -1)
        picked = hidden[0, choose.clamp(min=0)].where((choose >= 0)[:, None], self.picked)
        self.picked.copy_(picked)
        if write:
            self._plain_choose(picked, self.everyone, next_row, writes > 0)
            self.newest.copy_(self.ids.gather(1, next_row[:, None])[:, 0])

    def warm_up(self, words: bool = True) -> None:
        """Compile every kind of pass, those that write none alone where no `words` are to come, and record it as a CUDA
        graph, while nothing is due. Without a GPU there is nothing to do."""
        if not self.fast:
            return
        # The words before the vision tower, which runs on a stream of no such priority.
        stream, pool = torch.cuda.Stream(self.device, priority=-1), torch.cuda.graph_pool_handle()
        for many in self.kinds:
            for write in (False, True) if words else (False,):
                self.numbers[many].copy_(self._put(self._fill(many, [])))
                stream.wait_stream(torch.cuda.current_stream())
                with torch.no_grad(), torch.cuda.stream(stream):
                    for _ in range(3):
                        self._pass(many, write)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        self._pass(many, write)
                torch.cuda.current_stream().wait_stream(stream)
                self.graphs[many, write] = graph

    # Keys and values of visual rows, as they go from one set of pages to another

    def kv_buffer(self, layout: Layout) -> Tensor:
        """Room for what a clip and the tail leave behind: (2 layers, key heads, tokens of a clip + tail, D)."""
        store = self.pages.store
        return store.new_zeros(*store.shape[:2], layout.tokens_per_clip + layout.tail, store.shape[3])

    def copy_out(self, batch_slot: BatchSlot, due: DueRows, kv_buffer: Tensor) -> None:
        """Put the keys and values of the visual rows of `due` into `kv_buffer`."""
        torch.index_select(self.pages.store, 2, self._where(batch_slot, due, kv_buffer), out=kv_buffer)

    def copy_in(self, batch_slot: BatchSlot, due: DueRows, kv_buffer: Tensor) -> None:
        self.pages.store.index_copy_(2, self._where(batch_slot, due, kv_buffer), kv_buffer)

    def _where(self, batch_slot: BatchSlot, due: DueRows, kv_buffer: Tensor) -> Tensor:
        """Where the visual rows of `due` lie in the pool; rows that the carrier has beyond them go to page 0."""
        places = batch_slot.visual.places(due.place[due.rows.visual])
        where = torch.zeros(kv_buffer.shape[2], dtype=torch.long)
        where[: len(places)] = places
        return self._put(where)
