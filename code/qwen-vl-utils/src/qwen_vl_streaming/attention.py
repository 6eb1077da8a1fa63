"""The attention rule, and the masks built from it. Knows nothing of positions, token ids or training.

B streams   L keys   Q queries
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .errors import InputError


def allowed(query, key, visual_query, text_key, parallel: bool):
    """The whole rule: may the token at feed index `query` attend to that at `key`?

    It may attend to itself and to what was fed before it, except that in a parallel variant the visual side
    never attends to text. Works on numbers and on tensors that broadcast.
    """
    before = key <= query
    return before & ~(visual_query & text_key) if parallel else before


def dense_mask(visual: Tensor, text: Tensor, parallel: bool, query: Tensor | None = None) -> Tensor:
    """A boolean mask of shape (B, 1, Q, L), True where attention is allowed.

    `visual` and `text` are (B, L) flags in feed order; `query` (B, Q) holds feed indices, by default all L.
    Padding after the end of a stream needs no flag: nothing before it attends to it.
    """
    key = torch.arange(visual.shape[1], device=visual.device)
    if query is None:
        query = key.expand_as(visual)
    visual_query = visual.gather(1, query)
    return allowed(query[:, :, None], key, visual_query[:, :, None], text[:, None, :], parallel)[:, None]


def make_mask(visual: Tensor, text: Tensor, parallel: bool, implementation: str) -> Tensor | BlockMask | None:
    """The mask of whole timelines, (B, L) flags, in the form that an attention `implementation` takes.

    None means plainly causal, which only variants that are not parallel may be.
    Raises InputError where the implementation would lose the streaming mask.
    """
    if implementation == "flex_attention":
        return block_mask(visual, text, parallel)
    if not parallel:
        return None
    if implementation in ("sdpa", "eager"):
        return dense_mask(visual, text, parallel)
    raise InputError(
        f"{implementation} cannot hold the mask of a parallel variant (overlap, group, gap): "
        "use flex_attention on a GPU or sdpa on a CPU"
    )


def block_mask(visual: Tensor, text: Tensor, parallel: bool) -> BlockMask:
    """The same rule for FlexAttention over a whole timeline: (B, L) flags to a block mask of (B, 1, L, L)."""
    length = visual.shape[1]

    def rule(b, h, q, kv):
        return allowed(q, kv, visual[b, q], text[b, kv], parallel)

    return create_block_mask(rule, len(visual), None, length, length, device=visual.device)
