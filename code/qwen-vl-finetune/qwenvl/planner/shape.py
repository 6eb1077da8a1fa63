"""The sizes of a model that memory and speed depend on, from its config alone."""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as StockModel

from ..arguments import ModelArguments
from ..param_groups import LANGUAGE, VISION, part_of, plan_lora, tuned_parts


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2.5-VL and of the part of it that trains. Numbers of parameters unless said otherwise."""

    hidden: int
    mlp: int
    kv: int
    """Columns of all key heads."""
    layers: int
    vocabulary: int
    layer: int
    """Matrices of one layer of the language model."""
    total: int
    trained: int
    largest: int
    """The largest trained parameter, or 0."""
    tower: int
    """Matrices of the vision tower without its merger."""
    merger: int
    tower_hidden: int
    tower_mlp: int
    tower_blocks: int
    tower_full: int
    """Blocks with attention over whole clips."""
    window: int
    """Patches of an attention window."""
    patch_values: int
    """Values of a patch of pixels."""
    lora: bool
    dropped: float
    """Inputs of a layer's adapters, if dropout applies to them, else 0."""
    tunes_language: bool
    tunes_tower: bool

    @property
    def billions(self) -> str:
        return f"{self.total / 1e9:.1f}B"


def find_shape(config: Qwen2_5_VLConfig, arguments: ModelArguments) -> Shape:
    """The sizes of a model of `config` that trains as `arguments` say. Allocates nothing.

    Raises InputError for LoRA targets that match no layer.
    """
    with torch.device("meta"):
        model = StockModel(config)
    text, vision = config.text_config, config.vision_config
    parameters = dict(model.named_parameters())
    sizes: Counter[str] = Counter()
    for name, parameter in parameters.items():
        sizes[part_of(name)] += parameter.numel()
    tuned = tuned_parts(arguments)
    total, trained = sum(sizes.values()), sum(sizes[part] for part in tuned)
    largest, dropped = max(p.numel() for name, p in parameters.items() if part_of(name) in tuned), 0
    if arguments.lora_enable:
        plan, modules = plan_lora(model, arguments), dict(model.named_modules())
        adapted = [modules[name] for name in plan.adapted]
        full = [parameter.numel() for name in plan.full for parameter in modules[name].parameters()]
        trained = sum(full) + sum(arguments.lora_r * (linear.in_features + linear.out_features) for linear in adapted)
        total += trained  # peft keeps the base's own copy beside the one that trains
        largest = max([0, *full])
        if arguments.lora_dropout:
            dropped = sum(modules[name].in_features for name in plan.adapted if part_of(name) == LANGUAGE)

    def matrices(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)

    tower, layers = model.model.visual, model.model.language_model.layers
    return Shape(
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        kv=text.hidden_size // text.num_attention_heads * text.num_key_value_heads,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        layer=matrices(layers[0]),
        total=total,
        trained=trained,
        largest=largest,
        tower=matrices(tower) - matrices(tower.merger),
        merger=matrices(tower.merger),
        tower_hidden=vision.hidden_size,
        tower_mlp=vision.intermediate_size,
        tower_blocks=vision.depth,
        tower_full=len(vision.fullatt_block_indexes),
        window=(vision.window_size // vision.patch_size) ** 2,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        lora=arguments.lora_enable,
        dropped=dropped / text.num_hidden_layers,
        tunes_language=LANGUAGE in tuned,
        tunes_tower=VISION in tuned,
    )
