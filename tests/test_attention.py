"""The attention rule by hand, as dense and as block mask, and through the model."""

import random
import time

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline.attention import block_mask, dense_mask, make_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import Layout, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import random_counts, tiny_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations import flex_attention as stock_flex_attention

SEED = time.time_ns() % 100_000


def mask_of(timeline):
    rows = timeline.rows
    return dense_mask(rows.visual[None], rows.text[None], timeline.variant.parallel)[0, 0]


def test_by_hand():
    """p v h a v t a a: in `group` neither clip 2 nor the tail attends to the header or an answer token."""
    layout = Layout(prompt=1, tail=1, header=1, grid=(1, 1))
    causal = torch.tril(torch.ones(8, 8, dtype=torch.bool))
    for name, variant in VARIANTS.items():
        counts = (2, 1) if variant.streams else (0, 3)
        timeline = make_timeline(variant, layout, counts)
        expected = causal.clone()
        if variant.parallel:  # p v1 h a0 | v2 t a1 a2
            expected[4:6, 2:4] = False
        assert torch.equal(mask_of(timeline), expected), name


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_the_model_follows_the_rule_exactly(variant):
    """Perturbs each token in turn: the rows that may not attend to it stay bitwise equal, and the rows that may attend
    to it change."""
    print("seed", SEED)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    model = tiny_model(num_hidden_layers=1)
    timeline = make_timeline(variant, Layout(2, 2, 2, (1, 2)), random_counts(draw, variant, most_clips=3))
    mask, length = mask_of(timeline), len(timeline.rows)
    positions = timeline_positions(timeline)
    embeds = torch.randn(length, 32)

    def run(inputs):
        return model.model.language_model(
            inputs_embeds=inputs[None],
            position_ids=positions[:, None],
            attention_mask={"full_attention": mask[None, None]},
        ).last_hidden_state[0]

    with torch.no_grad():
        plain = run(embeds)
        for key in range(length):
            changed = embeds.clone()
            changed[key] += torch.randn(32)
            differs = (run(changed) != plain).any(1)
            assert torch.equal(differs, mask[:, key]), (variant.name, key)


def test_block_mask_is_the_dense_mask():
    print("seed", SEED)
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    for variant in VARIANTS.values():
        timeline = make_timeline(variant, Layout(9, 3, 3, (5, 6)), random_counts(draw, variant))
        rows = timeline.rows
        query, key, value = torch.randn(3, 1, 2, len(rows), 16).unbind(0)
        blocks = block_mask(rows.visual[None], rows.text[None], variant.parallel)
        dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_of(timeline))
        assert torch.allclose(flex_attention(query, key, value, block_mask=blocks), dense, atol=1e-5)


