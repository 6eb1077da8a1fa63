"""Keys and values of many streams, in pages of one pool, and the attention that reads them. Knows nothing of variants,
positions or token ids.

A stream has a *seat*: a row of the page table. Its visual run begins at its logical token 0, its text run at a page of
its own (see `plan.py`), and what a query may see is a number of tokens of each run.

    S seats   W pages that a seat may have   n seats in a pass   Q queries of each   D size of a head
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

PAGE = 128
"""Tokens in a page: a block of FlexAttention."""


class Pages:
    """A pool of pages and the table that says whose they are.

    Page 0 belongs to nobody: idle seats and padding write there.
    """

    def __init__(self, config, seats: int, pages: int, width: int, dtype: torch.dtype, device):
        """`config` is the language model's; `pages` without page 0; `width` is W."""
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = 2, heads, (pages + 1) * PAGE, size
        self.layers = [tuple(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(config.num_hidden_layers)]
        """Keys and values of each layer, (heads, pool, D). Not (1, heads, …): the compiler then copies the whole
        pool to write one token."""
        self.table = torch.zeros(seats, width, dtype=torch.long, device=device)
        """The page of each logical page, (S, W)."""
        self.owner = torch.full((pages + 1,), -1, dtype=torch.long, device=device)
        """The seat that a page belongs to."""
        self.logical = torch.zeros(pages + 1, dtype=torch.long, device=device)
        """Which logical page of its seat a page is."""
        self.text_page = torch.zeros(seats, dtype=torch.long, device=device)
        """The logical page at which a seat's text run begins."""
        self.free = list(range(pages, 0, -1))
        self.held: dict[int, list[int]] = {}

    @staticmethod
    def text_page_of(visual: int) -> int:
        """The logical page at which the text run of a stream with `visual` tokens begins."""
        return -(-visual // PAGE)

    @staticmethod
    def need(visual: int, text: int) -> int:
        """Pages of a stream with runs of `visual` and `text` tokens."""
        return -(-visual // PAGE) - (-text // PAGE)

    @staticmethod
    def bytes_each(config, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        size = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * PAGE * size * dtype.itemsize

    def take(self, seat: int, visual: int, text: int) -> None:
        """Give `seat` pages for its runs. Raises ValueError where there are too few, or the seat is taken."""
        count = self.need(visual, text)
        if seat in self.held or count > min(len(self.free), self.table.shape[1]):
            raise ValueError(f"seat {seat} cannot have {count} pages: {len(self.free)} are free")
        mine = self.held[seat] = [self.free.pop() for _ in range(count)]
        pages = torch.tensor(mine, device=self.table.device)
        self.table[seat, :count] = pages
        self.owner[pages] = seat
        self.logical[pages] = torch.arange(count, device=pages.device)
        self.text_page[seat] = self.text_page_of(visual)

    def give_back(self, seat: int) -> None:
        mine = self.held.pop(seat)
        self.free += reversed(mine)
        self.owner[torch.tensor(mine, device=self.owner.device)] = -1
        self.table[seat] = 0
        self.text_page[seat] = 0

    def places(self, seats: Tensor, logical: Tensor) -> Tensor:
        """Where in the pool the `logical` tokens (n, Q) of `seats` (n,) lie."""
        return self.table[seats].gather(1, logical // PAGE) * PAGE + logical % PAGE


@dataclass
class View:
    """What one pass writes and may see. A query sees `seen_visual` tokens of its seat's visual run and `seen_text` of
    its text run."""

    pages: Pages
    seats: Tensor
    """(n,)"""
    places: Tensor
    """Where in the pool the pass writes, (n, Q)."""
    seen_visual: Tensor
    """(n, Q)"""
    seen_text: Tensor
    """(n, Q)"""
    groups: int
    """Query heads for each key head."""
    flex: bool
    """FlexAttention, else SDPA with a dense mask."""
    apart: bool = False
    """Compile FlexAttention by itself, where the shapes of the pass change."""
    options: dict | None = None
    """FlexAttention's kernel_options."""

    def __post_init__(self):
        self.mask = self._block_mask() if self.flex else None
        self.refresh()

    def _dense_mask(self) -> Tensor:
        """Mask (n, 1, Q, keys) over the logical tokens of each seat; `gathered` says where those lie."""
        table = self.pages.table[self.seats]
        token = torch.arange(table.shape[1] * PAGE, device=table.device)
        self.gathered = table.repeat_interleave(PAGE, 1) * PAGE + token % PAGE
        of_text = token - self.pages.text_page[self.seats, None, None] * PAGE
        seen = token < self.seen_visual[..., None]
        return (seen | ((of_text >= 0) & (of_text < self.seen_text[..., None])))[:, None]

    def _block_mask(self) -> BlockMask:
        """The same for FlexAttention over the pool, with only the pages that hold something seen.

        The heads that share a key lie beside each other as queries: (n, key heads, Q x groups, D). So few queries are
        one tile of one kernel, and a key is read once for all of them.
        """
        pages, seats, groups = self.pages, self.seats, self.groups
        rows = self.seen_visual.shape[1] * groups
        counts = torch.zeros(2, len(seats), 1, -(-rows // PAGE), dtype=torch.int32, device=seats.device)
        listed = counts.new_zeros(*counts.shape, pages.table.shape[1])
        self.partly, self.wholly = (counts[0], listed[0]), (counts[1], listed[1])
        """How many pages the queries of a block see in part or all see whole, and which. With one query a seat all are
        looked at as partly seen: the kernel for few queries shares out only those among the GPU's processors."""
        self.one = self.seen_visual.shape[1] == 1

        def rule(b, h, row, key):
            q, page = row // groups, key // PAGE
            token = pages.logical[page] * PAGE + key % PAGE
            of_text = token - pages.text_page[seats[b]] * PAGE
            seen = (token < self.seen_visual[b, q]) | ((of_text >= 0) & (of_text < self.seen_text[b, q]))
            return seen & (pages.owner[page] == seats[b])

        return BlockMask.from_kv_blocks(
            *self.partly,
            *((None, None) if self.one else self.wholly),
            BLOCK_SIZE=PAGE,
            mask_mod=rule,
            seq_lengths=(rows, pages.layers[0][0].shape[1]),
            compute_q_blocks=False,
        )

    def refresh(self) -> None:
        """Bring the mask up to date after a change to the numbers above, which is made in place."""
        if not self.flex:
            self.mask = self._dense_mask()
            return
        blocks = self.partly[0].shape[2]
        table = self.pages.table[self.seats, None].expand(-1, blocks, -1)
        first = torch.arange(table.shape[2], device=table.device) * PAGE
        first_of_text = first - self.pages.text_page[self.seats, None, None] * PAGE

        def seen(fewest: bool, tokens: int) -> Tensor:
            """Whether `tokens` of a page are seen, by all queries of a block or by any: (n, blocks, W)."""
            visual, text = (
                self._of_block(seen, blocks, fewest)[..., None] for seen in (self.seen_visual, self.seen_text)
            )
            return (first + tokens <= visual) | ((first_of_text >= 0) & (first_of_text + tokens <= text))

        partly, wholly = seen(False, 1), seen(True, PAGE)
        for which, (counts, listed) in (
            ((partly, self.partly),) if self.one else ((partly & ~wholly, self.partly), (wholly, self.wholly))
        ):
            order = which.logical_not().to(torch.int8).argsort(stable=True, dim=-1)
            listed.copy_(table.gather(-1, order)[:, None])
            counts.copy_(which.sum(-1)[:, None])

    def _of_block(self, seen: Tensor, blocks: int, fewest: bool) -> Tensor:
        """The fewest or the most tokens seen by the queries of a block, (n, blocks)."""
        rows = seen.repeat_interleave(self.groups, 1)
        last = rows[:, -1:].expand(-1, blocks * PAGE - rows.shape[1])
        rows = torch.cat([rows, last], 1).view(len(rows), blocks, PAGE)
        return rows.amin(-1) if fewest else rows.amax(-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Store the new `key` and `value` (n, key heads, Q, D) in the pool of a layer, then let `query`, of the same
        shape with all heads, see what it may."""
        where = self.places.flatten()
        keys[:, where] = key.transpose(0, 1).flatten(1, 2)
        values[:, where] = value.transpose(0, 1).flatten(1, 2)
        if not self.flex:
            mine = (pool[:, self.gathered].transpose(0, 1) for pool in (keys, values))
            return nn.functional.scaled_dot_product_attention(
                query, *mine, attn_mask=self.mask, scale=scale, enable_gqa=True
            )
        n, heads, many, size = query.shape
        folded = query.view(n, heads // self.groups, self.groups, many, size).transpose(2, 3).flatten(2, 3)
        flex = _flex_apart if self.apart else flex_attention
        mixed = flex(folded, keys[None], values[None], block_mask=self.mask, scale=scale, kernel_options=self.options)
        return mixed.view(n, heads // self.groups, many, self.groups, size).transpose(2, 3).reshape(query.shape)


_compiled = torch.compile(flex_attention, dynamic=False)


@torch.compiler.disable
def _flex_apart(*tensors: Tensor, **options) -> Tensor:
    return _compiled(*tensors, **options)


@dataclass
class Fresh:
    """A pass over seats that have nothing in the pool yet, end to end in one row: for each the whole visual run, of
    which a row sees what came before it, and then the first rows of the text run, which see what `leads` says."""

    places: Tensor
    """(1, Q)"""
    leads: list[Tensor]
    """For each seat what its text rows may see of its own rows, (text rows, rows of the seat)."""

    @torch.compiler.disable  # its loop would be compiled anew for each number of seats
    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """As `View.attend`, with n = 1."""
        where = self.places.flatten()
        keys[:, where], values[:, where] = key[0], value[0]
        lengths = [mask.shape[1] for mask in self.leads]
        options = {"scale": scale, "enable_gqa": True}
        mixed = query.new_empty(query.transpose(1, 2).shape)  # as the next product wants it
        runs = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
        for mask, own, run in zip(self.leads, mixed.split(lengths, 1), runs, strict=True):
            visual = mask.shape[1] - mask.shape[0]
            sight = (tensor[:, :, :visual] for tensor in run)
            seen = nn.functional.scaled_dot_product_attention(*sight, is_causal=True, **options)
            own[:, :visual] = seen.transpose(1, 2)
            seen = nn.functional.scaled_dot_product_attention(
                run[0][:, :, visual:], *run[1:], attn_mask=mask, **options
            )
            own[:, visual:] = seen.transpose(1, 2)
        return mixed.transpose(1, 2)
