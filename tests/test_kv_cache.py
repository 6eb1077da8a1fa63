"""The block masks select the same keys as the dense mask."""

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qwen_vl_streaming.engine import ragged_attention, split_kv
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, TEXT_OFFSET, BlockTable, PagedKVCache
from qwen_vl_streaming.engine.model_runner import ModelRunner
from qwen_vl_streaming.engine.paged_attention import PagedAttention
from qwen_vl_streaming.engine.ragged_attention import KERNEL_OPTIONS, QUERY_BLOCK, RaggedAttention, query_blocks_of
from qwen_vl_streaming.engine.split_kv import CHUNK_KERNEL_OPTIONS, combine_splits, flex_split_kv

SEED = time.time_ns() % 100_000
CONFIG = SimpleNamespace(num_key_value_heads=1, num_attention_heads=3, hidden_size=12, num_hidden_layers=1)


def by_lists(attention: PagedAttention | RaggedAttention, n: int, rows: int) -> torch.Tensor:
    """Which cache tokens each of n x `rows` queries attends to by the lists of the block mask, (n, rows, cache
    tokens)."""
    mask, splits = attention.mask, attention.splits
    seen = torch.zeros(n, rows, attention.cache.store.shape[2], dtype=torch.bool)
    kinds = [(mask.kv_num_blocks, mask.kv_indices, False), (mask.full_kv_num_blocks, mask.full_kv_indices, True)]
    for counts, indices, full in kinds:
        if counts is None:
            continue
        for b, block in torch.cartesian_prod(torch.arange(n * splits), torch.arange(counts.shape[2])).tolist():
            size = mask.BLOCK_SIZE[0]
            queries = torch.arange(block * size, min((block + 1) * size, rows))
            for kv_block in indices[b, 0, block, : counts[b, 0, block]].tolist():
                keys = torch.arange(kv_block * BLOCK_SIZE, (kv_block + 1) * BLOCK_SIZE)
                allowed = True if full else mask.mask_mod(torch.tensor(b), 0, queries[:, None], keys)
                assert not seen[b // splits, queries[:, None], keys].any()  # in no other split
                seen[b // splits, queries[:, None], keys] |= allowed
    return seen


def by_dense_mask(attention: PagedAttention) -> torch.Tensor:
    n, many = attention.seen_visual.shape
    seen = torch.zeros(n, many, attention.cache.store.shape[2], dtype=torch.bool)
    for b, q in torch.cartesian_prod(torch.arange(n), torch.arange(many)).tolist():
        keys = attention.key_index[b][attention.dense_mask[b, 0, q]]
        assert len(keys.unique()) == len(keys)
        seen[b, q, keys] = True
    return seen


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("windows", [False, True], ids=["all", "windows"])
@pytest.mark.parametrize("many", [1, 7, 90])
def test_the_listed_blocks_match_the_dense_mask(many, windows, splits):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {many} {windows} {splits}")
    for _ in range(4):
        batch_slots = draw.randint(1, 4)
        sizes = [(draw.randint(1, 700), draw.randint(1, 500)) for _ in range(batch_slots)]
        needs = [PagedKVCache.blocks_needed(*size) for size in sizes]
        cache = PagedKVCache(CONFIG, batch_slots, sum(needs) + 3, max(needs) + 1, torch.float32, "cpu")
        upto = []
        for batch_slot, (visual, text) in enumerate(sizes):
            cache.allocate(batch_slot, visual, text)
            kept = draw.randint(1, visual), draw.randint(1, min(text, 20))
            cache.kept_tokens[:, batch_slot] = torch.tensor(kept)
            begin = PagedKVCache.text_block_of(visual)
            mine, ends = cache.allocated[batch_slot], []
            for of, start, keeps in ((mine[:begin], 0, kept[0]), (mine[begin:], TEXT_OFFSET, kept[1])):
                run = BlockTable(cache, of, start, keeps)
                room = len(of) * BLOCK_SIZE
                end = draw.randint(1, 3 * room if windows and len(of) > 1 else room)  # blocks may have been reused
                run.cache_index(np.arange(end))
                ends.append((end, max(0, end - (len(of) - run.kept) * BLOCK_SIZE + BLOCK_SIZE)))
            upto.append(ends)
        whose = torch.tensor([draw.randrange(batch_slots) for _ in range(draw.randint(1, 3))])

        def numbers(of, whose=whose, upto=upto):
            return torch.tensor([[of(*upto[batch_slot]) for _ in range(many)] for batch_slot in whose.tolist()])

        # Queries attend to 1 token or more. A window never reaches back to what was overwritten.
        ends = [
            numbers(lambda v, t, run=run: draw.randint(min((v, t)[run][1] + 1, (v, t)[run][0]), (v, t)[run][0]))
            for run in range(2)
        ]
        window_start = torch.stack(
            [numbers(lambda v, t, run=run: draw.randint((v, t)[run][1], (v, t)[run][0])) for run in range(2)]
        )
        options = {"window_start": window_start if windows else None}
        flex = PagedAttention(cache, whose, None, *ends, groups=3, use_flex=True, splits=splits, **options)
        dense = PagedAttention(cache, whose, None, *ends, groups=3, use_flex=False, **options)
        listed = by_lists(flex, len(whose), many * 3).unflatten(1, (many, 3))
        assert all(torch.equal(listed[:, :, group], by_dense_mask(dense)) for group in range(3))


def test_splits_combine_to_the_whole():
    """Attention over several sets of keys, one of them empty, against attention over all keys."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    query, keys, values = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    split = torch.randint(0, 3, (40,))
    scores = query @ keys.transpose(-1, -2)
    parts = [scores.masked_fill(split != number, float("-inf")) for number in range(4)]  # the fourth has no keys
    mixed = torch.stack([part.softmax(-1).nan_to_num() @ values for part in parts], 1).flatten(0, 1)
    lse = torch.stack([part.logsumexp(-1) for part in parts], 1).flatten(0, 1)[..., None].expand(mixed.shape)
    assert torch.allclose(combine_splits(mixed, lse, 4), scores.softmax(-1) @ values, atol=1e-5)
    assert not combine_splits(mixed, torch.full_like(lse, float("-inf")), 4).any()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("given", [CHUNK_KERNEL_OPTIONS, KERNEL_OPTIONS, ModelRunner.kernel_options])
def test_kernels_load_less_ahead_in_float32(given, splits, monkeypatch):
    """The options of bfloat16 take 145 KB of shared memory in float32, and many GPUs have 99 KB, a T4 64 KB. These were
    compiled for them: 57 KB at most."""
    passed = []

    def flex(query, keys, values, kernel_options, **more):
        passed.append(kernel_options)
        return (query, SimpleNamespace(lse=query[..., 0])) if more else query

    monkeypatch.setattr(split_kv, "flex_attention", flex)
    for dtype in (torch.bfloat16, torch.float32):
        query = torch.zeros(1, 2, 64, 128, dtype=dtype)
        flex_split_kv(query, query, query, splits, kernel_options=given)
    assert passed == [given, {**given, "BLOCK_N": 32, "num_stages": 1}] and given["num_stages"] > 1


@pytest.mark.parametrize("splits", [1, 3])
def test_the_blocks_listed_for_ragged_rows_match_the_rule(splits, monkeypatch):
    """Rows of several slots in one sequence, with separate query blocks for each slot."""
    print("seed", SEED)
    draw, groups = random.Random(f"{SEED} {splits}"), 3
    monkeypatch.setattr(ragged_attention, "num_splits", lambda *_: splits)
    for _ in range(4):
        batch_slots = draw.randint(1, 5)
        sizes = [(draw.randint(1, 700), draw.randint(1, 500)) for _ in range(batch_slots)]
        needs = [PagedKVCache.blocks_needed(*size) for size in sizes]
        cache = PagedKVCache(CONFIG, batch_slots, sum(needs) + 3, max(needs) + 1, torch.float32, "cpu")
        for batch_slot, size in enumerate(sizes):
            cache.allocate(batch_slot, *size)
        counts, order = [draw.randint(1, 150) for _ in range(batch_slots)], draw.sample(range(batch_slots), batch_slots)
        blocks = [query_blocks_of(count, groups) for count in counts]
        attention = RaggedAttention(cache, sum(blocks) + 2, groups, use_flex=True)
        for fed in {batch_slots, draw.randint(1, batch_slots)}:
            whose = [batch_slot for batch_slot, count in zip(order[:fed], counts, strict=False) for _ in range(count)]
            upto = torch.tensor([[draw.randint(0, size) for size in sizes[batch_slot]] for batch_slot in whose])
            expected = torch.zeros(len(whose), cache.store.shape[2], dtype=torch.bool)
            for row, (batch_slot, seen) in enumerate(zip(whose, upto.tolist(), strict=True)):
                runs = [torch.arange(end) for end in seen]
                runs[1] = runs[1] + PagedKVCache.text_block_of(sizes[batch_slot][0]) * BLOCK_SIZE
                expected[row, cache.cache_index(torch.tensor([batch_slot]), torch.cat(runs)[None])] = True
            attention.set_rows(order[:fed], counts[:fed])
            filled = torch.cat([upto, upto[:5]])  # padding rows
            attention.update(torch.zeros(len(filled), dtype=torch.long), *filled.T)
            listed = by_lists(attention, 1, attention.query_blocks * QUERY_BLOCK)[0]
            for head in range(groups):
                queries = attention.start[: len(whose)] + head
                assert torch.equal(attention.row[queries], torch.arange(len(whose)))
                assert (attention.head[queries] == head).all()
                assert torch.equal(listed[queries], expected)
            assert not listed[sum(blocks[:fed]) * QUERY_BLOCK :].any()


def test_the_number_of_splits_is_the_fastest_of_those_measured(monkeypatch):
    """On an H200. FlexAttention: of 1 to 8 for clips of 91 tokens at 7B, alone with a token, and at 3B, and of larger
    clips. The kernel for Hopper at 7B: of two to four numbers, but for four clips, whose 3 splits were not measured,
    and 128 tokens and one, for which 3 take 1% less than 4."""
    monkeypatch.setattr(split_kv, "_processors", lambda cache: 132)
    found = []
    for key_heads, groups, rows in (
        *((4, 7, 95), (4, 7, 2 * 91), (4, 7, 4 * 91), (4, 7, 8 * 91), (2, 8, 95)),
        *((4, 7, 257), (4, 7, 1025), (4, 7, 64 * 91)),
    ):
        cache = SimpleNamespace(store=torch.zeros(1, key_heads, 0))
        found.append(split_kv.num_splits(cache, rows * groups))
    assert found == [6, 3, 3, 2, 5, 2, 1, 1]
    found = []
    for n, queries, blocks in (
        (1, 92, 45),
        (2, 91, 44),
        (4, 91, 44),
        (8, 91, 44),
        (1, 129, 49),
        (1, 257, 25),
        (1, 1025, 49),
    ):
        cache = SimpleNamespace(store=torch.zeros(1, 4, 0), block_tables=torch.zeros(1, blocks))
        found.append(split_kv.num_kernel_splits(cache, n, queries, 7))
    assert found == [5, 3, 3, 2, 4, 2, 1]
    monkeypatch.undo()
    assert split_kv.num_splits(SimpleNamespace(store=torch.zeros(1, 1, 0)), 1) == 1  # a CPU
