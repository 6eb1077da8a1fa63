"""The same properties on a GPU: streamed equals full, and FlexAttention equals the dense mask, gradients included."""

import contextlib
import copy
import itertools
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from qwen_vl_streaming.engine import dependent_launch, model_runner
from qwen_vl_streaming.engine.batch import Batch
from qwen_vl_streaming.engine.decoder_layer import run_layer
from qwen_vl_streaming.engine.hopper import hopper_processors
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.quantized_linear import (
    FEW_ROWS,
    HOPPER_ROWS,
    TILES,
    Tiles,
    choose_tiles,
    converted,
    few_rows_product,
    interleave,
    kernel_product,
    product,
)
from qwen_vl_streaming.engine.rms_norm import product_and_norm, rms_norm
from qwen_vl_streaming.engine.runner import Runner
from qwen_vl_streaming.engine.step_request import StepRequest
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.engine.stream_state import DueRows, StreamState
from qwen_vl_streaming.model.modeling_qwen2_5_vl import compile_layers
from qwen_vl_streaming.model.quantization import WEIGHTS, quantize, quantize_model, scaled_linear
from qwen_vl_streaming.reference import caption
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.timeline.attention import make_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import ANSWER, Layout, Schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import random_case
from test_batch import batched, random_jobs, reference_captions
from test_reference import Forced, full_pass, random_batch
from test_replay import recorded
from tiny import VIDEO, random_template, timeline_ids, tiny_model

pytestmark = pytest.mark.gpu
SEED = time.time_ns() % 100_000
FLEX = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
}
"""FlexAttention's kernels want heads of at least 16; three heads share a key, which is no power of two, as at 7B."""


@contextlib.contextmanager
def no_waiting():
    """Fails if the host waits for the GPU, except for an event."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_streamed_equals_full_on_the_gpu(variant):
    print("seed", SEED)
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model().cuda()
    cases = random_batch(random.Random(SEED), variant, 6)
    streams = Forced(model, variant, [c[1] for c in cases], [c[2] for c in cases], answers=[c[3] for c in cases])
    caption(streams, [c[4].cuda() for c in cases], [Schedule(tuple(c[0][:-1])) for c in cases])
    for kept, (counts, template, layout, answer, visual) in zip(streams.produced, cases, strict=True):
        timeline = make_timeline(variant, layout, counts)
        expected = full_pass(model.cpu(), timeline, template, answer, visual)
        model.cuda()
        assert (torch.stack(kept[: len(answer)]).cpu() - expected).abs().max() < 1e-4


def packed_pass(name, dtype, heads, size, sections):
    """A function that runs two samples of ten clips, packed, with an attention implementation, in feed order or with
    the rows of text last, and returns the loss and every gradient. `size` is that of a head."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    draw = random.Random(SEED)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    shape = {"num_attention_heads": heads, "hidden_size": size * heads, "rope_parameters": rope}
    model = tiny_model(**FLEX | shape).to("cuda", dtype).train()
    variant, template = VARIANTS[name], random_template(draw)
    layout = Layout(len(template.prompt), len(template.tail), len(template.header), (5, 7))
    timeline = make_timeline(variant, layout, (3,) * 9 + (12,))
    rows, answers = timeline.rows, torch.randint(150, (2, 39))
    ids = torch.cat([timeline_ids(timeline, template, answer.tolist()) for answer in answers])
    labels = torch.cat([torch.where(timeline.produces < 0, -100, answer[timeline.produces]) for answer in answers])
    flags = [flag.repeat(2)[None].cuda() for flag in (rows.visual, rows.text)]
    sample = torch.arange(2).repeat_interleave(len(rows))[None].cuda()
    visual_tokens = torch.randn(700, size * heads)

    def run(implementation, text_last=False):
        feed = rows.text.int().argsort(stable=True) if text_last else torch.arange(len(rows))
        order = torch.cat([feed, feed + len(rows)])
        mask = [*(flag[:, order.cuda()] for flag in flags), variant.parallel, implementation, sample]
        model.zero_grad()
        model.model.language_model.set_attn_implementation(implementation)
        loss = model(
            input_ids=ids[None, order].cuda(),
            position_ids=timeline_positions(timeline).repeat(1, 2)[:, None, order].cuda(),
            attention_mask=make_mask(*mask, feed.int().repeat(2)[None].cuda() if text_last else None),
            visual_tokens=visual_tokens.to("cuda", dtype),
            labels=labels[None, order].cuda(),
        ).loss
        loss.backward()
        weights = model.model.language_model.named_parameters()
        return loss.item(), {name: weight.grad.float().clone() for name, weight in weights}

    return run


