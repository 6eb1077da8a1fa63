"""The RMS norm, and a product that is followed by one.

Where a kernel leaves parts of the product, another adds them up, adds the residual and computes the norm. The compiler
would read the parts twice, because it does not keep a row of this size in registers.

    M rows   N outputs   K inputs   S parts of a sum over the inputs
"""

import torch
from torch import Tensor

from .quantized_linear import GROUP, Tiles, interleave, partial_products, product, tiles_of


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in the stock layer, with the mean square in float32."""
    hidden32 = hidden.float()
    return weight * (hidden32 * torch.rsqrt(hidden32.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def product_and_norm(
    x: Tensor, weight: Tensor, scale: Tensor | None, added: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, bool]:
    """`quantized_linear.product`, (..., N); its RMS norm with the weight `norm` (N,); and whether that is interleaved,
    for the next product."""
    tiles = None if scale is None else tiles_of(x, weight)
    if scale is None or tiles is None or not tiles.warpgroups or len(weight) % GROUP:
        hidden = product(x, weight, scale, added)
        return hidden, rms_norm(hidden, norm, eps), False
    parts = partial_products(interleave(x.reshape(-1, x.shape[-1])), weight, scale, list(tiles))
    hidden, normed = sum_and_norm(parts, added.reshape(-1, len(weight)), norm, list(tiles), weight.shape[1], eps)
    return hidden.view(added.shape), normed.view(added.shape), True


@torch.library.custom_op("qwen_vl_streaming::sum_and_norm", mutates_args=())
def sum_and_norm(
    parts: Tensor, added: Tensor, norm: Tensor, tiles: list[int], inputs: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As `norm_kernel.sum_and_norm`."""
    from . import norm_kernel

    return norm_kernel.sum_and_norm(parts, added.contiguous(), norm, Tiles(*tiles), inputs, eps)


@sum_and_norm.register_fake
def _(parts, added, norm, tiles, inputs, eps):
    return added.new_empty(added.shape), added.new_empty(added.shape)
