"""What the queries of a pass may see in a pool of pages, and the attention that reads it. Knows nothing of variants,
positions or token ids.

    S seats   W pages that a seat may have   n seats in a pass   Q queries of each   D size of a head
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .kv_cache import BLOCK_SIZE, TEXT_OFFSET, PagedKVCache


@dataclass
class PagedAttention:
    """What the queries of a pass may see: `seen_visual` tokens of their seat's visual run and `seen_text` of its text
    run; where `window_start` is given, only the kept tokens and what lies behind the two numbers it says."""

    cache: PagedKVCache
    batch_slots: Tensor
    """(n,)"""
    places: Tensor | None
    """Where in the pool the pass writes, (n, Q)."""
    seen_visual: Tensor
    """(n, Q)"""
    seen_text: Tensor
    """(n, Q)"""
    groups: int
    """Query heads for each key head."""
    flex: bool
    """FlexAttention, else SDPA with a dense mask."""
    options: dict | None = None
    """FlexAttention's kernel_options."""
    window_start: Tensor | None = None
    """(2, n, Q)"""
    shares: int = 1
    """FlexAttention takes the pages that a seat's queries see in so many shares at once, each of every so manieth page,
    and joins what comes out: few queries alone do not keep a GPU busy."""

    def __post_init__(self):
        self.mask = self._block_mask() if self.flex else None
        self.refresh()

    def _sees(self, token: Tensor, pick) -> Tensor:
        """Whether queries see `token`, counted as in `PagedKVCache.block_start`. `pick` takes what belongs to them of a
        tensor (n, Q), and what belongs to their seats of a tensor (S,)."""
        seen = None
        for run, (begin, upto) in enumerate(((0, self.seen_visual), (TEXT_OFFSET, self.seen_text))):
            own = token - begin
            those = (own >= 0) & (own < pick(upto))
            if self.window_start is not None:
                those = those & ((own >= pick(self.window_start[run])) | (own < pick(self.cache.kept_tokens[run])))
            seen = those if seen is None else seen | those
        return seen

    def _dense_mask(self) -> Tensor:
        """Mask (n, 1, Q, keys) over what the table of each seat lists; `gathered` says where that lies."""
        table = self.cache.block_tables[self.batch_slots]
        within = torch.arange(table.shape[1] * BLOCK_SIZE, device=table.device) % BLOCK_SIZE
        self.gathered = table.repeat_interleave(BLOCK_SIZE, 1) * BLOCK_SIZE + within
        token = (self.cache.block_start[table].repeat_interleave(BLOCK_SIZE, 1) + within)[:, None]
        mask = self._sees(token, lambda of: of[self.batch_slots, None, None] if of.dim() == 1 else of[..., None])
        return (mask | ~mask.any(-1, keepdim=True))[:, None]  # a query that sees nothing must come to no NaN

    def _block_mask(self) -> BlockMask:
        """The same for FlexAttention over the pool, with only the pages that hold something seen.

        The heads that share a key lie beside each other as queries: (n, key heads, Q x groups, D). So few queries are
        one tile of one kernel, and a key is read once for all of them.
        """
        cache, batch_slots, groups = self.cache, self.batch_slots, self.groups
        rows = self.seen_visual.shape[1] * groups
        self.one = self.seen_visual.shape[1] == 1
        shape = 1 if self.one else 2, len(batch_slots) * self.shares, 1, -(-rows // BLOCK_SIZE)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=batch_slots.device)
        self.listed = self.counts.new_zeros(*shape, -(-cache.block_tables.shape[1] // self.shares))
        """How many pages the queries of a block see in part, and all see whole; and which. With one query a seat all
        are looked at as partly seen: the kernel for few queries shares out only those among the GPU's processors."""

        shares = self.shares

        def rule(b, h, row, key):
            b, q, block = b // shares, row // groups, key // BLOCK_SIZE
            seen = self._sees(
                cache.block_start[block] + key % BLOCK_SIZE,
                lambda of: of[batch_slots[b]] if of.dim() == 1 else of[b, q],
            )
            return seen & (cache.block_owner[block] == batch_slots[b])

        return BlockMask.from_kv_blocks(
            self.counts[0],
            self.listed[0],
            *((None, None) if self.one else (self.counts[1], self.listed[1])),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=rule,
            seq_lengths=(rows, cache.store.shape[2]),
            compute_q_blocks=False,
        )

    def refresh(self) -> None:
        """Bring the mask up to date after a change to the numbers above, which is made in place."""
        if not self.flex:
            self.mask = self._dense_mask()
            return
        blocks = self.counts.shape[-1]
        table = self.cache.block_tables[self.batch_slots, None].expand(-1, blocks, -1)
        first = self.cache.block_start[table]

        def seen(whole: bool) -> Tensor:
            """Whether a page is seen, by all queries of a block entirely or by any in part: (n, blocks, W)."""
            found = None
            for run, (begin, upto) in enumerate(((0, self.seen_visual), (TEXT_OFFSET, self.seen_text))):
                own = first - begin
                those = (own >= 0) & (
                    own + (BLOCK_SIZE if whole else 1) <= self._of_block(upto, blocks, whole)[..., None]
                )
                if self.window_start is not None:
                    window_start = self._of_block(self.window_start[run], blocks, not whole)[..., None]
                    kept = self.cache.kept_tokens[run][self.batch_slots, None, None]
                    if whole:
                        those = those & ((own >= window_start) | (own + BLOCK_SIZE <= kept))
                    else:
                        those = those & ((own + BLOCK_SIZE > window_start) | (own < kept))
                found = those if found is None else found | those
            return found

        partly = seen(False)
        which = partly[None]
        if not self.one:
            wholly = seen(True)
            which = torch.stack([partly & ~wholly, wholly])
        listed, counts = list_pages(which, table, self.shares)
        self.listed.copy_(listed)
        self.counts.copy_(counts)

    def _of_block(self, numbers: Tensor, blocks: int, fewest: bool) -> Tensor:
        """The least or the greatest of the `numbers` (n, Q) of a block's queries, (n, blocks)."""
        if self.one:
            return numbers
        rows = numbers.repeat_interleave(self.groups, 1)
        last = rows[:, -1:].expand(-1, blocks * BLOCK_SIZE - rows.shape[1])
        rows = torch.cat([rows, last], 1).view(len(rows), blocks, BLOCK_SIZE)
        return rows.amin(-1) if fewest else rows.amax(-1)

    def attend(self, query: Tensor, fresh: Tensor, pool: Tensor, scale: float) -> Tensor:
        """Store the `fresh` keys and values (n, 2, key heads, Q, D) in the `pool` of a layer, then let `query` (n,
        heads, Q, D) see what it may. Returns the shape of `query`."""
        pool[:, :, self.places.flatten()] = fresh.movedim(0, 2).flatten(2, 3)
        return self.mix(query, pool, scale)

    def mix(self, query: Tensor, pool: Tensor, scale: float) -> Tensor:
        """What `query` (n, heads, Q, D) makes of the `pool` of a layer, of the same shape."""
        if not self.flex:
            mine = pool[:, :, self.gathered].transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(
                query, *mine, attn_mask=self.mask, scale=scale, enable_gqa=True
            )
        n, heads, many, size = query.shape
        folded = query.reshape(n, heads // self.groups, self.groups, many, size).transpose(2, 3).flatten(2, 3)
        options = {"block_mask": self.mask, "scale": scale, "kernel_options": self.options}
        mixed = flex_in_shares(folded, *pool[:, None], self.shares, **options)
        return mixed.view(n, heads // self.groups, many, self.groups, size).transpose(2, 3).reshape(query.shape)


def list_pages(which: Tensor, pages: Tensor, shares: int) -> tuple[Tensor, Tensor]:
    """Of `pages` (n, blocks, W) those that `which` (lists, n, blocks, W) flags, in so many shares, as a block mask has
    them: (lists, n x shares, 1, blocks, pages of a share), and how many they are, without the last axis."""
    # Not by sorting: of all that is compiled for a pass, sorts would take the longest.
    room = -(-which.shape[-1] // shares) * shares
    place = (which.cumsum(-1) - 1).where(which, room)
    own = pages.new_zeros(*which.shape[:-1], room + 1).scatter(-1, place, pages.expand_as(which))[..., :room]
    # (lists, n, blocks, pages of a share, shares) to (lists, n x shares, 1, blocks, pages of a share)
    listed = own.unflatten(-1, (-1, shares)).movedim(-1, 2).flatten(1, 2)[:, :, None]
    share = torch.arange(shares, device=pages.device)[:, None]
    return listed, ((which.sum(-1)[:, :, None] - share + shares - 1) // shares).flatten(1, 2)[:, :, None]


def flex_in_shares(query: Tensor, keys: Tensor, values: Tensor, shares: int, **options) -> Tensor:
    """FlexAttention for `query` (n, heads, Q, D), whose block mask has n x `shares` lists of pages."""
    if shares == 1:
        return flex_attention(query, keys, values, **options)
    shared = query.repeat_interleave(shares, 0)
    mixed, aux = flex_attention(shared, keys, values, **options, return_aux=AuxRequest(lse=True))
    return _join_shares(mixed, aux.lse, shares)


def _join_shares(mixed: Tensor, lse: Tensor, shares: int) -> Tensor:
    """What attention makes of all keys, of what it made of each of `shares` shares (n x shares, …, D) and the logarithm
    of the sum of their exponentials (n x shares, …), -inf where there is no key."""
    mixed, lse = mixed.unflatten(0, (-1, shares)), lse.unflatten(0, (-1, shares))
    weight = (lse - lse.amax(1, keepdim=True).clamp(min=torch.finfo(lse.dtype).min)).exp()
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(lse.dtype).tiny)
    return (mixed.float() * weight[..., None]).sum(1).to(mixed.dtype)


PIECES: dict = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
"""FlexAttention's kernel_options for pieces, measured on an H200."""
MOST_SHARES = 8


def tuned(cache: PagedKVCache, n: int, queries: int, groups: int, options: dict) -> dict:
    """`options` and `shares` of a view of n x `queries`: for few of them the `options` given, since FlexAttention then
    shares out by itself; else so many shares that each of a GPU's processors has a block of queries, counted with the
    heads of all keys."""
    if queries * groups < BLOCK_SIZE:
        return {"options": options, "shares": 1}
    return {"options": PIECES, "shares": shares_of(cache, n * queries * groups)}


def shares_of(cache: PagedKVCache, rows: int) -> int:
    """In how many shares so many `rows` of queries for each key head see pages."""
    device = cache.store.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    blocks = -(-rows * cache.store.shape[1] // PIECES["BLOCK_M"])
    return min(max(processors // blocks, 1), MOST_SHARES)


class MixedAttention:
    """The view of a pass in which each of S seats has one row, and n pieces of Q rows each belong to some of them. All
    rows lie end to end in one: the seats' own, then piece by piece. With one seat and one piece, they are one part."""

    def __init__(
        self, cache: PagedKVCache, pieces: tuple[int, int], groups: int, flex: bool, options: dict, windows: bool
    ):
        """`pieces` are n and Q; `options` are FlexAttention's kernel_options for the seats' own rows."""
        batch_slots, device = len(cache.block_tables), cache.block_tables.device
        self.places = torch.zeros(1, batch_slots + pieces[0] * pieces[1], dtype=torch.long, device=device)
        shapes = [(batch_slots, 1), pieces] if pieces[0] else [(batch_slots, 1)]
        if batch_slots == pieces[0] == 1:
            shapes = [(1, 1 + pieces[1])]
        self.parts: list[PagedAttention] = []
        for n, many in shapes:
            whose = torch.arange(batch_slots, device=device) if not self.parts else torch.zeros_like(self.places[0, :n])
            numbers = torch.ones(4, n, many, dtype=torch.long, device=device)
            self.parts.append(
                PagedAttention(
                    cache,
                    whose,
                    None,
                    numbers[0],
                    numbers[1],
                    groups,
                    flex,
                    window_start=numbers[2:].zero_() if windows else None,
                    **tuned(cache, n, many, groups, options),
                )
            )

    def place(self, places: Tensor, seen: Tensor, batch_slots: Tensor) -> None:
        """Set where the rows write, (rows,), what they see (`seen_visual`, `seen_text` and `window_start`, (4,
        rows)), and the seats of the pieces, (n,)."""
        self.places.copy_(places[None])
        first = 0
        for part in self.parts:
            shape = part.seen_visual.shape
            own = seen[:, first : first + shape.numel()].unflatten(1, shape)
            part.seen_visual.copy_(own[0])
            part.seen_text.copy_(own[1])
            if part.window_start is not None:
                part.window_start.copy_(own[2:])
            if first:
                part.batch_slots.copy_(batch_slots)
            first += shape.numel()
            part.refresh()

    def attend(self, query: Tensor, fresh: Tensor, pool: Tensor, scale: float) -> Tensor:
        """As `PagedAttention.attend`, with one row of all."""
        pool[:, :, self.places.flatten()] = fresh[0]
        mixed, first = [], 0
        for part in self.parts:
            n, many = part.seen_visual.shape
            own = query[0, :, first : first + n * many].unflatten(1, (n, many)).transpose(0, 1)
            mixed.append(part.mix(own, pool, scale).transpose(0, 1).flatten(1, 2))
            first += n * many
        return torch.cat(mixed, 1)[None]


@dataclass
class PrefillAttention:
    """A pass over seats that have nothing in the pool yet, end to end in one row: for each the whole visual run, of
    which a row sees what came before it, and then the first rows of the text run, which see what `leads` says."""

    places: Tensor
    """(1, Q)"""
    leads: list[tuple[int, Tensor]]
    """For each seat the length of its visual run, and what its text rows may see of as many rows at its beginning as
    any of them sees, and then of each other: (text rows, rows seen + text rows)."""

    @torch.compiler.disable  # its loop would be compiled anew for each number of seats
    def attend(self, query: Tensor, fresh: Tensor, pool: Tensor, scale: float) -> Tensor:
        """As `PagedAttention.attend`, with n = 1."""
        pool[:, :, self.places.flatten()] = fresh[0]
        lengths = [visual + len(mask) for visual, mask in self.leads]
        options = {"scale": scale, "enable_gqa": True}
        mixed = query.new_empty(query.transpose(1, 2).shape)  # as the next product wants it
        runs = zip(*(tensor.split(lengths, 2) for tensor in (query, *fresh.unbind(1))), strict=True)
        for (visual, mask), own, (asks, *known) in zip(self.leads, mixed.split(lengths, 1), runs, strict=True):
            sight = (tensor[:, :, :visual] for tensor in (asks, *known))
            seen = nn.functional.scaled_dot_product_attention(*sight, is_causal=True, **options)
            own[:, :visual] = seen.transpose(1, 2)
            upto = mask.shape[1] - len(mask)
            sight = (torch.cat([tensor[:, :, :upto], tensor[:, :, visual:]], 2) for tensor in known)
            seen = nn.functional.scaled_dot_product_attention(asks[:, :, visual:], *sight, attn_mask=mask, **options)
            own[:, visual:] = seen.transpose(1, 2)
        return mixed.transpose(1, 2)