def assert_equal_passes(one, other, tolerance):
    """Two results of `packed_pass`. Gradients relative to the largest of their own weight."""
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert abs(loss - other_loss) < tolerance * abs(loss)
    for weight, gradient in gradients.items():
        scale = gradient.abs().max()
        assert (gradient - other_gradients[weight]).abs().max() <= tolerance * scale + 1e-6, weight


@pytest.mark.parametrize("name", ["group", "interleave"])
@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_flex_attention_equals_dense_with_gradients(dtype, tolerance, heads, name):
    run = packed_pass(name, dtype, heads, 16, [2, 3, 3])
    dense = run("sdpa")
    for text_last in (False, True):
        assert_equal_passes(dense, run("flex_attention", text_last), tolerance)


def test_a_training_pass_does_not_wait_for_the_gpu():
    """Compiled layers, a frozen vision tower, FlexAttention over two packed samples."""
    torch.manual_seed(0)
    model = tiny_model(**FLEX).to("cuda", torch.bfloat16).train()
    model.model.visual.requires_grad_(False).merger.requires_grad_(True)
    model.model.language_model.set_attn_implementation("flex_attention")
    compile_layers(model)
    ids, grids = torch.zeros(1, 80, dtype=torch.long), torch.tensor([[2, 4, 6], [3, 4, 4]])
    ids[:, 3:15] = ids[:, 40:52] = VIDEO
    sample = torch.arange(2).repeat_interleave(40)[None].cuda()
    visual = (ids == VIDEO).cuda()
    batch = {
        "input_ids": ids.cuda(),
        "position_ids": torch.arange(80).expand(3, 1, -1).cuda(),
        "labels": ids.cuda(),
        "visual_rows": (ids == VIDEO).flatten().nonzero().squeeze(1).cuda(),
        "score": torch.arange(80).cuda(),
        "video_grid_thw": grids,
        "num_items_in_batch": torch.tensor(80).cuda(),
    }
    pixels = torch.randn(int(grids.prod(1).sum()), model.model.visual.patch_embed.proj.weight[0].numel()).pin_memory()

    def run():
        mask = make_mask(visual, ~visual, True, "flex_attention", sample)
        given = {**batch, "pixel_values_videos": pixels.to("cuda", non_blocking=True)}
        model(**given, attention_mask=mask).loss.backward()

    run()
    model.zero_grad()
    run()  # compiled by now
    with no_waiting():
        run()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_vision_tower_equals_the_one_on_the_cpu(dtype, tolerance):
    """Windows of every size; in bfloat16 one variable-length call computes them all. Error relative to the norm."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    draw, model = random.Random(SEED), tiny_model(SEED)
    for _ in range(4):
        clips, grid = draw.randint(1, 4), (draw.randint(1, 11), draw.randint(1, 11))
        pixels = torch.randn(clips, 4 * grid[0] * grid[1], 1176)
        with torch.no_grad():
            expected = model.float().cpu().perceive(pixels, grid)
            got = model.to("cuda", dtype).perceive(pixels.cuda(), grid).float().cpu()
        assert (got - expected).norm() < tolerance * expected.norm(), (clips, grid)


def test_a_compiled_vision_tower_trains_on_clips_of_many_sizes():
    """One graph serves all sizes, with the longest segment as a number that varies. Errors relative to the norm."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    draw, plain = random.Random(SEED), tiny_model(SEED).to("cuda", torch.bfloat16)
    compiled = copy.deepcopy(plain)
    compiled.compile_tower()
    for _ in range(8):
        clips, grid = draw.randint(1, 4), (draw.randint(1, 11), draw.randint(1, 11))
        pixels = torch.randn(clips, 4 * grid[0] * grid[1], 1176, device="cuda", dtype=torch.bfloat16)
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            model.perceive(pixels, grid).float().square().sum().backward()
            weight = model.model.visual.blocks[0].attn.qkv.weight
            found.append((model.perceive(pixels, grid).float(), weight.grad.float()))
        for expected, got in zip(*found, strict=True):
            assert (got - expected).norm() < 3e-2 * expected.norm(), (clips, grid)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_compiled_and_captured_batches_equal_the_reference(variant, size):
    print("seed", SEED)
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    jobs = random_jobs(random.Random(SEED), variant, 9)
    expected = reference_captions(tiny_model(**FLEX), variant, jobs)
    assert batched(tiny_model(**FLEX).cuda(), variant, jobs, batch_size=size) == expected


