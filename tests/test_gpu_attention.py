"""The kernels for attention on a GPU equal attention in float32, at the released sizes."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.engine.chunk_attention import attend_chunks, has_chunk_kernel
from qwen_vl_streaming.engine.hopper import hopper_processors
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.paged_attention import PagedAttention
from qwen_vl_streaming.engine.split_kv import kernel_settings
from qwen_vl_streaming.model.vision_tower import WINDOW, attend_in_windows
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

pytestmark = pytest.mark.gpu
SEED = time.time_ns() % 100_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("windowed", [False, True], ids=["all", "window"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("heads", [(28, 4), (16, 2)], ids=["7B", "3B"])
def test_attention_of_prefill_chunks(heads, chunks, windowed, dtype):
    """Compiled, with the write of new keys and values before it, which must not copy the cache."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    draw, slots, sizes = random.Random(SEED), 4, (2000, 300)
    queries = draw.randint(60, 130)
    names = "num_attention_heads", "num_key_value_heads"
    config = SimpleNamespace(**dict(zip(names, heads, strict=True)), hidden_size=128 * heads[0], num_hidden_layers=1)
    blocks = PagedKVCache.blocks_needed(*sizes)
    cache = PagedKVCache(config, slots, 50 * slots * blocks, blocks, dtype, "cuda")
    if not has_chunk_kernel(cache):
        pytest.skip("the kernel is for NVIDIA Hopper")
    for slot in range(slots):
        cache.allocate(slot, *sizes)
    cache.store.normal_()
    cache.kept_tokens.copy_(torch.randint(1, 40, (2, slots)))
    batch_slots = torch.tensor(draw.sample(range(slots), chunks), device="cuda")
    first = torch.tensor([[draw.randint(1, sizes[0] - queries)] for _ in range(chunks)])
    visual = first + torch.arange(queries)
    visual[0, : draw.randint(0, queries - 1)] = 0  # rows that see no visual token
    visual = visual.cuda()
    text = torch.tensor([[draw.randint(1, sizes[1])] * queries for _ in range(chunks)], device="cuda")
    window = torch.stack([visual - draw.randint(1, 999), text - draw.randint(1, 99)]).clamp(min=0) if windowed else None
    index = cache.cache_index(batch_slots, first.cuda() + torch.arange(queries, device="cuda") - 1)
    settings = kernel_settings(cache, chunks, queries, heads[0] // heads[1], {})
    assert settings["use_kernel"]
    settings["splits"] = draw.randint(1, 7)
    given = cache, batch_slots, index, visual, text, heads[0] // heads[1]
    fast = PagedAttention(*given, True, window_start=window, **settings)
    plain = PagedAttention(*given, False, window_start=window)
    query = torch.randn(chunks, heads[0], queries, 128, dtype=dtype, device="cuda")
    new = torch.randn(chunks, 2, heads[1], queries, 128, dtype=dtype, device="cuda")
    layer = cache.layers[0]
    forward = torch.compile(fast.forward, dynamic=False)
    found = forward(query, new, layer, 0.1)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = forward(query, new, layer, 0.1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < layer.nbytes / 2
    expected = plain.forward(query.float(), new.float(), layer.float(), 0.1)
    assert (found.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("listed", [0, 1], ids=["no block", "a block"])
def test_queries_that_see_no_key(listed):
    """As in an idle chunk: the output is 0, and weighs nothing beside that of another split."""
    if not hopper_processors(torch.device("cuda", 0)):
        pytest.skip("the kernel is for NVIDIA Hopper")
    numbers = {"dtype": torch.long, "device": "cuda"}
    query, seen = torch.randn(1, 2, 3 * 43, 128, dtype=torch.bfloat16, device="cuda"), torch.zeros(1, 43, **numbers)
    seen[0, 40:] = 5 * listed
    blocks, counts = torch.ones(2, 1, 1, 2, 2, **numbers).int(), torch.zeros(2, 1, 1, 2, **numbers).int()
    counts[0] = listed
    slots = torch.zeros(1, **numbers), torch.zeros(2, 1, **numbers), torch.zeros(2, **numbers)
    cache = torch.randn(2, 2, 256, 128, dtype=torch.bfloat16, device="cuda")
    output, lse = attend_chunks(query, cache, blocks, counts, seen, torch.zeros_like(seen), None, *slots, 0.25, 1)
    unseen = slice(0, 40 if listed else None)
    assert not output[:, unseen].any() and (lse[:, unseen] == float("-inf")).all()
    if listed:  # the first five keys of block 1; the queries of a key head are consecutive in `query`
        keys, values = cache.float()[:, :, 128:133]
        scores = query.float()[0].view(2, 43, 3, 128)[:, 40:] @ keys[:, None].transpose(-1, -2) * 0.25
        expected = (scores.softmax(-1) @ values[:, None]).transpose(0, 1).flatten(1, 2)
        assert (output[0, 40:].float() - expected).norm() < 1e-2 * expected.norm()
        torch.testing.assert_close(lse[0, 40:], scores.logsumexp(-1).transpose(0, 1).flatten(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_windows(dtype):
    print("seed", SEED)
    torch.manual_seed(SEED)
    draw, heads, size = random.Random(SEED), 16, 80
    lengths = [WINDOW, 1, *(4 * draw.randint(1, WINDOW // 4) for _ in range(20))]
    qkv = torch.randn(sum(lengths), 3 * heads * size, dtype=dtype, device="cuda")
    angle = torch.randn(len(qkv), size // 2, device="cuda")
    rotary = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    query, key, value = qkv.float().view(len(qkv), 3, heads, size).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    parts = zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)), strict=True)
    expected = torch.cat([torch.nn.functional.scaled_dot_product_attention(*part) for part in parts], 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    found = attend_in_windows(qkv, bounds, *rotary, heads).view(len(qkv), heads, size).transpose(0, 1)
    assert (found.float() - expected).norm() < 1e-2 * expected.norm()
