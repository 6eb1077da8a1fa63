"""FlexAttention of the language model, faster on short rows in training than that of transformers, and equal up to
rounding."""

from importlib.metadata import PackageNotFoundError, version

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import (
    compile_friendly_flex_attention,
    flex_attention_forward,
    repeat_kv,
)

FA4 = "flex_fa4"
"""FlexAttention with the kernels of flash-attn-4. (transformers takes any name with "flash" for one of its own.)"""
FA4_ARCHITECTURES = (9, 10)
"""Major compute capabilities of the GPUs that these kernels support with a mask: Hopper, Blackwell."""


def has_fa4() -> bool:
    """Whether flash-attn-4 is installed. flash-attn, its predecessor, has a package of the same name."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True


FEW_KEYS = 64 * 128
"""Keys of all key-value heads together. For fewer, the backward kernel uses less than half of a large GPU."""


def flex_attention(module, query, key, value, attention_mask, **options):
    """FlexAttention of transformers. In training on short rows, each query head gets a copy of its key-value head.

    For the gradients of keys and values, the kernel runs one program for each 128 keys of a key-value head, which loops
    over all query heads that share it: 48 programs for 3,072 tokens at 3B, where an H200 has 132 multiprocessors. With
    copies it takes 0.5 ms a layer instead of 1.25. They are kept for the backward pass, 8 KB per token and layer, and
    gain nothing in rows of four samples. transformers makes them itself where the number of query heads is not a power
    of two, as at 7B.
    """
    rows, heads, length, _ = key.shape
    if module.training and rows * heads * length < FEW_KEYS:
        key, value = (repeat_kv(states, query.shape[1] // heads) for states in (key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("flex_attention", flex_attention)


def flex_fa4(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, scaling: float | None = None, **_
):
    """FlexAttention with the kernels of flash-attn-4, for bfloat16. The order of its sums differs from run to run.

    Takes and returns what flex_attention does, without the log-sum-exp. Query heads share their key-value head.
    """
    output = compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=True,
        kernel_options={"BACKEND": "FLASH"},
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FA4, flex_fa4)
