"""The view of a pass in which some seats feed rows, each as many as it has, end to end in one: no product computes rows
that nobody asked for. Knows nothing of variants, positions or token ids.

For FlexAttention the heads that share a key lie beside each other as queries, and those of a seat begin with a block of
their own: so a block looks at the pages of one seat, and at most of them without asking for each key.

    R rows of the step   B blocks of queries   F queries = B x QUERY_BLOCK   W blocks of a batch slot   D size of a head
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from .device_event import put
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET, PagedKVCache
from .paged_attention import flex_in_shares, list_pages, shares_of

QUERY_BLOCK = 64
"""Queries that look at the same pages."""
KERNEL_OPTIONS: dict = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
"""FlexAttention's kernel_options, measured on an H200."""


def blocks_of(rows: int, groups: int) -> int:
    """Blocks of so many rows of a seat, with so many query heads for each key head."""
    return -(-rows * groups // QUERY_BLOCK)


class RaggedAttention:
    """What rows may see: `seen_visual` tokens of their seat's visual run and `seen_text` of its text run."""

    def __init__(self, cache: PagedKVCache, blocks: int, groups: int, flex: bool):
        """Room for so many `blocks`; `groups` and `flex` as in `paged_attention.PagedAttention`."""
        self.cache, self.blocks, self.groups, self.flex = cache, blocks, groups, flex
        self.places: Tensor | None = None
        """Where in the pool the pass writes, (R,)."""
        self.spans: list[tuple[int, slice]] = []
        """Seats and their rows."""
        self.each: list[tuple[slice, Tensor, Tensor]] = []
        """Without FlexAttention: the rows of each seat, the places of all that it holds, and what they see of it."""
        self.shares = shares_of(cache, blocks * QUERY_BLOCK)
        if flex:
            zeros = torch.zeros(9, blocks * QUERY_BLOCK, dtype=torch.long, device=cache.block_tables.device)
            self.of_blocks = zeros[:4, :blocks]
            self.batch_slot, self.begin, self.count, self.before = self.of_blocks[:, :, None]
            """Of a block: whose it is, the seat's first row, how many rows it has, and its queries in blocks before,
            each (B, 1)."""
            self.row, self.head, self.seen_visual, self.seen_text, self.start = zeros[4:]
            """Of a query: its row, its head of those that share a key, what it sees, each (F,); and of a row its first
            query, (R or more,)."""
            self.heads = torch.arange(groups, device=zeros.device)
            self.within = torch.arange(QUERY_BLOCK, device=zeros.device)
            self.mask = self._block_mask()

    def lay_out(self, batch_slots: Sequence[int], counts: Sequence[int]) -> None:
        """Whose the next rows are: of each of `batch_slots` so many, end to end. The host does not wait."""
        whose, count = torch.tensor(batch_slots), torch.tensor(counts)
        begin = count.cumsum(0) - count
        if not self.flex:
            each = zip(batch_slots, begin.tolist(), counts, strict=True)
            self.spans = [(batch_slot, slice(row, row + many)) for batch_slot, row, many in each]
            return
        blocks = -(-count * self.groups // QUERY_BLOCK)
        first = blocks.cumsum(0) - blocks
        of_block = torch.arange(len(batch_slots)).repeat_interleave(blocks)
        of_row = torch.arange(len(batch_slots)).repeat_interleave(count)
        before = (torch.arange(len(of_block)) - first[of_block]) * QUERY_BLOCK
        start = first[of_row] * QUERY_BLOCK + (torch.arange(len(of_row)) - begin[of_row]) * self.groups
        known = torch.stack([whose[of_block], begin[of_block], count[of_block], before])
        for of_all, own in ((self.of_blocks, known), (self.start, start)):
            of_all[..., : own.shape[-1]].copy_(put(own, of_all.device))
            of_all[..., own.shape[-1] :].zero_()

    def place(self, places: Tensor, seen_visual: Tensor, seen_text: Tensor) -> None:
        """Set where the rows that were laid out write, and others after them to no effect, and what they see, each
        (R,)."""
        self.places = places
        if not self.flex:
            self._make_masks(seen_visual, seen_text)
            return
        query = self.before + self.within
        # Where a seat's queries end within a block, its last row goes on.
        row = self.begin + torch.minimum(query // self.groups, self.count - 1).clamp(min=0)
        self.row.copy_(row.flatten())
        self.head.copy_((query % self.groups).flatten())
        seen = [numbers[row].where(self.count > 0, 0) for numbers in (seen_visual, seen_text)]
        self.seen_visual.copy_(seen[0].flatten())
        self.seen_text.copy_(seen[1].flatten())
        table = self.cache.block_tables[self.batch_slot[:, 0]]  # (B, W)
        first = self.cache.block_start[table]
        partly = self._sees(first, *(numbers.amax(1, keepdim=True) for numbers in seen))
        wholly = self._sees(first + BLOCK_SIZE - 1, *(numbers.amin(1, keepdim=True) for numbers in seen))
        listed, counts = list_pages(torch.stack([partly & ~wholly, wholly])[:, None], table[None], self.shares)
        self.listed.copy_(listed)
        self.counts.copy_(counts)

    @staticmethod
    def _sees(token: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """Whether one that sees so much of either run sees `token`, as `PagedKVCache.block_start` counts."""
        return ((token >= 0) & (token < visual)) | ((token >= TEXT_OFFSET) & (token - TEXT_OFFSET < text))

    def _make_masks(self, seen_visual: Tensor, seen_text: Tensor) -> None:
        within, self.each = torch.arange(BLOCK_SIZE, device=self.places.device), []
        for batch_slot, own in self.spans:
            table = self.cache.block_tables[batch_slot, :, None]
            token = (self.cache.block_start[table] + within).flatten()
            sees = self._sees(token, seen_visual[own, None], seen_text[own, None])
            self.each.append((own, (table * BLOCK_SIZE + within).flatten(), sees))

    def _block_mask(self) -> BlockMask:
        cache = self.cache
        shape = 2, self.shares, 1, self.blocks
        self.counts = torch.zeros(shape, dtype=torch.int32, device=self.batch_slot.device)
        self.listed = self.counts.new_zeros(*shape, -(-cache.block_tables.shape[1] // self.shares))
        """How many pages the queries of a block see in part, and all see whole; and which."""

        def rule(b, h, query, key):
            block = key // BLOCK_SIZE
            seen = self._sees(
                cache.block_start[block] + key % BLOCK_SIZE, self.seen_visual[query], self.seen_text[query]
            )
            return seen & (cache.block_owner[block] == self.batch_slot[query // QUERY_BLOCK, 0])

        return BlockMask.from_kv_blocks(
            self.counts[0],
            self.listed[0],
            self.counts[1],
            self.listed[1],
            BLOCK_SIZE=(QUERY_BLOCK, BLOCK_SIZE),
            mask_mod=rule,
            seq_lengths=(self.blocks * QUERY_BLOCK, cache.store.shape[2]),
            compute_q_blocks=False,
        )

    def attend(self, query: Tensor, fresh: Tensor, pool: Tensor, scale: float) -> Tensor:
        """As `views.View.attend`, with n = 1."""
        pool[:, :, self.places] = fresh[0]
        if not self.flex:
            mixed = [
                nn.functional.scaled_dot_product_attention(
                    query[:, :, own], *pool[:, None, :, places], attn_mask=sees, scale=scale, enable_gqa=True
                )
                for own, places, sees in self.each
            ]
            return torch.cat(mixed, 2)
        asked = query[0].unflatten(0, (-1, self.groups))[:, self.head, self.row]
        mixed = self._mix(asked[None], pool, scale)[0]
        own = mixed[:, self.start[: query.shape[2], None] + self.heads]  # (key heads, R, groups, D)
        return own.transpose(1, 2).reshape(query.shape)

    @torch.compiler.disable  # what is around it is compiled once for any number of rows
    def _mix(self, asked: Tensor, pool: Tensor, scale: float) -> Tensor:
        options = {"block_mask": self.mask, "scale": scale, "kernel_options": KERNEL_OPTIONS}
        return _compiled(asked, *pool[:, None], self.shares, **options)


_compiled = torch.compile(flex_in_shares, dynamic=False)
