"""A paged KV cache for many streams. Knows nothing about variants, positions or token ids.

Each stream occupies a batch slot, which is a row of the block tables. Its visual run starts at logical token 0, and its
text run at the first block after that (see `plan.py` for the two runs). What a query may attend to is a number of
tokens of each run.

    S batch slots   W blocks per slot   n slots in a step   Q tokens of each   D head size
"""

import numpy as np
import torch
from torch import Tensor, nn

from .device_event import to_device

BLOCK_SIZE = 128
"""Tokens per block, which is also the block size of FlexAttention's masks."""
TEXT_OFFSET = 1 << 30
"""Added to the index of a text token in `PagedKVCache.block_start`, to tell it from a visual token."""
UNUSED = 1 << 40


class PagedKVCache:
    """Blocks of keys and values, and the block table of each batch slot.

    Block 0 belongs to no stream: idle slots and padding write there.
    """

    def __init__(self, config, batch_slots: int, num_blocks: int, blocks_per_slot: int, dtype: torch.dtype, device):
        """`config` is the language model's; `num_blocks` does not count block 0; `blocks_per_slot` is W."""
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = 2 * config.num_hidden_layers, heads, (num_blocks + 1) * BLOCK_SIZE, size
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [*self.store.unflatten(0, (-1, 2))]
        """Keys and values of each layer, (2, heads, cache tokens, D). With a batch dimension, (…, 1, heads, …), the
        compiler would copy the whole cache to write one token."""
        self.block_tables = torch.zeros(batch_slots, blocks_per_slot, dtype=torch.long, device=device)
        """The block of each logical block, (S, W)."""
        self.block_owner = torch.full((num_blocks + 1,), -1, dtype=torch.long, device=device)
        """The batch slot that each block belongs to; -1 if free."""
        self.block_start = torch.full((num_blocks + 1,), UNUSED, dtype=torch.long, device=device)
        """The index in the visual run of each block's first token, or TEXT_OFFSET + its index in the text run."""
        self.text_block = torch.zeros(batch_slots, dtype=torch.long, device=device)
        """The logical block at which each slot's text run starts, (S,)."""
        self.kept_tokens = torch.zeros(2, batch_slots, dtype=torch.long, device=device)
        """How many tokens at the start of each run a sliding window never drops, (2, S)."""
        self.free_blocks = list(range(num_blocks, 0, -1))
        self.allocated: dict[int, list[int]] = {}
        """The blocks of each occupied batch slot."""

    @staticmethod
    def text_block_of(visual: int) -> int:
        """The logical block at which the text run of a stream with `visual` visual tokens starts."""
        return -(-visual // BLOCK_SIZE)

    @staticmethod
    def blocks_needed(visual: int, text: int) -> int:
        """Blocks of a stream with runs of `visual` and `text` tokens."""
        return -(-visual // BLOCK_SIZE) - (-text // BLOCK_SIZE)

    @staticmethod
    def block_bytes(config, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        size = config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * BLOCK_SIZE * size * dtype.itemsize

    def allocate(self, batch_slot: int, visual: int, text: int) -> None:
        """Gives `batch_slot` the blocks for its runs. Raises ValueError if it already has blocks or too few are
        free."""
        count = self.blocks_needed(visual, text)
        if batch_slot in self.allocated or count > min(len(self.free_blocks), self.block_tables.shape[1]):
            raise ValueError(
                f"cannot allocate {count} blocks for batch slot {batch_slot}: {len(self.free_blocks)} are free"
            )
        allocated = self.allocated[batch_slot] = [self.free_blocks.pop() for _ in range(count)]
        blocks = to_device(allocated, self.block_tables.device)
        self.block_tables[batch_slot, :count] = blocks
        self.block_owner.index_fill_(0, blocks, batch_slot)
        text_block = self.text_block_of(visual)
        start, text_start = torch.arange(count, device=blocks.device) * BLOCK_SIZE, text_block * BLOCK_SIZE
        self.block_start[blocks] = torch.where(start < text_start, start, start - text_start + TEXT_OFFSET)
        self.text_block[batch_slot].fill_(text_block)

    def free(self, batch_slot: int) -> None:
        """Returns the blocks of `batch_slot`."""
        allocated = self.allocated.pop(batch_slot)
        self.free_blocks += reversed(allocated)
        self.block_owner.index_fill_(0, to_device(allocated, self.block_owner.device), -1)
        self.block_tables[batch_slot].zero_()
        self.text_block[batch_slot].zero_()

    def cache_index(self, batch_slots: Tensor, logical: Tensor) -> Tensor:
        """Indices into the cache's tokens of the `logical` tokens (n, Q) of `batch_slots` (n,)."""
        return self.block_tables[batch_slots].gather(1, logical // BLOCK_SIZE) * BLOCK_SIZE + logical % BLOCK_SIZE

    # Transfer of keys and values between two caches

    def new_kv_buffer(self, tokens: int) -> Tensor:
        """A zeroed buffer for the keys and values of `tokens`, (2 layers, key heads, tokens, D)."""
        return self.store.new_zeros(*self.store.shape[:2], tokens, self.store.shape[3])

    def copy_out(self, index: Tensor, kv_buffer: Tensor) -> None:
        """Copies the keys and values of the cache's tokens `index`, (n,) on the CPU, to the first n of `kv_buffer`."""
        torch.index_select(self.store, 2, self._padded(index, kv_buffer), out=kv_buffer)

    def copy_in(self, index: Tensor, kv_buffer: Tensor) -> None:
        """Copies the first n keys and values of `kv_buffer` to the cache's tokens `index`, (n,) on the CPU."""
        self.store.index_copy_(2, self._padded(index, kv_buffer), kv_buffer)

    def _padded(self, index: Tensor, kv_buffer: Tensor) -> Tensor:
        """`index` on the device, with block 0 for further tokens of the buffer."""
        assert len(index) <= kv_buffer.shape[2]
        return to_device(nn.functional.pad(index, (0, kv_buffer.shape[2] - len(index))), self.store.device)


class BlockTable:
    """The host's copy of the blocks of one run of a stream. A run that outgrows its blocks reuses the oldest ones after
    those that a sliding window keeps; by then the window must have dropped what they held."""

    def __init__(self, cache: PagedKVCache, blocks: list[int], offset: int, kept: int):
        """`offset` is 0 for a visual run and TEXT_OFFSET for a text run; `kept` counts the tokens at the start that are
        never dropped."""
        self.cache, self.blocks, self.offset = cache, np.array(blocks), offset
        self.kept = min(-(-kept // BLOCK_SIZE), len(blocks) - 1)
        self.last_block = len(blocks) - 1

    def cache_index(self, index):
        """Indices into the cache's tokens of the tokens `index` of the run, a number or an array (L,). Reuses blocks as
        needed."""
        block = index // BLOCK_SIZE
        newest = int(block.max()) if isinstance(block, np.ndarray) else block
        for number in range(self.last_block + 1, newest + 1):
            self.last_block = number
            self.cache.block_start[int(self.blocks[self._wrap(number)])].fill_(self.offset + number * BLOCK_SIZE)
        return self.blocks[self._wrap(block)] * BLOCK_SIZE + index % BLOCK_SIZE

    def _wrap(self, block):
        wrapped = self.kept + (block - self.kept) % (len(self.blocks) - self.kept)
        return np.where(block < self.kept, block, wrapped)
