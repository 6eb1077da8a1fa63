"""The patched model against stock transformers: positions, logits, vision tower, loss, saving and loading."""

import copy
import gc
import io
import json
import random
import shutil
import time
import weakref

import pytest
import torch
from make_model import tiny_checkpoint
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine import vision_encoder
from qwen_vl_streaming.engine.vision_encoder import VisionEncoder
from qwen_vl_streaming.model import modeling_qwen2_5_vl, vision_tower
from qwen_vl_streaming.model.frame_patches import FramePatches, join_frames, split_frames
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import (
    QUESTIONS,
    answer_ids,
    clip_pixels,
    load_processor,
    make_template,
)
from qwen_vl_streaming.timeline.attention import dense_mask
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from safetensors.torch import load_file, save_file
from tiny import VIDEO, random_template, timeline_ids, tiny_config, tiny_model
from transformers import Qwen2_5_VLForConditionalGeneration as Stock

SEED = time.time_ns() % 100_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def stock_twin(model):
    twin = Stock(tiny_config()).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def drawn_twins():
    """A random generator, a model of ours, and the stock one with its weights."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    model = tiny_model(SEED)
    return random.Random(SEED), model, stock_twin(model)


def test_origin_equals_stock_logits():
    """The stock model, given only ids and pixels, against ours with explicit positions and mask."""
    draw, model, twin = drawn_twins()
    for seconds in (1.0, 0.75):
        template, grid, clips = random_template(draw), (draw.randint(1, 6), draw.randint(1, 6)), draw.randint(1, 5)
        answer = [draw.randrange(100) for _ in range(6)]
        timeline = make_timeline(VARIANTS["origin"], template.layout(grid, 2 * seconds), [0] * (clips - 1) + [6])
        ids = timeline_ids(timeline, template, answer)[None]
        grid_thw = torch.tensor([[clips, 2 * grid[0], 2 * grid[1]]])
        pixels = torch.randn(int(grid_thw.prod()), 1176)
        video = {"pixel_values_videos": pixels, "video_grid_thw": grid_thw}
        with torch.no_grad():
            # The positions are passed: those that the pinned transformers computes are not the release's.
            positions = timeline_positions(timeline)[:, None]
            expected = twin(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == VIDEO).int() * 2,
                position_ids=positions,
                **video,
            ).logits
            dense = dense_mask(timeline.rows.visual[None], timeline.rows.text[None], parallel=False)
            for mask in (dense, None):
                ours = model(input_ids=ids, position_ids=positions, attention_mask=mask, **video).logits
                assert (ours - expected).abs().max() < 1e-5


def test_vision_tower_equals_stock_and_clips_are_independent():
    """Windows of every size at the borders of an odd grid; clip by clip, all at once, and stock."""
    draw, model, twin = drawn_twins()
    for _ in range(6):
        clips, grid = draw.randint(1, 4), (draw.randint(1, 11), draw.randint(1, 11))
        pixels = torch.randn(clips, 4 * grid[0] * grid[1], 1176)
        grid_thw = torch.tensor([[clips, 2 * grid[0], 2 * grid[1]]])
        with torch.no_grad():
            stock = torch.cat(twin.get_video_features(pixels.flatten(0, 1), grid_thw).pooler_output)
            together = model.perceive(pixels, grid)
            one_by_one = torch.cat([model.perceive(clip[None], grid) for clip in pixels])
            wide = copy.deepcopy(model)
            for block in wide.model.visual.blocks:
                block.mlp.widen()
            widened = wide.perceive(pixels, grid)
        assert (widened.flatten(0, 1) - stock).abs().max() < 1e-4 * stock.abs().max()
        assert (together.flatten(0, 1) - stock).abs().max() < 1e-4 * stock.abs().max()
        assert (together - one_by_one).abs().max() < 1e-4 * stock.abs().max()


def test_gpus_without_flash_attention_compute_segments_by_length(monkeypatch):
    """In half precision, with stand-ins for GPUs."""
    capability, calls = (7, 5), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert not vision_tower.has_flash(torch.device("cuda:1")) and not vision_tower.has_flash(torch.device("cpu"))
    capability = (8, 0)
    assert vision_tower.has_flash(torch.device("cuda:1"))

    def flash(query, key, value, *bounds, scale):
        calls.append(value.dtype)
        return value

    monkeypatch.setattr(vision_tower, "varlen_attn", flash)
    for has, dtype in ((False, torch.float16), (True, torch.float16), (True, torch.float32)):
        monkeypatch.setattr(vision_tower, "has_flash", lambda device, has=has: has)
        with torch.no_grad():
            tiny_model().to(dtype).perceive(torch.randn(1, 24, 1176), (2, 3))
    assert calls and set(calls) == {torch.float16}


def test_a_settled_model_is_saved_as_a_whole():
    model = tiny_model()
    model.settle_tower()
    with io.BytesIO() as file:
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again._tower_is_compiled and torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_layouts_that_a_graph_reads_outlive_others(monkeypatch):
    """The vision encoder keeps the layout of each graph, which the model may drop."""
    model, pixels = tiny_model(), torch.randn(1, 24, 1176)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    encoder = VisionEncoder(model)
    encoder.stream = object()
    monkeypatch.setattr(vision_encoder, "capture", lambda work, stream: (None, work()))
    encoder.capture((2, 3), [1])
    held = weakref.ref(model.tower_layout([(1, 2, 3)])["order"])
    with torch.no_grad():
        expected = model.perceive(pixels, (2, 3))
        for rows in range(1, modeling_qwen2_5_vl.LAYOUTS + 2):
            model.tower_layout([(rows, 1, 1)])
        gc.collect()
        assert held() is encoder.graphs[2, 3][1][3]["order"]
        assert model.tower_layout([(1, 2, 3)])["order"] is not held()
        assert torch.equal(model.perceive(pixels, (2, 3)), expected)


def test_a_widened_tower_is_moved_and_saved_like_any_other(tmp_path):
    """Its weights are views of wider weights, with the same values."""
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in model.model.visual.blocks:
        block.mlp.widen()
    mlp, pixels = model.model.visual.blocks[0].mlp, torch.randn(1, 24, 1176)
    assert mlp.intermediate_size % 8 and mlp.wide is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved = Stock.from_pretrained(tmp_path).state_dict()
    assert saved and all(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    with torch.no_grad():
        seen = model.perceive(pixels, (2, 3))
        mlp.down_proj.weight.mul_(2)  # in place: what lies around it is still zero
        twice = model.perceive(pixels, (2, 3))
        assert not torch.equal(twice, seen)
        with torch.enable_grad():
            model.perceive(pixels, (2, 3)).sum().backward()
        assert mlp.gate_proj.weight.grad.any() and mlp.down_proj.weight.grad.any()
        moved = model.double().perceive(pixels.double(), (2, 3))
        assert mlp.wide is None and (moved - twice).abs().max() < 1e-4 * moved.abs().max()


def test_loss_is_over_labelled_rows_without_a_shift():
    model = tiny_model()
    ids, labels = torch.arange(12)[None] % 7, torch.full((1, 12), -100)
    labels[0, 3], labels[0, 8] = 5, 9
    inputs = {"input_ids": ids, "position_ids": torch.arange(12).expand(3, 1, 12), "attention_mask": None}
    logits = model(**inputs).logits[0]
    expected = -(logits[3].log_softmax(-1)[5] + logits[8].log_softmax(-1)[9])
    result = model(**inputs, labels=labels)
    assert result.logits.shape == (2, logits.shape[1])
    assert torch.isclose(result.loss, expected / 2)
    assert torch.isclose(model(**inputs, labels=labels, num_items_in_batch=8).loss, expected / 8)


def test_a_wrong_number_of_visual_tokens_is_refused():
    ids = torch.tensor([[1, VIDEO, VIDEO, 2]])
    with pytest.raises(ValueError, match="2 rows for visual tokens, but 3 visual tokens"):
        tiny_model()(
            input_ids=ids,
            position_ids=torch.arange(4).expand(3, 1, 4),
            attention_mask=None,
            visual_tokens=torch.zeros(3, 32),
        )


@pytest.mark.parametrize("name", ["labels", "score", "visual_rows"])
def test_rows_of_another_shape_are_refused(name):
    """Their indices would be those of other rows."""
    model, ids = tiny_model(), torch.full((2, 10), 3)
    given = {"visual_tokens": torch.zeros(2, 32)} if name == "visual_rows" else {}
    flags = torch.zeros(2, 9, dtype=torch.bool)
    flags[:, 0] = True
    wrong = [torch.where(flags, 5, -100)] if name == "labels" else [flags, torch.zeros(2, 10, dtype=torch.long)]
    for rows in wrong:
        with pytest.raises(ValueError, match="shape"):
            model(ids, torch.arange(10).expand(3, 2, -1), None, **{name: rows}, **given)


def test_sliding_windows_are_refused():
    config = tiny_config(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window"):
        Qwen2_5_VLForConditionalGeneration(config)


def test_save_and_reload(checkpoint, tmp_path):
    """Ours loads what stock saved, and stock loads what ours saved; weights and their names stay the same."""
    model = load_model(checkpoint, "sdpa", torch.float32)
    model.config.streaming_variant, model.config.wait_k = "group", 3
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = load_config(tmp_path)
    assert (config.streaming_variant, config.wait_k) == ("group", 3)
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    stock, report = Stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(weight, stock.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, tmp_path):
    """Missing weights are never silently replaced by random numbers."""
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(next(name for name in weights if "down_proj" in name))
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights"):
        load_model(tmp_path, "sdpa", torch.float32)
    with pytest.raises(InputError, match="could be loaded from"):
        load_model(tmp_path / "nowhere", "sdpa", torch.float32)
    with pytest.raises(InputError, match="no processor"):
        load_processor(tmp_path)
    weights["lm_head.weight"] = torch.zeros(2, 2)
    save_file({name: tensor[:1] for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="could be loaded from"):
        load_model(tmp_path, "sdpa", torch.float32)
    with pytest.raises(InputError, match=r"config.json is a file: give the folder"):
        load_config(tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    for broken, says in (
        (config | {"model_type": "qwen2_vl"}, "has the model type qwen2_vl"),
        ([1], ""),
        ({}, "type None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=f"could be loaded from .*{says}"):
            load_config(tmp_path)


@pytest.mark.parametrize("names", ["tokenizer.json vocab.json", "chat_template.json"])
def test_an_incomplete_processor_is_refused(checkpoint, tmp_path, names):
    for path in (*checkpoint.glob("*.json"), checkpoint / "merges.txt"):
        shutil.copy(path, tmp_path)
    assert load_processor(tmp_path)
    for name in names.split():
        (tmp_path / name).unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if "chat_template.json" in names:
        settings.pop("chat_template")  # the hub's repositories have it twice
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no processor could be loaded"):
        load_processor(tmp_path)


def test_template_and_pixels_of_a_real_processor(checkpoint):
    """Prompt, tail and header together equal the chat template; pixels equal the processor's."""
    processor = load_processor(checkpoint)
    template = make_template(processor, QUESTIONS[-1])
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + QUESTIONS[-1]
        + "<|vision_start|>"
        "<|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    ids = [*template.prompt, template.video, *template.tail, *template.header]
    assert ids == processor.tokenizer(text).input_ids
    assert processor.tokenizer.decode(template.tail) == "<|vision_end|><|im_end|>\n"
    assert processor.tokenizer.decode(template.end) == "<|im_end|>"
    assert processor.tokenizer.decode(answer_ids(processor, template, " A red square. ")) == "A red square.<|im_end|>"
    odd = answer_ids(processor, template, "A <|video_pad|> and <|im_end|> as text.")
    assert template.video not in odd and odd.count(template.end) == 1
    with pytest.raises(InputError, match="no tokens"):
        answer_ids(processor, template, " \n")
    frames = torch.randint(0, 256, (6, 3, 56, 84), dtype=torch.uint8)
    pixels, grid = clip_pixels(processor, frames)
    assert grid == (2, 3) and pixels.shape == (3, 24, 1176)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (processor.video_processor.image_mean, processor.video_processor.image_std)
    )
    for clip, each in zip(pixels, frames.split(2), strict=True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            prepare = FramePatches(processor, dtype)
            for halves in ([prepare(frame.numpy()) for frame in each], split_frames(clip, dtype)):
                assert torch.equal(torch.from_numpy(join_frames(halves)).view(dtype), clip.to(dtype))
    first = pixels[0, 0].view(3, 2, 14, 14)  # channels, frames, height, width of the first patch: rescaled by 1/255
    assert torch.allclose(first[:, 0], (frames[0, :, :14, :14] / 255 - mean) / std, atol=1e-5)