@pytest.mark.parametrize("name", ["group", "interleave"])
def test_the_host_runs_ahead_of_a_batch(name):
    """The second stream in the same batch slots runs compiled code."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    model, variant = tiny_model(**FLEX).cuda(), VARIANTS[name]
    jobs = random_jobs(random.Random(SEED), variant, 4)
    jobs = [replace(job, pixels=job.pixels.pin_memory()) for job in jobs]
    batch = Batch(
        model, variant, 4, PagedKVCache(model.config.text_config, 4, 16, 4, model.dtype, model.device), 1.15, 12, 40
    )
    captions = []
    for guard in (contextlib.nullcontext, no_waiting):
        done = []
        with guard(), torch.no_grad():
            batch.admit(jobs, model.perceive_all([job.pixels for job in jobs], [job.grid for job in jobs]))
        while batch.jobs:
            with guard():
                batch.step()
            done += batch.collect()
        captions.append({job.key: caption for job, caption in done})
    assert captions[0] == captions[1]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("width", [(16, 0), (32, 0), (64, 0), (64, 32), (128, 0), (256, 0)])
def test_the_kernel_for_8_bit_weights_equals_the_plain_form(kind, width):
    """For rows that do and do not fill a program, with whole tiles and parts, also where outputs do not fill one."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    weight, scale = quantize(torch.randn(320, 640, device="cuda"), kind)
    assert torch.equal(converted(weight), weight.to(torch.bfloat16))
    for rows in (1, sum(width) - 1, sum(width), sum(width) + 3):
        for programs in (0, 2, 4, 7):
            x = torch.randn(1, rows, 640, device="cuda", dtype=torch.bfloat16)
            found = kernel_product(x, weight, scale, Tiles(128, *width, programs, 8, 2))
            expected = x.float() @ (weight.float() * scale[:, None]).T
            assert (found.float() - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("width", HOPPER_ROWS, ids=str)
@pytest.mark.parametrize("shape", [(320, 640), (4608, 3584), (8520, 1280)], ids=str)
def test_the_kernel_for_hopper_equals_the_plain_form(shape, width, kind):
    """For rows that do and do not fill a program, with whole tiles and parts, also where outputs do not fill one, with
    fewer groups of inputs than stages and more. Kernels for other rows follow at once, each of which begins while the
    one before still runs. The bits are the same each time."""
    if not (processors := hopper_processors(torch.device("cuda"))):
        pytest.skip("needs a Hopper GPU")
    print("seed", SEED)
    torch.manual_seed(SEED)
    weight, scale = quantize(torch.randn(shape, device="cuda"), kind)
    tiles = choose_tiles(sum(width), *shape, processors)
    for rows in (3, sum(width) - 1, sum(width), sum(width) + 3):
        each = [torch.randn(1, rows, shape[1], device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        expected = [x.float() @ (weight.float() * scale[:, None]).T for x in each]
        for programs in (0, 1, 7, processors):
            mine = tiles._replace(programs=programs)
            found = [kernel_product(x, weight, scale, mine) for x in each + each]
            for product_of, exact in zip(found, expected + expected, strict=True):
                assert (product_of.float() - exact).abs().max() < 1e-2 * exact.abs().max(), (rows, programs)
            assert all(map(torch.equal, found[:4], found[4:])), (rows, programs)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(3584, 3584), (2048, 2048)], ids=str)
def test_a_product_and_its_norm_equal_the_separate_operations(shape, kind):
    """In bfloat16, rounded where these round, for parts of which all outputs have the same number, and not."""
    if not hopper_processors(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    print("seed", SEED)
    torch.manual_seed(SEED)
    weight, scale = quantize(torch.randn(shape, device="cuda") / shape[1] ** 0.5, kind)
    for rows in (3, 95, 288):
        x, added = (torch.randn(1, rows, shape[0], device="cuda", dtype=torch.bfloat16) for _ in range(2))
        norm = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
        hidden, normed, interleaved = product_and_norm(x, weight, scale, added, norm, 1e-6)
        assert interleaved
        torch.testing.assert_close(hidden, product(x, weight, scale, added), atol=2**-6, rtol=2**-7)
        torch.testing.assert_close(normed[0], interleave(rms_norm(hidden, norm, 1e-6)[0]), atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [*TILES, (321, 640), (64, 8192)], ids=str)
def test_the_kernel_for_few_rows_equals_the_plain_form(kind, shape):
    print("seed", SEED)
    torch.manual_seed(SEED)
    weight, scale = quantize(torch.randn(shape, device="cuda"), kind)
    for rows in range(1, FEW_ROWS + 1):
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        found, expected = product(x, weight, scale), x.float() @ (weight.float() * scale[:, None]).T
        assert (found.float() - expected).abs().max() < 1e-2 * expected.abs().max(), rows
        added = torch.randn(rows, shape[0], device="cuda", dtype=torch.bfloat16)
        assert torch.equal(product(x, weight, scale, added), added + found)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(37888, 3584), (22016, 2048), (256, 640), (512, 8192)], ids=str)
