"""Creates the demo's model: a checkpoint of a small Qwen2.5-VL with random weights.

    python code/demo/make_model.py --data DIR --output MODEL_DIR

DIR is the output of make_data.py. The tokenizer is a byte-level BPE with Qwen's pre-tokenizer and special tokens,
trained on the captions in DIR/train, so that nearly every word is one token. Does not depend on training or evaluation.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hub_layout import write_checkpoint
from make_data import read_shards
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.files import atomic_folder
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.model.prompts import QUESTIONS
from scenes import make_scene
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

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
# The parts of a prompt: the system text, the roles and the questions.
PROMPT_TEXTS = ("You are a helpful assistant.", "system\nuser\nassistant\n", *QUESTIONS)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model. All other settings are those of Qwen2.5-VL."""

    vision_depth: int = 2
    """Layers of the vision encoder."""
    vision_hidden: int = 96
    """Hidden size of the vision encoder."""
    vision_heads: int = 4
    """Attention heads of the vision encoder."""
    vision_channels: int = 192
    """Intermediate size of the vision encoder's MLPs."""
    layers: int = 3
    """Layers of the language model."""
    hidden: int = 128
    """Hidden size of the language model."""
    heads: int = 4
    """Query heads of the language model."""
    kv_heads: int = 2
    """Key and value heads of the language model."""
    rope_theta: int = 100
    """Base of the rotary frequencies; small, because the grid has only a few rows and columns."""
    init_range: float = 0.08
    """Standard deviation of the random weights: about one over the square root of the hidden size."""
    frame_side: int = 84
    """Side in pixels that frames are resized to; a multiple of 28."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 8:
            raise InputError(f"--hidden {self.hidden} with --heads {self.heads}: head size must be a multiple of 8")
        if self.heads % self.kv_heads:
            raise InputError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}: change one")
        if self.vision_hidden % self.vision_heads or self.vision_hidden // self.vision_heads % 4:
            raise InputError(
                f"--vision-hidden {self.vision_hidden} with --vision-heads {self.vision_heads}: "
                "head size must be a multiple of 4"
            )
        if self.frame_side < 56 or self.frame_side % 28:
            raise InputError(f"--frame-side is {self.frame_side}: it must be a multiple of 28, and 56 or more")


TINY = ModelShape(
    vision_depth=2,
    vision_hidden=32,
    vision_heads=2,
    vision_channels=62,  # like the real 3420, not a multiple of 8
    layers=2,
    hidden=32,
    heads=4,
    frame_side=56,
    init_range=0.2,
)


def make_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """Train a tokenizer like Qwen's to which each word of `texts` and of the prompts is one token."""
    # Sorted, because the trainer numbers equally frequent words in order of appearance.
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
    """The model's config, with all token ids from `tokenizer`."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    pairs = shape.hidden // shape.heads // 2
    sides = 3 * pairs // 8  # as in Qwen2.5-VL: 2, 3 and 3 eighths for time, height and width
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
    """Create the model with random float32 weights from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model.eval()


def make_checkpoint(folder: Path, captions: Iterable[str], shape: ModelShape, seed: int = 0) -> int:
    """Write a checkpoint with its processor to `folder`. Returns the number of weights."""
    tokenizer = make_tokenizer(captions)
    model = make_model(make_config(tokenizer, shape), seed)
    with atomic_folder(folder) as partial:
        write_checkpoint(partial, model, tokenizer, SPECIAL_TOKENS[1:], shape.frame_side**2)
        (partial / "make_model.json").write_text(json.dumps({**asdict(shape), "seed": seed}, indent=1))
    return model.num_parameters()


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint for tests: 2 layers, frames of 56 × 56 pixels, 4 tokens per clip. Returns `folder`."""
    rng = random.Random(seed)
    captions = [make_scene(rng, 12.0, (3.1, 4.4)).caption for _ in range(200)]
    make_checkpoint(folder, captions, TINY, seed)
    return folder


def read_captions(data: Path) -> list[str]:
    """The captions in the shards of `data`/train. Raises InputError if there are none."""
    rows = read_shards(data / "train", lambda name: name.endswith(".json"))
    captions = [json.loads(row)["human_caption"] for _, row in rows]
    if not captions:
        raise InputError(f"{data / 'train'} has no shards: create them with code/demo/make_data.py --output {data}")
    return captions


def main() -> None:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="output of make_data.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights (default: 0)")
    for name, default in asdict(ModelShape()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    arguments = vars(parser.parse_args())
    quiet_libraries()
    data, output, seed = (arguments.pop(name) for name in ("data", "output", "seed"))
    shape = ModelShape(**arguments)
    if output.exists():
        raise InputError(f"{output} already exists: give another --output, or delete it")
    weights = make_checkpoint(output, read_captions(data), shape, seed)
    print(f"wrote {output}: {weights / 1e6:.2f} million weights")


if __name__ == "__main__":
    run(main)
