"""Tiny checkpoints in the layout of the hub's Qwen2.5-VL repositories, with the same vocabulary size and special tokens
and several shards, and a hub cache that contains them. Each has a few million weights, most of them embeddings."""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from hub_layout import write_checkpoint
from make_model import TINY, make_config, make_model, make_tokenizer
from scenes import make_scene
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

COMMIT = "66285546d2b821cf421d4f5eb2576359d3770cd3"
NAMES = {"3B": "Qwen/Qwen2.5-VL-3B-Instruct", "7B": "Qwen/Qwen2.5-VL-7B-Instruct"}
FIRST = 151643
"""Id of <|endoftext|>, which is also the number of text tokens before it."""
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""Added tokens that are not special."""
SIZES = {
    # tied, vocabulary, max_window_layers
    "3B": (True, 151936, 70),
    "7B": (False, 152064, 28),
}


def hub_tokenizer() -> Qwen2Tokenizer:
    """The demo's vocabulary, padded with unused tokens so that the special tokens have their published ids."""
    rng = random.Random(0)
    words = make_tokenizer(make_scene(rng, 12.0, (3.1, 4.4)).caption for _ in range(100))
    model = json.loads(words._tokenizer.to_str())["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < FIRST}
    vocabulary |= {f"\x00{number}": number for number in range(len(vocabulary), FIRST)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token=SPECIAL[0],  # tokens that are passed here get the first added ids
        pad_token=SPECIAL[0],
        unk_token=None,
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    tokenizer.eos_token = "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids([SPECIAL[0], PLAIN[-1]]) == [FIRST, 151664]
    return tokenizer


def hub_checkpoint(folder: Path, size: str) -> Path:
    """Write a checkpoint in the format of `size`, 3B or 7B, in bfloat16 shards. `folder` must not exist yet."""
    tied, vocabulary, window_layers = SIZES[size]
    tokenizer = hub_tokenizer()
    config = make_config(tokenizer, replace(TINY, frame_side=3584))
    config.tie_word_embeddings, config.text_config.vocab_size = tied, vocabulary
    config.text_config.max_window_layers, config.text_config.max_position_embeddings = window_layers, 128000
    model = make_model(config, seed=3).to(torch.bfloat16)
    write_checkpoint(folder, model, tokenizer, SPECIAL[1:], 12845056, max_shard_size="8MB")
    return folder


def put_into_cache(cache: Path, checkpoint: Path, name: str, markers: bool = False) -> Path:
    """Add `checkpoint` to a hub cache in the layout of huggingface_hub, and return the folder of the snapshot.
    `markers` adds the marker files for files that the repository does not have."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(COMMIT)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.hardlink_to(path)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    if markers:
        for missing in ("processor_config.json", "adapter_config.json", "video_preprocessor_config.json"):
            marker = repository / ".no_exist" / COMMIT / missing
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return snapshot
