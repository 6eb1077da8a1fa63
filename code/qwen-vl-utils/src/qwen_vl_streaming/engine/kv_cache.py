"""Keys and values of many streams, in pages of one pool. Knows nothing of variants, positions or token ids.

A stream has a *seat*: a row of the page table. Its visual run begins at its logical token 0, its text run at a page of
its own (see `plan.py`), and what a query may see is a number of tokens of each run.

    S seats   W pages that a seat may have   n seats of a pass   Q tokens of each   D size of a head
"""

import torch
from torch import Tensor

from .device_event import put

PAGE = 128
"""Tokens in a page: a block of FlexAttention."""
TEXT = 1 << 30
"""Where the tokens of a text run begin to count, in `PagedKVCache.first`."""
NOWHERE = 1 << 40


class PagedKVCache:
    """A pool of pages and the table that says whose they are.

    Page 0 belongs to nobody: idle seats and padding write there.
    """

    def __init__(self, config, batch_slots: int, pages: int, width: int, dtype: torch.dtype, device):
        """`config` is the language model's; `pages` without page 0; `width` is W."""
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        shape = 2 * config.num_hidden_layers, heads, (pages + 1) * PAGE, size
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [*self.store.unflatten(0, (-1, 2))]
        """Keys and values of each layer, (2, heads, pool, D). Not (…, 1, heads, …): the compiler then copies the whole
        pool to write one token."""
        self.table = torch.zeros(batch_slots, width, dtype=torch.long, device=device)
        """The page of each logical page, (S, W)."""
        self.owner = torch.full((pages + 1,), -1, dtype=torch.long, device=device)
        """The seat that a page belongs to."""
        self.first = torch.full((pages + 1,), NOWHERE, dtype=torch.long, device=device)
        """The token of its seat's visual run with which a page begins, or TEXT + that of the text run."""
        self.text_page = torch.zeros(batch_slots, dtype=torch.long, device=device)
        """The logical page at which a seat's text run begins."""
        self.kept = torch.zeros(2, batch_slots, dtype=torch.long, device=device)
        """How many tokens at the beginning of a seat's runs stay in sight of a sliding window, (2, S)."""
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

    def take(self, batch_slot: int, visual: int, text: int) -> None:
        """Give `batch_slot` pages for its runs. Raises ValueError where there are too few, or the seat is taken."""
        count = self.need(visual, text)
        if batch_slot in self.held or count > min(len(self.free), self.table.shape[1]):
            raise ValueError(f"seat {batch_slot} cannot have {count} pages: {len(self.free)} are free")
        mine = self.held[batch_slot] = [self.free.pop() for _ in range(count)]
        pages = put(mine, self.table.device)
        self.table[batch_slot, :count] = pages
        self.owner.index_fill_(0, pages, batch_slot)
        begin = self.text_page_of(visual)
        first = torch.arange(count, device=pages.device) * PAGE
        self.first[pages] = torch.where(first < begin * PAGE, first, first - begin * PAGE + TEXT)
        self.text_page[batch_slot].fill_(begin)

    def give_back(self, batch_slot: int) -> None:
        mine = self.held.pop(batch_slot)
        self.free += reversed(mine)
        self.owner.index_fill_(0, put(mine, self.owner.device), -1)
        self.table[batch_slot].zero_()
        self.text_page[batch_slot].zero_()

    def places(self, batch_slots: Tensor, logical: Tensor) -> Tensor:
        """Where in the pool the `logical` tokens (n, Q) of `batch_slots` (n,) lie."""
        return self.table[batch_slots].gather(1, logical // PAGE) * PAGE + logical % PAGE
