"""Makes the demo's model: a small Qwen2.5-VL with random weights, saved like any checkpoint.

    python code/demo/make_model.py --data DIR --output MODEL_DIR

DIR is what make_data.py wrote. The tokenizer is a byte-level BPE with Qwen's pre-tokenizer and special tokens, trained
on the captions in DIR/train, so that nearly every word is one token. Knows nothing about training and evaluation.
"""

import json
import random
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hub_layout import write_checkpoint
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.model.prompts import QUESTIONS
from scenes import make_scene
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# What a prompt holds: the system text, the roles and the questions.
PROMPT_TEXTS = ("You are a helpful assistant.", "system\nuser\nassistant\n", *QUESTIONS)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; those that are not named here are Qwen2.5-VL's own."""

    vision_depth: int = 2
    """Layers of the vision tower."""
    vision_hidden: int = 96
    """Width of the vision tower."""
    vision_heads: int = 4
    """Attention heads of the vision tower."""
    vision_channels: int = 192
    """Channels between the two products of the vision tower's MLPs."""
    layers: int = 3
    """Layers of the language model."""
    hidden: int = 128
    """Width of the language model."""
    heads: int = 4
    """Query heads of the language model."""
    kv_heads: int = 2
    """Key and value heads of the language model."""
    rope_theta: int = 100
    """Base of the position frequencies: small, so that one row or column of a few is a visible turn."""
    init_range: float = 0.08
    """Standard deviation of the random weights: about one over the root of the width."""
    frame_side: int = 84
    """Frames are shrunk to about this many pixels squared, a multiple of 28."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 8:
            raise InputError(f"--hidden {self.hidden} with --heads {self.heads}: a head must be a multiple of 8 wide")
        if self.heads % self.kv_heads:
            raise InputError(f"--heads {self.heads} is no multiple of --kv-heads {self.kv_heads}")
        if self.vision_hidden % self.vision_heads or self.vision_hidden // self.vision_heads % 4:
            raise InputError(
                f"--vision-hidden {self.vision_hidden} with --vision-heads {self.vision_heads}: "
                "a head must be a multiple of 4 wide"
            )
        if self.frame_side < 56 or self.frame_side % 28:
            raise InputError(f"--frame-side is {self.frame_side}: it must be a multiple of 28, and 56 or more")


TINY = ModelShape(
    vision_depth=2,
    vision_hidden=32,
    vision_heads=2,
    vision_channels=62,  # like the real 3420 no multiple of 8
    layers=2,
    hidden=32,
    heads=4,
    frame_side=56,
    init_range=0.2,
)


def make_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """A tokenizer like Qwen's, whose words are those of `texts` and of the prompts; any other text is split finer."""
    # The words in order: the trainer numbers words of equal count by when they came.
    words = sorted({*PROMPT_TEXTS, *texts})
    backend = Qwen2Tokenizer()._tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    model = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=32768,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def make_config(tokenizer: Qwen2Tokenizer, shape: ModelShape = ModelShape()) -> Qwen2_5_VLConfig:
    """The model's config, with every token id taken from `tokenizer`."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    pairs = shape.hidden // shape.heads // 2
    sides = 3 * pairs // 8  # Qwen2.5-VL's shares: 2, 3 and 3 of 8 for time, height and width
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_channels,
            "out_hidden_size": shape.hidden,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "tokens_per_second": 2,
            "fullatt_block_indexes": [shape.vision_depth - 1],
            "initializer_range": shape.init_range,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.hidden,
            "intermediate_size": 3 * shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "initializer_range": shape.init_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(shape.rope_theta),
                "mrope_section": [pairs - 2 * sides, sides, sides],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def make_model(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random float32 weights that `seed` settles."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model.eval()


def make_checkpoint(folder: Path, captions: Iterable[str], shape: ModelShape, seed: int = 0) -> int:
    """Write a whole checkpoint, processor included, to `folder`; returns the number of weights."""
    tokenizer = make_tokenizer(captions)
    model = make_model(make_config(tokenizer, shape), seed)
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    write_checkpoint(beside, model, tokenizer, SPECIAL_TOKENS[1:], shape.frame_side**2)
    (beside / "make_model.json").write_text(json.dumps({**asdict(shape), "seed": seed}, indent=1))
    beside.rename(folder)
    return model.num_parameters()


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a few ten thousand weights for tests: 2 layers, frames of 56 × 56, so 4 tokens a clip."""
    rng = random.Random(seed)
    captions = [make_scene(rng, 12.0, (3.1, 4.4)).caption for _ in range(200)]
    make_checkpoint(folder, captions, TINY, seed)
    return folder


def read_captions(data: Path) -> list[str]:
    """The captions in the shards of `data`/train. Raises InputError where there are none."""
    captions = []
    for shard in sorted((data / "train").glob("*.tar")):
        with tarfile.open(shard) as archive:
            entries = (entry for entry in archive if entry.name.endswith(".json"))
            captions += [json.load(archive.extractfile(entry))["human_caption"] for entry in entries]
    if not captions:
        raise InputError(f"{data / 'train'} holds no shards: make them with code/demo/make_data.py --output {data}")
    return captions


def main() -> None:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="settles the random weights (default 0)")
    for name, default in asdict(ModelShape()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"(default {default})")
    arguments = vars(parser.parse_args())
    quiet_libraries()
    data, output, seed = (arguments.pop(name) for name in ("data", "output", "seed"))
    shape = ModelShape(**arguments)
    if output.exists():
        raise InputError(f"{output} is there already: name another --output, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    weights = make_checkpoint(output, read_captions(data), shape, seed)
    print(f"wrote {output}: {weights / 1e6:.2f} million weights")


if __name__ == "__main__":
    run(main)
