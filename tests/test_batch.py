"""Captions from a refilled batch over the paged cache equal those of the reference, for any batch."""

import gc
import random
import time
import weakref
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine import batch, ragged_attention
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.engine.decoder_layer import FusedProjections
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, PagedKVCache
from qwen_vl_streaming.engine.model_runner import first_argmax
from qwen_vl_streaming.engine.runner import Runner
from qwen_vl_streaming.engine.split_kv import flex_split_kv
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.timeline.timeline import Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from tiny import random_template, tiny_model

MOST = 12
SEED = time.time_ns() % 100_000


def random_jobs(draw: random.Random, variant, count: int) -> list[Job]:
    """Videos of several lengths, grids, questions and schedules, empty slots among them."""
    jobs = []
    for i in range(count):
        grid, clips = (draw.randint(1, 3), draw.randint(1, 3)), draw.randint(1, 6)
        quotas = tuple(draw.randint(0, 4) if variant.streams else 0 for _ in range(clips - 1))
        pixels = torch.randn(clips, 4 * grid[0] * grid[1], 3 * 2 * 14 * 14)
        template = random_template(draw)
        jobs.append(Job(f"{i}", pixels, template.layout(grid, 2.0), template, Schedule(quotas)))
    return jobs


def reference_captions(model, variant, jobs) -> dict:
    with torch.no_grad():
        clips = [model.perceive(job.pixels, job.grid) for job in jobs]
    streams = Streams(model, variant, [job.template for job in jobs], [job.layout for job in jobs], 1.15)
    captions = caption(streams, clips, [job.schedule for job in jobs], MOST)
    return {job.key: caption for job, caption in zip(jobs, captions, strict=True)}


def batched(model, variant, jobs, **options) -> dict:
    options = {"memory": None, "penalty": 1.15, "max_new_tokens": MOST, **options}
    return {job.key: caption for job, caption in caption_all(model, variant, iter(jobs), **options)}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_batch_changes_nothing(variant, seed, monkeypatch):
    print("seed", seed)
    draw, model = random.Random(f"{variant.name} {seed}"), tiny_model(seed)
    monkeypatch.setattr(batch, "MIN_CLIP_ROWS", (0, 20)[seed])  # clips are small, and must not all be fed at once
    jobs = random_jobs(draw, variant, 6)
    plain = reference_captions(model, variant, jobs)
    for size in (1, 3, 32):
        draw.shuffle(jobs)
        assert batched(model, variant, jobs, batch_size=size) == plain


@pytest.mark.parametrize("name,splits", [("group", 1), ("interleave", 1), ("interleave", 3)])
def test_flex_attention_over_blocks_changes_nothing(name, splits, monkeypatch):
    """As on a GPU, where it is compiled: steps are padded, and a slot's blocks are divided into splits."""
    draw, model, variant = random.Random(f"{SEED} {name} {splits}"), tiny_model(SEED), VARIANTS[name]
    print("seed", SEED)
    jobs = random_jobs(draw, variant, 5)
    plain = reference_captions(model, variant, jobs)
    monkeypatch.setattr(ragged_attention, "compiled_flex", lambda: flex_split_kv)
    monkeypatch.setattr(ragged_attention, "num_splits", lambda *_: splits)
    monkeypatch.setattr(Runner, "use_flex", True)
    monkeypatch.setattr(batch, "MIN_CLIP_ROWS", 0)
    assert batched(model, variant, jobs, batch_size=3) == plain


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_clip_may_produce_the_last_token(variant):
    """With 3, 0 and 1 tokens per slot, the last row of the last clip produces the last token in interleave."""
    model, draw = tiny_model(), random.Random(variant.name)
    quotas = (3, 0) if variant.streams else (0, 0)
    pixels, template = torch.randn(3, 16, 1176), random_template(draw)
    jobs = [Job("0", pixels, template.layout((2, 2), 2.0), template, Schedule(quotas))]
    streams = Streams(model, variant, [template], [jobs[0].layout], 1.15)
    (plain,) = caption(streams, [model.perceive(pixels, (2, 2)).detach()], [jobs[0].schedule], 4)
    assert batched(model, variant, jobs, batch_size=2, max_new_tokens=4) == {"0": plain}


def test_text_that_produces_nothing_is_fed_with_the_next_clip(monkeypatch):
    """With three tokens per slot in interleave, a clip produces the first and the third is fed with the next clip."""
    model, draw, steps = tiny_model(), random.Random(0), []
    template = replace(random_template(draw), end=-1)
    pixels = torch.randn(4, 16, 1176)
    job = Job("0", pixels, template.layout((2, 2), 2.0), template, Schedule((3, 3, 3)))
    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", lambda *arguments: (steps.append(1), forward(*arguments))[1])
    (said,) = batched(model, VARIANTS["interleave"], [job], batch_size=2).values()
    assert len(said.tokens) == MOST
    assert len(steps) == len(template.header) + 4 * (1 + 2)


def clips_by_step(monkeypatch, **limits) -> list[int]:
    """How many of six streams of interleave, with six clips and three tokens per slot, are fed a clip in each step."""
    model, draw, steps = tiny_model(), random.Random(0), []
    for name, rows in limits.items():
        monkeypatch.setattr(batch, name, rows)
    template = replace(random_template(draw), end=-1)
    layout, schedule = template.layout((2, 2), 2.0), Schedule((3,) * 5)
    jobs = [Job(f"{i}", torch.randn(6, 16, 1176), layout, template, schedule) for i in range(6)]
    mixed_step, decode = Runner.mixed_step, Runner.decode

    def recorded(runner, batch_slots, visual_tokens):
        steps.append(sum(runner.sequences[batch_slot].needs_clips for batch_slot in batch_slots))
        mixed_step(runner, batch_slots, visual_tokens)

    monkeypatch.setattr(Runner, "mixed_step", recorded)
    monkeypatch.setattr(Runner, "decode", lambda runner: (steps.append(0), decode(runner)))
    batched(model, VARIANTS["interleave"], jobs, batch_size=6, max_new_tokens=17)
    return steps