def test_few_rows_are_gated_as_by_separate_operations(kind, shape):
    """Rounded where these round; SiLU's exponential may differ in its last bit."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    weight, scale = quantize(torch.randn(shape, device="cuda") / shape[1] ** 0.5, kind)
    for rows in range(1, FEW_ROWS + 1):
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        gate, up = product(x, weight, scale).chunk(2, -1)
        expected = interleave(torch.nn.functional.silu(gate) * up)
        found = few_rows_product(interleave(x), weight, scale, None, True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=2**-6)
        assert (found == expected).float().mean() > 0.99


def row_of(kind, dtype, **sizes):
    """The hidden state after a model's layers for one row among random keys, by the kernels for a single row, and by
    `run_layer`; then the keys and values that they write."""
    print("seed", SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(SEED, **sizes).to("cuda", dtype)
    for parameter in model.model.language_model.layers.parameters():
        parameter.normal_(*((0, parameter.shape[1] ** -0.5) if parameter.dim() > 1 else (1, 0.3)))
    if kind is not None:
        quantize_model(model, kind)
    config = model.config.text_config
    cache = PagedKVCache(config, 1, 64, 64, dtype, model.device)
    cache.allocate(0, 7000, 1000)
    cache.store.normal_()
    runner = Runner(model, 1, cache, 1000)
    attention = runner.decode_attention
    place = 7299
    for tensor, value in ((attention.seen_visual, 6500), (attention.seen_text, 300), (attention.cache_index, place)):
        tensor.fill_(value)
    attention.refresh()
    hidden = torch.randn(1, 1, config.hidden_size, device="cuda", dtype=dtype)
    rotary, before = runner.language.rotary_emb(hidden, torch.full((3, 1, 1), 6800, device="cuda")), cache.store.clone()
    expected = runner._run_layers(hidden, rotary, attention, torch.compile(run_layer, dynamic=False))
    written = cache.store.clone()
    cache.store.copy_(before)
    from qwen_vl_streaming.engine.single_row import SingleRow

    found = SingleRow(runner.layers, dependent_launch.compile_options(model.device)).run(
        hidden, rotary, attention, cache.layers
    )
    others = torch.arange(cache.store.shape[2], device="cuda") != place
    assert torch.equal(cache.store[:, :, others], before[:, :, others])
    return (found, expected), (cache.store[:, :, place], written[:, :, place])


LARGE = {
    "hidden_size": 1024, "intermediate_size": 4608, "num_attention_heads": 8, "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
"""Heads as of the released sizes, and products whose inputs are read at once and not."""


@pytest.mark.parametrize("kind", [None, *WEIGHTS])
@torch.no_grad()
def test_the_kernels_for_a_single_row_equal_the_layers_of_many_rows(kind):
    for found, expected in row_of(kind, torch.bfloat16, **FLEX | LARGE):
        assert (found.float() - expected.float()).norm() < 2e-2 * expected.float().norm()
    if kind is not None:  # rows may be in float32, too; weights may not
        for found, expected in row_of(kind, torch.float32, **FLEX | LARGE):
            assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_the_tiles_of_every_product_run_on_this_gpu(kind, shape):
    """All that `choose_tiles` gives for the sizes in the table, as they fit here, for this GPU and for others."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    weight, scale = quantize(torch.randn(shape, device="cuda"), kind)
    for (rows, _), processors in itertools.product(TILES[shape], {0, hopper_processors(weight.device)}):
        if (tiles := choose_tiles(rows, *shape, processors)) is not None:
            x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
            found, expected = kernel_product(x, weight, scale, tiles), scaled_linear(x, weight, scale)
            assert (found - expected).abs().max() < 2e-2 * expected.abs().max(), (rows, tiles)


