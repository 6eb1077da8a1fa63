"""FlexAttention of the language model, faster in training than that of transformers and equal up to rounding."""

from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward, repeat_kv


def flex_attention(module, query, key, value, attention_mask, **options):
    """FlexAttention of transformers. In training, each query head gets its own copy of its key-value head.

    For the gradients of keys and values, the kernel runs one program for each 128 keys of a key-value head, which loops
    over all query heads that share it. With the 2 key-value heads of 3B, a row of one sample then uses 48 of the 132
    multiprocessors of an H200. The copies are not kept for the backward pass, because compiled layers recompute them.
    """
    if module.training:
        key, value = (repeat_kv(heads, query.shape[1] // heads.shape[1]) for heads in (key, value))
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("flex_attention", flex_attention)
