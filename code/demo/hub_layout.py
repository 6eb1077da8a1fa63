"""Writes a checkpoint in the layout of Qwen2.5-VL's repositories on the hub: a flat config.json, an image
processor's preprocessor_config.json, chat_template.json, and weights under the published names. transformers loads it
from 4.49 on.

Does not depend on how model and tokenizer are created.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_vl_streaming.model.checkpoint import like_other_files
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2Tokenizer

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of Qwen2.5-VL."""
GENERATION = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-06, "transformers_version": "4.49.0"}
PREPROCESSOR = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def flat_config(config: Qwen2_5_VLConfig, vision_token_id: int, dtype: str) -> dict:
    """Return the hub's config.json for `config`: the language model's fields at the top level, and a vision_config."""
    text, vision = config.text_config, config.vision_config
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_token_id": vision_token_id,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": text.initializer_range,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "max_window_layers": text.max_window_layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_parameters["rope_theta"],
        "sliding_window": 32768,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": vision.depth,
            "hidden_act": "silu",
            "hidden_size": vision.hidden_size,
            "initializer_range": vision.initializer_range,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "in_chans": 3,
            "out_hidden_size": vision.out_hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.rope_parameters["mrope_section"])},
        "vocab_size": text.vocab_size,
    }


def write_tokenizer(folder: Path, tokenizer: Qwen2Tokenizer, special: Sequence[str]) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json; `special` are its special tokens."""
    backend = json.loads(tokenizer._tokenizer.to_str())
    model = backend["model"]
    added = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in backend["added_tokens"]
    }
    write_json(folder / "tokenizer.json", backend)
    write_json(folder / "vocab.json", model["vocab"])
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(special),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.eos_token,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    special: Sequence[str],
    max_pixels: int,
    max_shard_size: str = "4GB",
) -> None:
    """Write a checkpoint to `folder`; its processor resizes images to at most `max_pixels`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        for path in Path(temporary).glob("model*"):
            like_other_files(path.rename(folder / path.name))
    text = model.config.text_config
    vision_token_id = tokenizer.convert_tokens_to_ids("<|vision_pad|>")
    config = flat_config(model.config, vision_token_id, str(model.dtype).removeprefix("torch."))
    write_json(folder / "config.json", config)
    ends = [text.eos_token_id, text.pad_token_id]
    start = {"bos_token_id": text.bos_token_id, "pad_token_id": text.pad_token_id, "eos_token_id": ends}
    write_json(folder / "generation_config.json", {**start, **GENERATION})
    write_json(folder / "preprocessor_config.json", {"min_pixels": 56 * 56, "max_pixels": max_pixels, **PREPROCESSOR})
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_tokenizer(folder, tokenizer, special)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
