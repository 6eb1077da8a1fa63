"""The kernels for attention, in Triton's interpreter in float32, and what their machine code reads before it waits."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.engine.chunk_attention import attend_chunks
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, TEXT_OFFSET, PagedKVCache
from qwen_vl_streaming.engine.paged_attention import PagedAttention
from qwen_vl_streaming.engine.split_kv import combine_splits
from test_dependent_launch import assembly
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

pytest.importorskip("triton")
from qwen_vl_streaming.engine import chunk_kernel
from qwen_vl_streaming.model import vision_tower, window_kernel
from triton.language import standard
from triton.runtime.interpreter import InterpretedFunction

SEED = time.time_ns() % 100_000
CONFIG = SimpleNamespace(num_key_value_heads=2, hidden_size=6 * 16, num_attention_heads=6, num_hidden_layers=1)


@pytest.fixture
def interpreted(monkeypatch):
    for module in (chunk_kernel, window_kernel):
        for name, kernel in vars(module).items():
            if hasattr(kernel, "fn"):
                monkeypatch.setattr(module, name, InterpretedFunction(kernel.fn))
        # The interpreter reduces by functions that it does not know in Python, number by number.
        monkeypatch.setattr(module, "_plus", standard._sum_combine)
        monkeypatch.setattr(module, "_larger", standard._elementwise_max)


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


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("windowed", [False, True], ids=["all", "window"])
def test_attention_of_prefill_chunks(windowed, splits, interpreted, monkeypatch):
    """Slots of any order and lengths, with and without a window, against a dense mask."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    draw = random.Random(SEED)
    monkeypatch.setattr(chunk_kernel, "QUERIES", draw.choice([64, 128]))
    slots, queries, sizes = 3, draw.randint(43, 60), (draw.randint(200, 600), draw.randint(20, 200))
    blocks = PagedKVCache.blocks_needed(*sizes)
    cache = PagedKVCache(CONFIG, slots, slots * blocks, blocks, torch.float32, "cpu")
    for slot in draw.sample(range(slots), slots):
        cache.allocate(slot, *sizes)
    cache.store.normal_()
    cache.kept_tokens.copy_(torch.randint(1, 15, (2, slots)))
    chunks = draw.randint(1, 2)
    batch_slots = torch.tensor(draw.choices(range(slots), k=chunks))
    first = torch.tensor([[draw.randint(1, sizes[0] - queries)] for _ in range(chunks)])
    visual = first + torch.arange(queries)
    visual[0, : draw.randint(1, queries - 1)] = 0  # rows that see no visual token
    text = torch.tensor([[draw.randint(0, sizes[1])] * queries for _ in range(chunks)])
    window = torch.stack([visual - draw.randint(1, 200), text - draw.randint(1, 50)]).clamp(min=0) if windowed else None
    given = cache, batch_slots, torch.zeros(0), visual, text, 3
    listed = PagedAttention(*given, True, window_start=window, splits=splits)
    dense = PagedAttention(*given, False, window_start=window)
    query, layer = torch.randn(chunks, 6, queries, 16), cache.layers[0]
    folded = query.unflatten(1, (2, 3)).transpose(2, 3).flatten(2, 3).contiguous()
    seen = visual, text, window, batch_slots, cache.kept_tokens, cache.block_start
    lists = listed.kv_indices, listed.num_kv_blocks
    output, lse = attend_chunks(folded, layer, *lists, *seen, 0.25, splits)
    for fake, real in zip(
        attend_chunks(*on_meta(folded, layer, *lists, *seen, 0.25, splits)), (output, lse), strict=True
    ):
        assert_alike(fake, real)
    found = combine_splits(output, lse[..., None].expand(output.shape), splits).transpose(1, 2)
    assert (found - dense.attend(query, layer, 0.25)).abs().max() < 1e-5


@pytest.mark.parametrize("listed", [0, 1], ids=["no block", "a block"])
def test_queries_that_see_no_key(listed, interpreted):
    """As in an idle chunk: the output is 0, and weighs nothing beside that of another split."""
    query, seen = torch.randn(1, 2, 3 * 43, 16), torch.zeros(1, 43, dtype=torch.long)
    seen[0, 40:] = 5 * listed
    blocks, counts = torch.ones(2, 1, 1, 2, 2, dtype=torch.int32), torch.zeros(2, 1, 1, 2, dtype=torch.int32)
    counts[0] = listed
    kept, start = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    slots, cache = torch.zeros(1, dtype=torch.long), torch.randn(2, 2, 256, 16)
    output, lse = attend_chunks(
        query, cache, blocks, counts, seen, torch.zeros_like(seen), None, slots, kept, start, 0.25, 1
    )
    assert not output[:, :40].any() and (lse[:, :40] == float("-inf")).all()
    assert output[:, 40:].all() == bool(listed) and lse[:, 40:].isfinite().all() == bool(listed)


def test_the_kernel_for_chunks_waits_first():
    types = ["*bf16", "*bf16", "*i32", "*i32", *["*i64"] * 6, "*bf16", "*fp32", "fp32", *["i32"] * 4]
    constants = {
        "Q": 95, "GROUPS": 7, "HEADS": 4, "SPLITS": 3, "OFFSET": TEXT_OFFSET, "QUERIES": chunk_kernel.QUERIES,
        "KEYS": chunk_kernel.KEYS, "BLOCK": BLOCK_SIZE, "D": 128, "WINDOWED": True,
    }  # fmt: skip
    found = assembly(chunk_kernel._attend_chunks, types, constants | {"DEPENDENT": True}, chunk_kernel.WARPS)
    assert found[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert len(found) > 10 and not any("griddepcontrol" in access for access in found[2:])