WIDE = {
    **FLEX,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
}
"""Inputs in groups, as the kernel for 8-bit weights reads them."""


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["group", "interleave"])
def test_batches_with_8_bit_weights_equal_the_reference(kind, name, monkeypatch):
    print("seed", SEED)
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    variant, jobs = VARIANTS[name], random_jobs(random.Random(SEED), VARIANTS[name], 5)
    models = [tiny_model(**WIDE), tiny_model(**WIDE).cuda()]
    for model in models:
        quantize_model(model, kind)
    expected = reference_captions(models[0], variant, jobs)
    for size in (1, 4):
        assert batched(models[1], variant, jobs, batch_size=size) == expected
    from qwen_vl_streaming.engine.single_row import SingleRow

    # In float32 too, by the kernels for a single row.
    monkeypatch.setattr(model_runner, "make_single_row", lambda layers, _, options: SingleRow(layers, options))
    assert batched(models[1], variant, jobs, batch_size=1) == expected


@pytest.mark.parametrize("kind", WEIGHTS)
def test_sessions_with_8_bit_weights_are_replayed(kind, tmp_path):
    """In bfloat16, where clips and tokens go through both kernels. Differences are ties."""
    print("seed", SEED)
    model = tiny_model(**WIDE).to("cuda", torch.bfloat16)
    quantize_model(model, kind)
    for case in (random_case(random.Random(f"{SEED} {number}"), VARIANTS["group"]) for number in range(3)):
        record = recorded(model, case, "fused", tmp_path / "r.json")
        assert record.model["weights"] == kind
        assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


