"""FlexAttention of the language model, faster on short rows in training than that of transformers, and equal up to
rounding."""

from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward, repeat_kv

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
