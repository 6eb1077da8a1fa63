"""Keys and values of many streams, in pages of one pool. Knows nothing of variants, positions or token ids.

A stream has a *seat*: a row of the page table. Its visual run begins at its logical token 0, its text run at a page of
its own (see `plan.py`), and what a query may see is a number of tokens of each run.

    S seats   W pages that a seat may have   n seats of a pass   Q tokens of each   D size of a head
"""

import torch
from torch import Tensor

from .device_event import put

BLOCK_SIZE = 128
"""Tokens in a page: a block of FlexAttention."""
TEXT_OFFSET = 1 << 30
"""Where the tokens of a text run begin to count, in `PagedKVCache.block_start`."""
UNUSED = 1 << 40


class PagedKVCache:
    """A pool of pages and the table that says whose they are.

    Page 0 belongs to nobody: idle seats and padding write there.
    """

    def __init__(self, config, batch_slots: int, num_blocks: int, blocks_per_slot: int, dtype: torch.dtype, device):
        """`config` is the language model's; `pages` without page 0; `width` is W."""
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = 2 * config.num_hidden_layers, heads, (num_blocks + 1) * BLOCK_SIZE, size
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [*self.store.unflatten(0, (-1, 2))]
        """Keys and values of each layer, (2, heads, pool, D). Not (…, 1, heads, …): the compiler then copies the whole
        pool to write one token."""
        self.block_tables = torch.zeros(batch_slots, blocks_per_slot, dtype=torch.long, device=device)
        """The page of each logical page, (S, W)."""
        self.block_owner = torch.full((num_blocks + 1,), -1, dtype=torch.long, device=device)
        """The seat that a page belongs to."""
        self.block_start = torch.full((num_blocks + 1,), UNUSED, dtype=torch.long, device=device)
        """The token of its seat's visual run with which a page begins, or TEXT_OFFSET + that of the text run."""
        self.text_block = torch.zeros(batch_slots, dtype=torch.long, device=device)
        """The logical page at which a seat's text run begins."""
        self.kept_tokens = torch.zeros(2, batch_slots, dtype=torch.long, device=device)
        """How many tokens at the beginning of a seat's runs stay in sight of a sliding window, (2, S)."""
        self.free_blocks = list(range(num_blocks, 0, -1))
        self.allocated: dict[int, list[int]] = {}

    @staticmethod
    def text_block_of(visual: int) -> int:
        """The logical page at which the text run of a stream with `visual` tokens begins."""
        return -(-visual // BLOCK_SIZE)

    @staticmethod
    def blocks_needed(visual: int, text: int) -> int:
        """Pages of a stream with runs of `visual` and `text` tokens."""
        return -(-visual // BLOCK_SIZE) - (-text // BLOCK_SIZE)

    @staticmethod
    def block_bytes(config, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        size = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * BLOCK_SIZE * size * dtype.itemsize

    def allocate(self, batch_slot: int, visual: int, text: int) -> None:
        """Give `batch_slot` pages for its runs. Raises ValueError where there are too few, or the seat is taken."""
        count = self.blocks_needed(visual, text)
        if batch_slot in self.allocated or count > min(len(self.free_blocks), self.block_tables.shape[1]):
            raise ValueError(f"seat {batch_slot} cannot have {count} pages: {len(self.free_blocks)} are free")
        mine = self.allocated[batch_slot] = [self.free_blocks.pop() for _ in range(count)]
        blocks = put(mine, self.block_tables.device)
        self.block_tables[batch_slot, :count] = blocks
        self.block_owner.index_fill_(0, blocks, batch_slot)
        begin = self.text_block_of(visual)
        first = torch.arange(count, device=blocks.device) * BLOCK_SIZE
        self.block_start[blocks] = torch.where(
            first < begin * BLOCK_SIZE, first, first - begin * BLOCK_SIZE + TEXT_OFFSET
        )
        self.text_block[batch_slot].fill_(begin)

    def free(self, batch_slot: int) -> None:
        mine = self.allocated.pop(batch_slot)
        self.free_blocks += reversed(mine)
        self.block_owner.index_fill_(0, put(mine, self.block_owner.device), -1)
        self.block_tables[batch_slot].zero_()
        self.text_block[batch_slot].zero_()

    def cache_index(self, batch_slots: Tensor, logical: Tensor) -> Tensor:
        """Where in the pool the `logical` tokens (n, Q) of `batch_slots` (n,) lie."""
        return self.block_tables[batch_slots].gather(1, logical // BLOCK_SIZE) * BLOCK_SIZE + logical % BLOCK_SIZE
