"""Attention of a step over the paged KV cache, and what each query may attend to. Knows nothing about variants,
positions or token ids.

    S batch slots   W blocks per slot   n slots in a step   Q queries of each   D head size
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..common.compiling import not_compiled
from .chunk_attention import attend_chunks
from .kv_cache import BLOCK_SIZE, TEXT_OFFSET, PagedKVCache
from .split_kv import combine_splits, flex_splits, kernel_settings, list_blocks


@dataclass
class PagedAttention:
    """Each query attends to the first `seen_visual` tokens of its slot's visual run and the first `seen_text` of its
    text run. With `window_start`, tokens before it are dropped, except the slot's kept tokens."""

    cache: PagedKVCache
    batch_slots: Tensor
    """(n,)"""
    cache_index: Tensor
    """Where the step writes its keys and values in the cache, (n, Q)."""
    seen_visual: Tensor
    """(n, Q)"""
    seen_text: Tensor
    """(n, Q)"""
    groups: int
    """Query heads per key head."""
    use_flex: bool
    """FlexAttention, or the kernel for chunks; otherwise SDPA with a dense mask."""
    kernel_options: dict | None = None
    """FlexAttention's kernel_options."""
    window_start: Tensor | None = None
    """(2, n, Q), for the visual and the text run."""
    splits: int = 1
    """Splits of each slot's keys, see `split_kv.py`. Split i holds blocks i, i + splits, …"""
    use_kernel: bool = False
    """With `use_flex`, the kernel of `hopper_attention.py` instead of FlexAttention, with the same lists of blocks."""

    def __post_init__(self):
        if self.use_flex:
            self.mask = self._block_mask()
        self.refresh()

    def _visible(self, token: Tensor, pick) -> Tensor:
        """Whether queries may attend to `token`, counted as in `PagedKVCache.block_start`. `pick` selects the entries
        of these queries from a tensor (n, Q), and of their slots from a tensor (S,)."""
        in_runs = []
        for run, (offset, seen) in enumerate(((0, self.seen_visual), (TEXT_OFFSET, self.seen_text))):
            index = token - offset
            in_run = (index >= 0) & (index < pick(seen))
            if self.window_start is not None:
                in_run = in_run & (
                    (index >= pick(self.window_start[run])) | (index < pick(self.cache.kept_tokens[run]))
                )
            in_runs.append(in_run)
        return in_runs[0] | in_runs[1]

    def _dense_mask(self) -> Tensor:
        """Mask (n, 1, Q, keys) over all blocks of each slot. Sets `key_index`, where these keys are in the cache."""
        table = self.cache.block_tables[self.batch_slots]
        within = torch.arange(table.shape[1] * BLOCK_SIZE, device=table.device) % BLOCK_SIZE
        self.key_index = table.repeat_interleave(BLOCK_SIZE, 1) * BLOCK_SIZE + within
        token = (self.cache.block_start[table].repeat_interleave(BLOCK_SIZE, 1) + within)[:, None]
        mask = self._visible(token, lambda of: of[self.batch_slots, None, None] if of.dim() == 1 else of[..., None])
        return (mask | ~mask.any(-1, keepdim=True))[:, None]  # a fully masked query would give NaN

    def _block_mask(self) -> BlockMask:
        """The same mask for FlexAttention over the whole cache, which visits only blocks with something visible.

        The query heads of a key head are laid out as further queries: (n, key heads, Q x groups, D). A few queries are
        then one tile of one kernel, and each key is read once for all of them.
        """
        cache, batch_slots, groups, splits = self.cache, self.batch_slots, self.groups, self.splits
        rows = self.seen_visual.shape[1] * groups
        self.single_query = self.seen_visual.shape[1] == 1
        shape = 1 if self.single_query else 2, len(batch_slots) * splits, 1, -(-rows // BLOCK_SIZE)
        self.num_kv_blocks = torch.zeros(shape, dtype=torch.int32, device=batch_slots.device)
        self.kv_indices = self.num_kv_blocks.new_zeros(*shape, -(-cache.block_tables.shape[1] // splits))
        """As in BlockMask: partial blocks, then full ones. With one query per slot all blocks count as partial, because
        FlexAttention's decoding kernel distributes only those over the GPU's processors."""

        def mask_mod(b, h, row, key):
            b, q, block = b // splits, row // groups, key // BLOCK_SIZE
            visible = self._visible(
                cache.block_start[block] + key % BLOCK_SIZE,
                lambda of: of[batch_slots[b]] if of.dim() == 1 else of[b, q],
            )
            return visible & (cache.block_owner[block] == batch_slots[b])

        return BlockMask.from_kv_blocks(
            self.num_kv_blocks[0],
            self.kv_indices[0],
            *((None, None) if self.single_query else (self.num_kv_blocks[1], self.kv_indices[1])),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=mask_mod,
            seq_lengths=(rows, cache.store.shape[2]),
            compute_q_blocks=False,
        )

    def refresh(self) -> None:
        """Recomputes the mask after the tensors above were changed in place."""
        if not self.use_flex:
            self.dense_mask = self._dense_mask()
            return
        query_blocks = self.num_kv_blocks.shape[-1]
        table = self.cache.block_tables[self.batch_slots, None].expand(-1, query_blocks, -1)
        start = self.cache.block_start[table]

        def visible(full: bool) -> Tensor:
            """Whether all queries of a query block may attend to all of a block, or any to any of it: (n, query blocks,
            W)."""
            in_runs = []
            for run, (offset, seen) in enumerate(((0, self.seen_visual), (TEXT_OFFSET, self.seen_text))):
                index = start - offset
                in_run = (index >= 0) & (
                    index + (BLOCK_SIZE if full else 1) <= self._reduce(seen, query_blocks, full)[..., None]
                )
                if self.window_start is not None:
                    window_start = self._reduce(self.window_start[run], query_blocks, not full)[..., None]
                    kept = self.cache.kept_tokens[run][self.batch_slots, None, None]
                    if full:
                        in_run = in_run & ((index >= window_start) | (index + BLOCK_SIZE <= kept))
                    else:
                        in_run = in_run & ((index + BLOCK_SIZE > window_start) | (index < kept))
                in_runs.append(in_run)
            return in_runs[0] | in_runs[1]

        partial = visible(False)
        flags = partial[None]
        if not self.single_query:
            full = visible(True)
            flags = torch.stack([partial & ~full, full])
        kv_indices, num_kv_blocks = list_blocks(flags, table, self.splits)
        self.kv_indices.copy_(kv_indices)
        self.num_kv_blocks.copy_(num_kv_blocks)

    def _reduce(self, numbers: Tensor, query_blocks: int, smallest: bool) -> Tensor:
        """The smallest or largest of `numbers` (n, Q) in each query block, (n, query blocks)."""
        if self.single_query:
            return numbers
        rows = numbers.repeat_interleave(self.groups, 1)
        last = rows[:, -1:].expand(-1, query_blocks * BLOCK_SIZE - rows.shape[1])
        rows = torch.cat([rows, last], 1).view(len(rows), query_blocks, BLOCK_SIZE)
        return rows.amin(-1) if smallest else rows.amax(-1)

    def forward(self, query: Tensor, new_kv: Tensor, layer_cache: Tensor, scale: float) -> Tensor:
        """Writes the keys and values `new_kv` (n, 2, key heads, Q, D) into `layer_cache`, then attends with `query` (n,
        heads, Q, D). Returns the shape of `query`."""
        layer_cache[:, :, self.cache_index.flatten()] = new_kv.movedim(0, 2).flatten(2, 3)
        return self.attend(query, layer_cache, scale)

    def attend(self, query: Tensor, layer_cache: Tensor, scale: float) -> Tensor:
        """Attention of `query` (n, heads, Q, D) over `layer_cache`; returns the same shape."""
        if not self.use_flex:
            keys_values = layer_cache[:, :, self.key_index].transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(
                query, *keys_values, attn_mask=self.dense_mask, scale=scale, enable_gqa=True
            )
        n, heads, queries, size = query.shape
        if self.use_kernel:
            output, lse = attend_chunks(
                *(self._fold(query), layer_cache, self.kv_indices, self.num_kv_blocks),
                *(self.seen_visual, self.seen_text, self.window_start),
                *(self.batch_slots, self.cache.kept_tokens, self.cache.block_start, scale, self.splits),
            )
            lse = None if self.splits == 1 else lse[..., None].expand(output.shape)
            return combine_splits(output, lse, self.splits).transpose(1, 2)
        output = combine_splits(*self.attend_splits(query, layer_cache, scale), self.splits)
        return output.view(n, heads // self.groups, queries, self.groups, size).transpose(2, 3).reshape(query.shape)

    def attend_splits(self, query: Tensor, layer_cache: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """FlexAttention of `query` (n, heads, Q, D), as `flex_splits`: the output over each split of the keys, and its
        log-sum-exp, (n x splits, key heads, Q x groups, D) each."""
        options = {"block_mask": self.mask, "scale": scale, "kernel_options": self.kernel_options}
        keys, values = layer_cache[:, None]
        return flex_splits(self._fold(query), keys, values, self.splits, **options)

    def _fold(self, query: Tensor) -> Tensor:
        """`query` (n, heads, Q, D) as (n, key heads, Q x groups, D)."""
        return query.unflatten(1, (-1, self.groups)).transpose(2, 3).flatten(2, 3)


class MixedAttention:
    """Attention of a step with decode rows of different slots and n prefill chunks of Q rows, each of some slot.

    The rows form one sequence: the decode rows, then chunk after chunk. If the cache has one slot, its
    decode row and one chunk are attended to as one part."""

    def __init__(
        self,
        cache: PagedKVCache,
        decode_rows: int,
        chunks: tuple[int, int],
        groups: int,
        use_flex: bool,
        kernel_options: dict,
        windowed: bool,
    ):
        """`chunks` are n and Q; `kernel_options` are FlexAttention's for the decode rows."""
        device = cache.block_tables.device
        self.cache_index = torch.zeros(1, decode_rows + chunks[0] * chunks[1], dtype=torch.long, device=device)
        shapes = [(decode_rows, 1), chunks] if chunks[0] else [(decode_rows, 1)]
        if len(cache.block_tables) == chunks[0] == 1:
            shapes = [(1, 1 + chunks[1])]
        self.parts: list[PagedAttention] = []
        indices = self.cache_index[0].split([n * queries for n, queries in shapes])
        for (n, queries), index in zip(shapes, indices, strict=True):
            numbers = torch.ones(4, n, queries, dtype=torch.long, device=device)
            self.parts.append(
                PagedAttention(
                    cache,
                    torch.zeros(n, dtype=torch.long, device=device),
                    index.view(n, queries),
                    numbers[0],
                    numbers[1],
                    groups,
                    use_flex,
                    window_start=numbers[2:].zero_() if windowed else None,
                    **kernel_settings(cache, n, queries, groups, kernel_options),
                )
            )

    def update(self, cache_index: Tensor, seen: Tensor, batch_slots: Tensor) -> None:
        """Sets where the rows are written, (rows,), what they may attend to (`seen_visual`, `seen_text` and
        `window_start`, (4, rows)), and the batch slots of the decode rows and then of the chunks."""
        self.cache_index.copy_(cache_index[None])
        first = first_slot = 0
        for part in self.parts:
            shape = part.seen_visual.shape
            own = seen[:, first : first + shape.numel()].unflatten(1, shape)
            part.seen_visual.copy_(own[0])
            part.seen_text.copy_(own[1])
            if part.window_start is not None:
                part.window_start.copy_(own[2:])
            part.batch_slots.copy_(batch_slots[first_slot : first_slot + shape[0]])
            first, first_slot = first + shape.numel(), first_slot + shape[0]
            part.refresh()

    def forward(self, query: Tensor, new_kv: Tensor, layer_cache: Tensor, scale: float) -> Tensor:
        """As `PagedAttention.forward`, with all rows as one sequence."""
        layer_cache[:, :, self.cache_index.flatten()] = new_kv[0]
        outputs, first = [], 0
        for part in self.parts:
            n, queries = part.seen_visual.shape
            own = query[0, :, first : first + n * queries].unflatten(1, (n, queries)).transpose(0, 1)
            outputs.append(part.attend(own, layer_cache, scale).transpose(0, 1).flatten(1, 2))
            first += n * queries
        return torch.cat(outputs, 1)[None]


@dataclass
class PrefillAttention:
    """Attention of the first step of some slots, whose rows form one sequence. For each slot these are the whole visual
    run, which is causal, and the header, which attends to what `headers` says. Reads nothing from the cache."""

    cache_index: Tensor
    """(1, Q)"""
    headers: list[tuple[int, Tensor]]
    """For each slot the length of its visual run, and the mask of its header rows over the visual rows that any of them
    may attend to, followed by the header rows: (header rows, visual rows + header rows)."""

    @not_compiled  # the loop would be compiled again for each number of slots
    def forward(self, query: Tensor, new_kv: Tensor, layer_cache: Tensor, scale: float) -> Tensor:
        """As `PagedAttention.forward`, with n = 1."""
        layer_cache[:, :, self.cache_index.flatten()] = new_kv[0]
        lengths = [visual + len(mask) for visual, mask in self.headers]
        options = {"scale": scale, "enable_gqa": True}
        output = query.new_empty(query.transpose(1, 2).shape)  # the layout that the output projection reads
        runs = zip(*(tensor.split(lengths, 2) for tensor in (query, *new_kv.unbind(1))), strict=True)
        for (visual, mask), out, (queries, *keys_values) in zip(
            self.headers, output.split(lengths, 1), runs, strict=True
        ):
            of_visual = (tensor[:, :, :visual] for tensor in (queries, *keys_values))
            attended = nn.functional.scaled_dot_product_attention(*of_visual, is_causal=True, **options)
            out[:, :visual] = attended.transpose(1, 2)
            seen = mask.shape[1] - len(mask)
            of_header = (torch.cat([tensor[:, :, :seen], tensor[:, :, visual:]], 2) for tensor in keys_values)
            attended = nn.functional.scaled_dot_product_attention(
                queries[:, :, visual:], *of_header, attn_mask=mask, **options
            )
            out[:, visual:] = attended.transpose(1, 2)
        return output.transpose(1, 2)