def test_text_is_fed_with_the_clips_of_others(monkeypatch):
    """A third of the streams is fed clips at a time, and the text of the others needs no separate steps until the last
    clips."""
    steps = clips_by_step(monkeypatch, MIN_CLIP_ROWS=0)
    assert steps[:4] == [2, 2, 2, 0]  # the first slot has one more step, for the header
    assert steps[4:19] == [2] * 15
    assert not any(steps[19:])


def test_clips_that_fill_a_step_are_fed_together(monkeypatch):
    steps = clips_by_step(monkeypatch, MIN_CLIP_ROWS=0, FULL_CLIP_ROWS=6 * 4)  # rows of six clips of four visual tokens
    assert [count for count in steps if count] == [6] * 6


def test_the_next_video_is_encoded_before_waiting_for_captions(monkeypatch):
    """This keeps the device busy while captions are collected. No video is encoded twice."""
    variant, model, seen = VARIANTS["group"], tiny_model(), []
    jobs = random_jobs(random.Random(0), variant, 4)
    perceive_all = model.perceive_all
    monkeypatch.setattr(
        model, "perceive_all", lambda videos, grids: (seen.extend(videos), perceive_all(videos, grids))[1]
    )
    captions = caption_all(model, variant, iter(jobs), batch_size=1, max_new_tokens=MOST)
    for count, _ in enumerate(captions, 1):
        assert len(seen) == min(count + 1, len(jobs))
    assert all(video is job.pixels for video, job in zip(seen, jobs, strict=True))


def test_a_batch_respects_its_memory_and_takes_no_job_early():
    variant, model = VARIANTS["group"], tiny_model()
    jobs = random_jobs(random.Random(0), variant, 8)
    plain = reference_captions(model, variant, jobs)
    config = model.model.language_model.config
    room = 1 + 2 * PagedKVCache.blocks_needed(40, 20)  # for two streams at once, and block 0
    drawn = []

    def source():
        for job in jobs:
            drawn.append(job)
            yield job

    stream = caption_all(
        model,
        variant,
        source(),
        batch_size=4,
        memory=room * PagedKVCache.block_bytes(config, model.dtype),
        max_new_tokens=MOST,
    )
    job, first = next(stream)
    assert len(drawn) < len(jobs)
    assert {job.key: first, **{job.key: caption for job, caption in stream}} == plain


def test_the_memory_of_a_batch_is_freed_before_the_next_one_is_allocated(monkeypatch):
    """A long video after short ones needs wider tables."""
    draw, variant, model, stores = random.Random(0), VARIANTS["interleave"], tiny_model(), []
    templates = [replace(random_template(draw), end=-1) for _ in range(2)]
    jobs = [
        Job(
            f"{clips}",
            torch.randn(clips, 64, 1176),
            template.layout((4, 4), 2.0),
            template,
            Schedule((1,) * (clips - 1)),
        )
        for clips, template in zip((1, 20), templates, strict=True)
    ]
    begin = PagedKVCache.__init__

    def checked(cache, *arguments, **options):
        assert not [store for store in stores if store() is not None]
        begin(cache, *arguments, **options)
        stores.append(weakref.ref(cache.store))

    monkeypatch.setattr(PagedKVCache, "__init__", checked)
    gc.disable()
    try:
        batched(model, variant, jobs, batch_size=1)
    finally:
        gc.enable()
    assert len(stores) == 2


def test_a_video_that_does_not_fit_is_refused_by_name():
    variant, model = VARIANTS["group"], tiny_model()
    (job,) = random_jobs(random.Random(0), variant, 1)
    with pytest.raises(InputError, match=r"video 0 needs .* GiB"):
        batched(model, variant, [job], batch_size=1, memory=1000)


def test_fused_weights_share_memory_with_the_model():
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):  # fused once, found fused the second time
        layers = [FusedProjections.from_layer(layer) for layer in model.model.language_model.layers]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    model.model.language_model.layers[0].self_attn.k_proj.weight.data.fill_(3)
    assert (layers[0].qkv == 3).sum() == model.model.language_model.layers[0].self_attn.k_proj.weight.numel()


def test_blocks_are_allocated_once_and_freed():
    config = tiny_model().model.language_model.config
    cache = PagedKVCache(config, batch_slots=3, num_blocks=7, blocks_per_slot=4, dtype=torch.float32, device="cpu")
    cache.allocate(0, BLOCK_SIZE + 1, 5)
    cache.allocate(2, 3 * BLOCK_SIZE, BLOCK_SIZE)
    assert len(cache.free_blocks) == 0
    assert len({*cache.block_tables[0, :3].tolist(), *cache.block_tables[2].tolist()}) == 7
    with pytest.raises(ValueError, match="0 are free"):
        cache.allocate(1, 1, 1)
    cache.free(0)
    cache.allocate(1, 1, 1)
    assert (cache.block_owner[1:] == 0).sum() == 0


@pytest.mark.parametrize("vocabulary", [5, 64, 130, 1000])
def test_the_first_of_equal_logits_is_chosen(vocabulary):
    logits = torch.randint(-3, 3, (50, vocabulary)).float()
    logits[0] = -torch.inf
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert first_argmax(logits).tolist() == expected
