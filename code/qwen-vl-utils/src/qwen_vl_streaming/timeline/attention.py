"""The attention rule, and the masks built from it. Knows nothing about positions, token ids or training.

B streams   L keys   Q queries
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ..common.errors import InputError


def allowed(query, key, visual_query, text_key, parallel: bool):
    """The whole rule: whether the token at feed index `query` may attend to the token at `key`.

    A token attends to itself and to what was fed before it, except that in a parallel variant the visual side never
    attends to text. Works on numbers and on tensors that broadcast.
    """
    before = key <= query
    return before & ~(visual_query & text_key) if parallel else before


def dense_mask(
    visual: Tensor,
    text: Tensor,
    parallel: bool,
    query: Tensor | None = None,
    sample: Tensor | None = None,
    feed: Tensor | None = None,
) -> Tensor:
    """A boolean mask of shape (B, 1, Q, L), True where attention is allowed.

    `visual` and `text` are (B, L) flags in feed order; `query` (B, Q) holds the indices of the queries, by default all
    L. `sample` (B, L) numbers the samples that are packed into a row. They never attend to each other. `feed` (B, L)
    holds feed indices, for rows whose tokens are in another order.
    Padding after the end of a stream needs no flag, because nothing before it attends to it.
    """
    place = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
    if query is None:
        query = place
    feed = place if feed is None else feed
    visual_query = visual.gather(1, query)
    fed = feed.gather(1, query)
    mask = allowed(fed[:, :, None], feed[:, None, :], visual_query[:, :, None], text[:, None, :], parallel)
    if sample is not None:
        mask = mask & (sample.gather(1, query)[:, :, None] == sample[:, None, :])
    return mask[:, None]


BLOCK = 128
"""Rows and columns of the blocks of FlexAttention."""


def block_mask(
    visual: Tensor, text: Tensor, parallel: bool, sample: Tensor | None = None, feed: Tensor | None = None
) -> BlockMask:
    """The same rule for FlexAttention over whole rows: (B, L) flags to a block mask of (B, 1, L, L)."""
    length = visual.shape[1]

    def mask_mod(b, h, q, kv):
        fed = (q, kv) if feed is None else (feed[b, q], feed[b, kv])
        return allowed(*fed, visual[b, q], text[b, kv], parallel)

    chosen = mask_mod
    if sample is not None:

        def packed_mask_mod(b, h, q, kv):
            return mask_mod(b, h, q, kv) & (sample[b, q] == sample[b, kv])

        chosen = packed_mask_mod
    # As create_block_mask does, without vmap, which takes the host 10 ms more, and without 64-bit sums over all pairs.
    missing = -length % BLOCK
    dense = nn.functional.pad(dense_mask(visual, text, parallel, sample=sample, feed=feed), (0, missing, 0, missing))
    blocks = dense.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    full = blocks.all(5).all(3)
    partial = blocks.any(5).any(3) & ~full
    lists = [part for kind in (partial, full) for part in _block_lists(kind)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=chosen, seq_lengths=(length, length))


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For flagged blocks (B, 1, rows, columns), how many each row has, and the columns of each row, theirs first."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def make_mask(
    visual: Tensor,
    text: Tensor,
    parallel: bool,
    implementation: str,
    sample: Tensor | None = None,
    feed: Tensor | None = None,
) -> Tensor | BlockMask | None:
    """The mask of whole rows, (B, L) flags, in the form that an attention `implementation` takes. `sample` and `feed`
    are those of `dense_mask`.

    None means causal, which is only returned for rows with one sample of a variant that is not parallel. Raises
    InputError if the implementation cannot express the mask.
    """
    if implementation == "flex_attention":
        return block_mask(visual, text, parallel, sample, feed)
    if not parallel and sample is None and feed is None and (implementation == "sdpa" or "flash" in implementation):
        return None
    if implementation == "sdpa":
        return dense_mask(visual, text, parallel, sample=sample, feed=feed)
    raise InputError(
        f"{implementation} cannot express the mask of a parallel variant (overlap, group, gap) or of packed samples: "
        "use flex_attention on a GPU or sdpa on a CPU"
    )