def test_packed_samples_never_see_each_other():
    """Block and dense mask of a packed row: each sample's own mask on the diagonal, nothing elsewhere."""
    print("seed", SEED)
    draw = random.Random(SEED)
    for variant in VARIANTS.values():
        timelines = [make_timeline(variant, Layout(3, 2, 2, (2, 2)), random_counts(draw, variant)) for _ in range(3)]
        visual, text = (torch.cat([getattr(t.rows, name) for t in timelines])[None] for name in ("visual", "text"))
        sample = torch.cat([torch.full((len(t.rows),), n) for n, t in enumerate(timelines, 1)])[None]
        expected = torch.block_diag(*map(mask_of, timelines)).bool()
        assert torch.equal(make_mask(visual, text, variant.parallel, "sdpa", sample)[0, 0], expected)
        query, key, value = torch.randn(3, 1, 2, len(expected), 16).unbind(0)
        blocks = make_mask(visual, text, variant.parallel, "flex_attention", sample)
        dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=expected)
        assert torch.allclose(flex_attention(query, key, value, block_mask=blocks), dense, atol=1e-5)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_the_predicate_of_the_block_mask_is_the_dense_mask(packed, ordered):
    """Element by element over a batch of two rows, in feed order and in a random one, where it is that of the feed
    order with rows and columns moved. The skipped blocks contain nothing that is allowed."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    draw = random.Random(SEED)
    for variant in VARIANTS.values():
        timelines = [make_timeline(variant, Layout(9, 3, 3, (7, 8)), random_counts(draw, variant)) for _ in range(2)]
        length = max(len(t.rows) for t in timelines)
        visual, text = torch.zeros(2, 2, length, dtype=torch.bool)
        for i, timeline in enumerate(timelines):
            visual[i, : len(timeline.rows)], text[i, : len(timeline.rows)] = timeline.rows.visual, timeline.rows.text
        sample = torch.arange(length).div(40, rounding_mode="floor").expand(2, length) if packed else None
        in_order = dense_mask(visual, text, variant.parallel, sample=sample)[:, 0]
        feed = None
        if not ordered:
            feed = torch.stack([torch.randperm(length) for _ in range(2)])
            visual, text, sample = (None if t is None else t.gather(1, feed) for t in (visual, text, sample))
        blocks = block_mask(visual, text, variant.parallel, sample, feed)
        assert blocks.shape == (2, 1, length, length)
        place = torch.arange(length)
        rows = torch.arange(2)[:, None, None]
        said = blocks.mask_mod(rows, 0, place[:, None], place).expand(2, length, length)
        expected = dense_mask(visual, text, variant.parallel, sample=sample, feed=feed)[:, 0]
        assert torch.equal(said, expected), variant.name
        moved = torch.arange(length).expand(2, -1) if feed is None else feed
        assert torch.equal(expected, in_order[torch.arange(2)[:, None, None], moved[:, :, None], moved[:, None, :]])
        size = blocks.BLOCK_SIZE[0]
        coarse = blocks.to_dense()[:, 0].bool().repeat_interleave(size, 1).repeat_interleave(size, 2)
        assert not (expected & ~coarse[:, :length, :length]).any()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_each_backend_gets_the_mask_in_its_own_form(variant, packed):
    timeline = make_timeline(variant, Layout(2, 1, 2, (2, 2)), (2, 1) if variant.streams else (0, 3))
    visual, text = timeline.rows.visual[None], timeline.rows.text[None]
    sample = (torch.arange(len(timeline.rows)) >= 6).long()[None] if packed else None
    expected = dense_mask(visual, text, variant.parallel, sample=sample)
    place = torch.arange(len(timeline.rows))
    flex = make_mask(visual, text, variant.parallel, "flex_attention", sample)
    assert torch.equal(flex.mask_mod(0, 0, place[:, None], place), expected[0, 0])
    sdpa = make_mask(visual, text, variant.parallel, "sdpa", sample)
    assert (sdpa is None) if not (variant.parallel or packed) else torch.equal(sdpa, expected)


def test_a_backend_that_would_lose_the_mask_is_refused():
    flags = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(InputError) as refused:
        make_mask(flags, flags, True, "flash_attention_2")
    assert str(refused.value) == (
        "flash_attention_2 cannot express the mask of a parallel variant (overlap, group, gap) or of packed samples: "
        "use flex_attention on a GPU or sdpa on a CPU"
    )
    with pytest.raises(InputError, match="packed samples"):
        make_mask(flags, flags, False, "flash_attention_2", sample=flags.long())
    with pytest.raises(InputError, match="eager"):
        make_mask(flags, flags, False, "eager")
    assert make_mask(flags, flags, False, "flash_attention_2") is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_block_mask_is_that_of_create_block_mask(parallel, packed):
    """All its tensors, for rows of whole blocks and others, with and without samples and padding."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    for length, rows in ((5, 1), (128, 2), (129, 1), (384, 3), (700, 1)):
        kind = torch.randint(3, (rows, length)).repeat_interleave(90, 1)[:, :length]
        sample = (torch.arange(length) // 150 + 1).expand(rows, -1).clone()
        sample[:, length - length // 5 :] = 0
        mask = block_mask(kind == 1, kind == 2, parallel, sample if packed else None)
        expected = create_block_mask(mask.mask_mod, rows, None, length, length, device="cpu")
        for part, same in zip(mask.as_tuple(), expected.as_tuple(), strict=True):
            if isinstance(part, torch.Tensor):
                assert part.dtype == same.dtype and part.stride() == same.stride() and torch.equal(part, same)
            else:
                assert part == same or part is mask.mask_mod


def test_heads_are_copied_in_training_only(monkeypatch):
    """FlexAttention gives each query head its own key-value head; the result is that of SDPA."""
    heads, inner = [], stock_flex_attention.compile_friendly_flex_attention

    def counted(query, key, value, **options):
        heads.append((key.shape[1], value.shape[1]))
        return inner(query, key, value, **options)

    monkeypatch.setattr(stock_flex_attention, "compile_friendly_flex_attention", counted)
    monkeypatch.setattr(stock_flex_attention.WrappedFlexAttention, "__call__", lambda wrapped: flex_attention)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    model = tiny_model(num_hidden_layers=1, hidden_size=64, rope_parameters=rope)
    place = torch.arange(40)
    flags = (place % 3 == 0)[None], (place % 3 == 1)[None]

    @torch.no_grad()
    def run(implementation):
        model.model.language_model.set_attn_implementation(implementation)
        return model.model.language_model(
            inputs_embeds=torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0)),
            position_ids=place.expand(3, 1, -1),
            attention_mask={"full_attention": make_mask(*flags, True, implementation)},
        ).last_hidden_state

    expected = run("sdpa")
    for training, count in ((True, 4), (False, 2)):
        model.train(training)
        assert (run("flex_attention") - expected).abs().max() < 1e-5
        assert heads.pop() == (count, count)
