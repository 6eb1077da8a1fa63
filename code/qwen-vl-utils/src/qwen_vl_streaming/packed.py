"""The view of a pass in which some seats feed rows, each as many as it has, end to end in one: no product computes rows
that nobody asked for. Knows nothing of variants, positions or token ids.

    R rows of the pass   W pages that a seat may have   P pages of the pool   D size of a head
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from .pages import PAGE, TEXT, Pages
from .views import PIECES, flex_in_shares, list_pages, shares_of


def blocks_for(rows: int) -> int:
    """Blocks of PAGE that hold so many rows and are a power of two, or three halves of one: FlexAttention is compiled
    for each number, and a block of nothing costs it little."""
    blocks = -(-rows // PAGE)
    power = 1 << (blocks - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= blocks else power


class Packed:
    """What up to `room` rows may see: `seen_visual` tokens of their seat's visual run and `seen_text` of its text run.
    For FlexAttention, the query heads that share a key lie beside each other as rows."""

    def __init__(self, pages: Pages, rows: int, groups: int, flex: bool):
        """Room for so many `rows` at least; `groups` and `flex` as in `views.View`."""
        self.pages, self.groups, self.flex = pages, groups, flex
        self.blocks = blocks_for(rows * groups)
        self.room = -(-self.blocks * PAGE // groups)
        self.places: Tensor | None = None
        """Where in the pool the pass writes, (R,)."""
        device = pages.table.device
        self.seats, self.seen_visual, self.seen_text = torch.zeros(3, self.room, dtype=torch.long, device=device)
        self.shares = shares_of(pages, self.blocks * PAGE)
        self.each: list[tuple[slice, Tensor, Tensor]] = []
        """Without FlexAttention: the rows of each seat, the places of all that it holds, and what they see of it."""
        if flex:
            row = torch.arange(self.room, device=device) * groups
            self.first_block = row // PAGE
            self.in_first = (PAGE - row % PAGE).clamp(max=groups)
            self.all_pages = torch.arange(len(pages.owner), device=device)
            self.mask = self._block_mask()

    def put(self, places: Tensor, seats: Tensor, seen_visual: Tensor, seen_text: Tensor) -> None:
        """Set where the rows write, whose they are and what they see, each (R,)."""
        self.places, rows = places, len(places)
        for of_all, own in ((self.seats, seats), (self.seen_visual, seen_visual), (self.seen_text, seen_text)):
            of_all[:rows].copy_(own)
            of_all[rows:].zero_()  # to assign a number would make the host wait
        if self.flex:
            self._list_pages()
        else:
            self._make_masks(rows)

    @staticmethod
    def _sees(token: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """Whether one that sees so much of either run sees `token`, as `Pages.first` counts."""
        return ((token >= 0) & (token < visual)) | ((token >= TEXT) & (token - TEXT < text))

    def _make_masks(self, rows: int) -> None:
        within, begin, self.each = torch.arange(PAGE, device=self.seats.device), 0, []
        seats, counts = self.seats[:rows].unique_consecutive(return_counts=True)
        for seat, count in zip(seats.tolist(), counts.tolist(), strict=True):
            own, table = slice(begin, begin + count), self.pages.table[seat, :, None]
            token = (self.pages.first[table] + within).flatten()
            sees = self._sees(token, self.seen_visual[own, None], self.seen_text[own, None])
            self.each.append((own, (table * PAGE + within).flatten(), sees))
            begin += count

    def _block_mask(self) -> BlockMask:
        pages = self.pages
        shape = 2, self.shares, 1, self.blocks
        self.counts = torch.zeros(shape, dtype=torch.int32, device=self.seats.device)
        self.listed = self.counts.new_zeros(*shape, -(-len(pages.owner) // self.shares))
        """How many pages the rows of a block see in part, and all see whole; and which."""

        def rule(b, h, query, key):
            row, page = query // self.groups, key // PAGE
            seen = self._sees(pages.first[page] + key % PAGE, self.seen_visual[row], self.seen_text[row])
            return seen & (pages.owner[page] == self.seats[row])

        return BlockMask.from_kv_blocks(
            self.counts[0],
            self.listed[0],
            self.counts[1],
            self.listed[1],
            BLOCK_SIZE=PAGE,
            mask_mod=rule,
            seq_lengths=(self.blocks * PAGE, pages.store.shape[2]),
            compute_q_blocks=False,
        )

    def _list_pages(self) -> None:
        table = self.pages.table[self.seats]  # (room, W)
        first, visual, text = self.pages.first[table], self.seen_visual[:, None], self.seen_text[:, None]
        kinds = self._sees(first, visual, text), self._sees(first + PAGE - 1, visual, text)
        amounts = []
        for kind in kinds:  # of a block's PAGE queries, how many see each page, in part and whole
            amount = table.new_zeros((self.blocks + 1) * len(self.all_pages))
            in_first = self.in_first[:, None]
            for block, queries in ((self.first_block, in_first), (self.first_block + 1, self.groups - in_first)):
                where = block.clamp(max=self.blocks)[:, None] * len(self.all_pages) + table
                amount.scatter_add_(0, where.flatten(), (kind * queries).flatten())
            amounts.append(amount.view(self.blocks + 1, -1)[:-1])
        wholly = amounts[1] == PAGE
        which = torch.stack([(amounts[0] > 0) & ~wholly, wholly])[:, None]
        listed, counts = list_pages(which, self.all_pages.expand_as(which[0]), self.shares)
        self.listed.copy_(listed)
        self.counts.copy_(counts)

    def attend(self, query: Tensor, fresh: Tensor, pool: Tensor, scale: float) -> Tensor:
        """As `views.View.attend`, with n = 1."""
        pool[:, :, self.places] = fresh[0]
        return self._mix(query, pool, scale)

    @torch.compiler.disable  # what is around it is compiled once for any number of rows
    def _mix(self, query: Tensor, pool: Tensor, scale: float) -> Tensor:
        if not self.flex:
            mixed = [
                nn.functional.scaled_dot_product_attention(
                    query[:, :, own], *pool[:, None, :, places], attn_mask=sees, scale=scale, enable_gqa=True
                )
                for own, places, sees in self.each
            ]
            return torch.cat(mixed, 2)
        _, heads, rows, size = query.shape
        groups, key_heads = self.groups, heads // self.groups
        asked = query.new_empty(1, key_heads, self.blocks * PAGE, size)
        own = asked[:, :, : rows * groups].unflatten(2, (rows, groups))
        own.copy_(query.unflatten(1, (key_heads, groups)).transpose(2, 3))
        options = {"block_mask": self.mask, "scale": scale, "kernel_options": PIECES}
        mixed = _compiled(asked, *pool[:, None], self.shares, **options)
        result = query.new_empty(1, rows, heads, size)  # as the next product wants it
        result.unflatten(2, (key_heads, groups)).copy_(
            mixed[:, :, : rows * groups].unflatten(2, (rows, groups)).transpose(1, 2)
        )
        return result.transpose(1, 2)


_compiled = torch.compile(flex_in_shares, dynamic=False)
