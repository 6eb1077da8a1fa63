"""Attention of a step in which each slot feeds as many rows as it has, all as one sequence without padding. Knows
nothing about variants, positions or token ids.

For FlexAttention the query heads of a key head are laid out as further queries, and each slot's queries start a new
query block. A query block then visits the blocks of one slot only, and most of them without evaluating the mask.

    R rows of the step   B query blocks   F queries = B x QUERY_BLOCK   W blocks per slot   D head size
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..common.compiling import not_compiled
from .device_event import to_device
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET, PagedKVCache
from .split_kv import flex_split_kv, list_blocks, num_splits

QUERY_BLOCK = 64
"""Queries per query block."""
KERNEL_OPTIONS: dict = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
"""FlexAttention's kernel_options, measured on an H200."""


def query_blocks_of(rows: int, groups: int) -> int:
    """Query blocks of `rows` rows of one slot, with `groups` query heads per key head."""
    return -(-rows * groups // QUERY_BLOCK)


class RaggedAttention:
    """Each row attends to the first `seen_visual` tokens of its slot's visual run and the first `seen_text` of its text
    run. Call `set_rows` with the slots of the rows, then `update` with the tensors."""

    def __init__(self, cache: PagedKVCache, query_blocks: int, groups: int, use_flex: bool):
        """For at most `query_blocks`; `groups` and `use_flex` as in `paged_attention.PagedAttention`."""
        self.cache, self.query_blocks, self.groups, self.use_flex = cache, query_blocks, groups, use_flex
        self.cache_index: Tensor
        """Where the step writes its keys and values in the cache, (R,)."""
        self.spans: list[tuple[int, slice]] = []
        """Without FlexAttention: each slot and its rows."""
        self.dense: list[tuple[slice, Tensor, Tensor]] = []
        """Without FlexAttention: the rows of each slot, the cache indices of all its keys, and the mask over them."""
        self.splits = num_splits(cache, query_blocks * QUERY_BLOCK)
        if use_flex:
            zeros = torch.zeros(9, query_blocks * QUERY_BLOCK, dtype=torch.long, device=cache.block_tables.device)
            self.per_block = zeros[:4, :query_blocks]
            self.batch_slot, self.begin, self.count, self.before = self.per_block[:, :, None]
            """Of each query block: its slot, the slot's first row and number of rows, and the slot's queries in earlier
            blocks, each (B, 1)."""
            self.row, self.head, self.seen_visual, self.seen_text, self.start = zeros[4:]
            """Of each query: its row, its head within the group, and what it may attend to, each (F,). `start` is the
            first query of each row, (R or more,)."""
            self.heads = torch.arange(groups, device=zeros.device)
            self.within = torch.arange(QUERY_BLOCK, device=zeros.device)
            self.mask = self._block_mask()

    def set_rows(self, batch_slots: Sequence[int], counts: Sequence[int]) -> None:
        """Sets how many of the next rows belong to each of `batch_slots`, in this order. Does not block the host."""
        slots, count = torch.tensor(batch_slots), torch.tensor(counts)
        begin = count.cumsum(0) - count
        if not self.use_flex:
            rows = zip(batch_slots, begin.tolist(), counts, strict=True)
            self.spans = [(batch_slot, slice(first, first + number)) for batch_slot, first, number in rows]
            return
        blocks = -(-count * self.groups // QUERY_BLOCK)
        first = blocks.cumsum(0) - blocks
        of_block = torch.arange(len(batch_slots)).repeat_interleave(blocks)
        of_row = torch.arange(len(batch_slots)).repeat_interleave(count)
        before = (torch.arange(len(of_block)) - first[of_block]) * QUERY_BLOCK
        start = first[of_row] * QUERY_BLOCK + (torch.arange(len(of_row)) - begin[of_row]) * self.groups
        per_block = torch.stack([slots[of_block], begin[of_block], count[of_block], before])
        for target, values in ((self.per_block, per_block), (self.start, start)):
            target[..., : values.shape[-1]].copy_(to_device(values, target.device))
            target[..., values.shape[-1] :].zero_()

    def update(self, cache_index: Tensor, seen_visual: Tensor, seen_text: Tensor) -> None:
        """Sets where the rows are written and what they may attend to, each (R,). Rows after those of `set_rows` are
        padding."""
        self.cache_index = cache_index
        if not self.use_flex:
            self._dense_masks(seen_visual, seen_text)
            return
        query = self.before + self.within
        # Queries after the last of a slot within its block repeat the slot's last row.
        row = self.begin + torch.minimum(query // self.groups, self.count - 1).clamp(min=0)
        self.row.copy_(row.flatten())
        self.head.copy_((query % self.groups).flatten())
        seen = [numbers[row].where(self.count > 0, 0) for numbers in (seen_visual, seen_text)]
        self.seen_visual.copy_(seen[0].flatten())
        self.seen_text.copy_(seen[1].flatten())
        table = self.cache.block_tables[self.batch_slot[:, 0]]  # (B, W)
        start = self.cache.block_start[table]
        partial = self._visible(start, *(numbers.amax(1, keepdim=True) for numbers in seen))
        full = self._visible(start + BLOCK_SIZE - 1, *(numbers.amin(1, keepdim=True) for numbers in seen))
        flags = torch.stack([partial & ~full, full])[:, None]
        kv_indices, num_kv_blocks = list_blocks(flags, table[None], self.splits)
        self.kv_indices.copy_(kv_indices)
        self.num_kv_blocks.copy_(num_kv_blocks)

    @staticmethod
    def _visible(token: Tensor, seen_visual: Tensor, seen_text: Tensor) -> Tensor:
        """Whether queries that see so much of each run may attend to `token`, counted as in
        `PagedKVCache.block_start`."""
        return ((token >= 0) & (token < seen_visual)) | ((token >= TEXT_OFFSET) & (token - TEXT_OFFSET < seen_text))

    def _dense_masks(self, seen_visual: Tensor, seen_text: Tensor) -> None:
        within, self.dense = torch.arange(BLOCK_SIZE, device=self.cache_index.device), []
        for batch_slot, rows in self.spans:
            table = self.cache.block_tables[batch_slot, :, None]
            token = (self.cache.block_start[table] + within).flatten()
            mask = self._visible(token, seen_visual[rows, None], seen_text[rows, None])
            self.dense.append((rows, (table * BLOCK_SIZE + within).flatten(), mask))

    def _block_mask(self) -> BlockMask:
        cache = self.cache
        shape = 2, self.splits, 1, self.query_blocks
        self.num_kv_blocks = torch.zeros(shape, dtype=torch.int32, device=self.batch_slot.device)
        self.kv_indices = self.num_kv_blocks.new_zeros(*shape, -(-cache.block_tables.shape[1] // self.splits))
        """As in BlockMask: partial blocks, then full ones."""

        def mask_mod(b, h, query, key):
            block = key // BLOCK_SIZE
            token = cache.block_start[block] + key % BLOCK_SIZE
            visible = self._visible(token, self.seen_visual[query], self.seen_text[query])
            return visible & (cache.block_owner[block] == self.batch_slot[query // QUERY_BLOCK, 0])

        return BlockMask.from_kv_blocks(
            self.num_kv_blocks[0],
            self.kv_indices[0],
            self.num_kv_blocks[1],
            self.kv_indices[1],
            BLOCK_SIZE=(QUERY_BLOCK, BLOCK_SIZE),
            mask_mod=mask_mod,
            seq_lengths=(self.query_blocks * QUERY_BLOCK, cache.store.shape[2]),
            compute_q_blocks=False,
        )

    def forward(self, query: Tensor, new_kv: Tensor, layer_cache: Tensor, scale: float) -> Tensor:
        """As `PagedAttention.forward`, with n = 1."""
        layer_cache[:, :, self.cache_index] = new_kv[0]
        if not self.use_flex:
            outputs = [
                nn.functional.scaled_dot_product_attention(
                    query[:, :, rows], *layer_cache[:, None, :, keys], attn_mask=mask, scale=scale, enable_gqa=True
                )
                for rows, keys, mask in self.dense
            ]
            return torch.cat(outputs, 2)
        folded = query[0].unflatten(0, (-1, self.groups))[:, self.head, self.row]
        output = self.attend(folded[None], layer_cache, scale)[0]
        output = output[:, self.start[: query.shape[2], None] + self.heads]  # (key heads, R, groups, D)
        return output.transpose(1, 2).reshape(query.shape)

    @not_compiled  # the code around it is compiled once for any number of rows
    def attend(self, query: Tensor, layer_cache: Tensor, scale: float) -> Tensor:
        """FlexAttention of `query` (1, key heads, F, D) over `layer_cache`; returns the same shape."""
        options = {"block_mask": self.mask, "scale": scale, "kernel_options": KERNEL_OPTIONS}
        keys, values = layer_cache[:, None]
        return compiled_flex()(query, keys, values, self.splits, **options)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """`flex_split_kv` compiled. At its first use: importing the compiler takes a second."""
    return torch.compile(flex_split_kv, dynamic=False)
