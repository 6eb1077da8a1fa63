"""FlexAttention of the language model, faster in training than that of transformers and equal up to rounding."""

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


def flex_attention(module, query, key, value, attention_mask, **options):
    """FlexAttention of transformers. In training, each query head gets its own copy of its key-value head.

    For the gradients of keys and values, the kernel runs one program for each 128 keys of a key-value head, which loops
    over all query heads that share it. With the 2 key-value heads of 3B, a row of one sample then uses 48 of the 132
    multiprocessors of an H200. The copies are kept for the backward pass, at 3B 8 KB per token and layer. transformers
    makes them itself where the number of query heads is not a power of two, as at 7B.
    """
    if module.training:
        key, value = (repeat_kv(heads, query.shape[1] // heads.shape[1]) for heads in (key, value))
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
