"""A tiny Qwen2.5-VL with random weights, created in memory, and random inputs for it. Tests print the seeds."""

import random

import torch
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.timeline.timeline import ANSWER, CLIP, HEADER, PROMPT, TAIL, make_timeline
from transformers import Qwen2_5_VLConfig

VOCABULARY = 200
VIDEO, END = 190, 191


def tiny_config(**text) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": END,
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 22,  # not a multiple of 8, like the real 3420
            "num_heads": 2,
            "out_hidden_size": text.get("hidden_size", 32),
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=189,
        video_token_id=VIDEO,
        vision_start_token_id=188,
        vision_end_token_id=187,
        tie_word_embeddings=True,
    )


def tiny_model(seed: int = 0, **text) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(**text)).eval()
    for parameter in model.parameters():  # at the default scale, the output of a model this small is nearly constant
        parameter.data.normal_(0, 0.2)
    return model


def random_template(draw: random.Random) -> Template:
    def ids(count):
        return tuple(draw.randrange(VOCABULARY - 20) for _ in range(count))

    return Template(ids(draw.randint(1, 9)), (187, *ids(draw.randint(1, 3))), ids(draw.randint(1, 3)), VIDEO, END)


def random_counts(draw: random.Random, variant, most_clips: int = 5) -> list[int]:
    """Random k_1 … k_N with at least one answer token in total. Slots may be empty."""
    clips = draw.randint(1, most_clips)
    if not variant.streams:
        return [0] * (clips - 1) + [draw.randint(1, 8)]
    counts = [draw.randint(0, 4) for _ in range(clips)]
    return counts if sum(counts) else [*counts[:-1], 1]


def timeline_ids(timeline, template: Template, answer: list[int]) -> torch.Tensor:
    """Token ids (L,) of a timeline, as input of one full forward step."""
    source = {PROMPT: template.prompt, TAIL: template.tail, HEADER: template.header, ANSWER: answer}
    return torch.tensor(
        [
            template.video if part == CLIP else source[part][index]
            for part, index in zip(timeline.rows.part.tolist(), timeline.rows.index.tolist(), strict=True)
        ]
    )


__all__ = ["END", "VIDEO", "make_timeline", "random_counts", "random_template", "timeline_ids", "tiny_model"]