@pytest.mark.parametrize("kind", [None, *WEIGHTS])
def test_a_model_that_is_not_on_the_current_gpu(kind, tmp_path):
    """A batch in float32 and sessions in bfloat16 on cuda:1, while cuda:0 is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    print("seed", SEED)
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    variant, models = VARIANTS["group"], [tiny_model(**WIDE), tiny_model(**WIDE).to("cuda:1")]
    if kind is not None:
        for model in models:
            quantize_model(model, kind)
    jobs = random_jobs(random.Random(SEED), variant, 4)
    with torch.cuda.device(0):
        assert batched(models[1], variant, jobs, batch_size=4) == reference_captions(models[0], variant, jobs)
    model = tiny_model(**WIDE).to("cuda:1", torch.bfloat16)
    if kind is not None:
        quantize_model(model, kind)
    case = random_case(random.Random(SEED), variant)
    with torch.cuda.device(0):
        record = recorded(model, case, "fused", tmp_path / "r.json")
        assert torch.cuda.current_device() == 0
        assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


@torch.no_grad()
def many_steps(model, clips: int, tokens: int, grid: tuple[int, int]) -> torch.Tensor:
    """The hidden states after each step of `clips` clips with `tokens` random tokens after each, (steps, C). The host
    does not wait, and each clip is encoded while the tokens before it are fed."""
    torch.manual_seed(SEED)
    variant, template = VARIANTS["group"], random_template(random.Random(SEED))
    layout, last = template.layout(grid, 2.0), clips * tokens
    runner = StepRunner.single(model, layout, clips + 1, last, None, 1.15, None)
    runner.warm_up()
    runner.vision_encoder.capture(layout.grid, [1])
    batch_slot, hidden = runner.acquire(template, layout, clips + 1, last), []
    runner.text_ids.copy_(torch.randint(150, runner.text_ids.shape))
    pixels = torch.randn(clips + 1, 4 * layout.tokens_per_clip, 1176)
    state, none = StreamState(variant, template, layout), DueRows.empty()
    runner.prefill(batch_slot, StreamState.prompt(variant, template, layout))
    (ahead,) = runner.vision_encoder.encode([pixels[0]], [layout])
    for clip in range(clips):
        runner.set_clip_features(batch_slot, ahead)
        (ahead,) = runner.vision_encoder.encode([pixels[clip + 1]], [layout])
        runner.step([StepRequest(batch_slot, none, state.feed_clip(last=False), sample=False)])
        hidden.append(runner.last_hidden[0].clone())
        for row in range(clip * tokens, (clip + 1) * tokens):
            place = state.visual_fed + row
            table = np.array([place] * 3 + [row, state.visual_fed, row + 1, 0, 0, 0, row, -1, ANSWER])
            # Each token goes to the last row, so that none is the input of another step.
            runner.step([StepRequest(batch_slot, DueRows(table[:, None]), none, sample=True, next_row=last)])
            hidden.append(runner.last_hidden[0].clone())
    return torch.stack(hidden).float()


@pytest.mark.parametrize("sizes,grid", [(WIDE, (2, 3)), (FLEX | LARGE, (6, 6))], ids=["small", "as released"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", *WEIGHTS])
def test_steps_that_launch_kernels_early_equal_steps_that_do_not(kind, sizes, grid, monkeypatch):
    """In hundreds of steps with different inputs: what is read too early is of an earlier kernel or step. With sizes as
    those of the released models, clips go through their kernel for attention, and products have parts."""
    if not dependent_launch.is_supported(torch.device("cuda")):
        pytest.skip("takes a GPU of compute capability 9 or later")
    print("seed", SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = tiny_model(SEED, **sizes, num_hidden_layers=6).to("cuda", dtype)
    if kind in WEIGHTS:
        quantize_model(model, kind)
    early = [many_steps(model, 40, 8, grid) for _ in range(2)]
    monkeypatch.setattr(dependent_launch, "is_supported", lambda device: False)
    plain = many_steps(model, 40, 8, grid)
    changes = (plain[1:] - plain[:-1]).norm(dim=1) / plain[1:].norm(dim=1)
    assert changes.median() > 0.1  # so the inputs of another step would show
    for found in early:
        error = (found - plain).norm(dim=1) / plain.norm(dim=1)
        assert error.max() < (1e-4 if kind == "float32" else 0.05), (error.argmax(), error)
