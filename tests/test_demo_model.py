"""The demo's model: a Qwen2.5-VL checkpoint that transformers loads and runs on a demo video."""

import io
import random
import tarfile

import av
import pytest
import torch
from make_data import make_dataset
from make_model import (
    SPECIAL_TOKENS,
    TINY,
    ModelShape,
    make_config,
    make_model,
    make_tokenizer,
    read_captions,
    tiny_checkpoint,
)
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import QUESTIONS
from samples import DataConfig
from scenes import count_words, make_scene
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [make_scene(random.Random(number), 10.0, (3.1, 4.4)).caption for number in range(150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_every_word_is_one_token(captions):
    tokenizer = make_tokenizer(captions)
    for text in (*captions, *QUESTIONS, "You are a helpful assistant."):
        tokens = tokenizer(text).input_ids
        assert len(tokens) == count_words(text) and tokenizer.decode(tokens) == text
    other = "Été 2024: naïve\n\tcode 🙂"
    assert tokenizer.decode(tokenizer(other).input_ids) == other
    assert [tokenizer(token).input_ids for token in SPECIAL_TOKENS] == [
        [tokenizer.convert_tokens_to_ids(token)] for token in SPECIAL_TOKENS
    ]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_the_chat_template_equals_qwens(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    user = {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "video", "video": "a.mp4"}]}
    asked = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat?<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system = {"role": "system", "content": "You are a helpful assistant."}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    for messages in ([user], [system, user]):
        assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == asked
        answered = processor.apply_chat_template([*messages, assistant], tokenize=False)
        assert answered == asked + "This.<|im_end|>\n"


def test_a_saved_checkpoint_runs_in_stock_transformers_on_a_demo_video(checkpoint, tmp_path):
    make_dataset(DataConfig(tmp_path, train_videos=1, test_videos=0, dropped=0))
    with tarfile.open(next(tmp_path.glob("train/*.tar"))) as archive:
        name = next(entry for entry in archive.getnames() if entry.endswith(".mp4"))
        video = archive.extractfile(name).read()
    with av.open(io.BytesIO(video)) as container:
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    clip = torch.stack(frames[::12][:4]).permute(0, 3, 1, 2)

    processor = AutoProcessor.from_pretrained(checkpoint)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    user = {"role": "user", "content": [{"type": "text", "text": QUESTIONS[-1]}, {"type": "video"}]}
    text = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[text],
        videos=[clip],
        video_metadata=[{"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}],
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 2 * 2 * 2
    logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, len(processor.tokenizer)) and logits.isfinite().all()
    written = model.generate(**inputs, max_new_tokens=3)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 3


def test_token_ids_come_from_the_tokenizer_and_weights_from_the_seed(captions):
    tokenizer = make_tokenizer(captions)
    config = make_config(tokenizer, TINY)
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert config.tie_word_embeddings and config.vision_config.tokens_per_second == 2
    state = torch.random.get_rng_state()
    one, same, other = (make_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(one["lm_head.weight"], one["model.language_model.embed_tokens.weight"])


def test_default_shape_is_small_and_matches_mrope(captions):
    config = make_config(make_tokenizer(captions))
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    assert 2 * sum(text.rope_parameters["mrope_section"]) == head
    assert make_model(config).num_parameters() < 3e6


def test_user_errors_are_refused(tmp_path):
    with pytest.raises(InputError, match="--kv-heads 3"):
        ModelShape(kv_heads=3)
    with pytest.raises(InputError, match="a multiple of 28"):
        ModelShape(frame_side=80)
    with pytest.raises(InputError, match="has no shards"):
        read_captions(tmp_path)
