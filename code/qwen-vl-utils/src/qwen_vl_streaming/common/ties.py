"""Which differences between two runs of one model are ties: two tokens so near that rounding decides between them.

Two ways to compute the same sum, in one pass or token by token, round differently. In float32 that hardly ever changes
a token; in bfloat16, of 8 binary digits, it does every now and then.
"""

import torch
from torch import Tensor

FLOAT32 = 1e-4
"""The margin that streaming and a full pass keep in float32."""
ROUNDINGS = 4
"""In half precision: so many steps of the type at the size of the largest score. Two scores are rounded in each of two
runs, and what they are computed from has been rounded before, in each layer. Over 24 layers of random weights, where
scores lie close together, the largest margin of 800 tokens was 2.2 steps; a wrong token is some hundred below."""


def tie_margin(scores: Tensor, dtype: torch.dtype) -> float:
    """By how much the `scores` (V,) of a run in `dtype` may put another token above the one that was written, for it to
    be a tie."""
    if dtype == torch.float32:
        return FLOAT32
    return ROUNDINGS * torch.finfo(dtype).eps * float(scores[scores.isfinite()].abs().max())
