"""The configs of the released sizes, for plans and measurements that have no checkpoint."""

from transformers import Qwen2_5_VLConfig

SIZES = {
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip
"""Text configs by size."""


def released_config(size: str, layers: int | None = None) -> Qwen2_5_VLConfig:
    """The config of Qwen2.5-VL of `size` in SIZES, optionally with fewer layers."""
    text = {
        **SIZES[size],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "tokens_per_second": 2}
    if layers:
        text["num_hidden_layers"] = vision["depth"] = layers
    vision["out_hidden_size"] = text["hidden_size"]
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "3B")
