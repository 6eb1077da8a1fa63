"""The kernel for attention in the windows of the vision tower, in Triton's interpreter in float32."""

import random
import time

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

pytest.importorskip("triton")
from qwen_vl_streaming.model import vision_tower, window_kernel
from triton.language import standard
from triton.runtime.interpreter import InterpretedFunction

SEED = time.time_ns() % 100_000


@pytest.fixture
def interpreted(monkeypatch):
    for name, kernel in vars(window_kernel).items():
        if hasattr(kernel, "fn"):
            monkeypatch.setattr(window_kernel, name, InterpretedFunction(kernel.fn))
    # The interpreter reduces by functions that it does not know in Python, number by number.
    monkeypatch.setattr(window_kernel, "_plus", standard._sum_combine)
    monkeypatch.setattr(window_kernel, "_larger", standard._elementwise_max)


def on_meta(*given):
    return [each.to("meta") if isinstance(each, torch.Tensor) else each for each in given]


def assert_alike(fake, real):
    """As the compiler is told, and as it is."""
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("size", [8, 20, 80])
def test_attention_in_windows(size, interpreted):
    print("seed", SEED)
    torch.manual_seed(SEED)
    draw = random.Random(SEED)
    lengths = [64, 1, *(draw.randint(1, 64) for _ in range(3))]
    heads, patches = 2, sum(lengths)
    qkv, angle = torch.randn(patches, 3 * heads * size), torch.randn(patches, size // 2)
    rotary = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    query, key, value = qkv.view(patches, 3, heads, size).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
    expected = [
        torch.nn.functional.scaled_dot_product_attention(*(tensor.transpose(0, 1) for tensor in part)).transpose(0, 1)
        for part in parts
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    found = vision_tower.attend_in_windows(qkv, bounds, *rotary, heads)
    assert_alike(vision_tower.attend_in_windows(*on_meta(qkv, bounds, *rotary, heads)), found)
    assert (found - torch.cat(expected).flatten(1)).abs().max() < 1e-5
