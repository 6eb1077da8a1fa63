"""Which parameters train, in full or through LoRA adapters, and their learning rates. Does not depend on data and on
how a step runs."""

import re
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from qwen_vl_streaming.common.errors import InputError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import Qwen2_5_VLForConditionalGeneration as StockModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from .argument_checks import check_optimizer, optimizer_of
from .arguments import ModelArguments
from .training_arguments import SftArguments

LANGUAGE, MERGER, VISION = "language model", "merger", "vision tower"
FLAGS = {LANGUAGE: "tune_mm_llm", MERGER: "tune_mm_mlp", VISION: "tune_mm_vision"}
RATES = {LANGUAGE: "learning_rate", MERGER: "mm_projector_lr", VISION: "vision_tower_lr"}
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")
"""Prefixes of optimizers that would ignore the learning rates of the parts."""


def part_of(name: str) -> str:
    """The part of a Qwen2.5-VL, bare or wrapped by peft, that the parameter or layer of this dotted name belongs to.

    Embeddings and `lm_head`, tied or not, belong to the language model.
    """
    if ".visual.merger." in f".{name}.":
        return MERGER
    return VISION if ".visual." in f".{name}." else LANGUAGE


def tuned_parts(arguments: ModelArguments) -> list[str]:
    return [part for part, flag in FLAGS.items() if getattr(arguments, flag)]


@dataclass(frozen=True)
class LoraPlan:
    """Which layers get adapters, by their dotted names."""

    adapted: list[str]
    """Linear layers with an adapter."""
    full: list[str]
    """Modules that train in full beside the adapters."""


def plan_lora(model: nn.Module, arguments: ModelArguments) -> LoraPlan:
    """The adapters that `arguments` ask for. Raises InputError where a target matches no layer, or none of the language
    model."""
    tuned = tuned_parts(arguments)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and part_of(name) in tuned]
    adapted: set[str] = set()
    for target in arguments.lora_targets:
        matches = [name for name in linear if re.fullmatch(rf"(?:.*\.)?(?:{target})", name)]
        if not matches:
            raise InputError(
                f"--lora_targets {target} matches no linear layer of the parts that train ({', '.join(tuned)}): "
                "give ends of layer names such as q_proj, and train their part with its --tune flag"
            )
        adapted.update(matches)
    if model.config.tie_word_embeddings and "lm_head" in adapted:
        raise InputError("--lora_targets match lm_head, which shares its weights with the embeddings: omit lm_head")
    parts = {part_of(name) for name in adapted}
    if LANGUAGE in tuned and LANGUAGE not in parts:
        raise InputError(
            f"--lora_targets {' '.join(arguments.lora_targets)} match no layer of the language model: "
            "add one such as q_proj, or give --tune_mm_llm False"
        )
    # peft cannot save a ModuleList in full, so the blocks of the tower are named one by one.
    modules = {
        MERGER: ["model.visual.merger"],
        VISION: ["model.visual.patch_embed"]
        + [f"model.visual.blocks.{index}" for index in range(len(model.model.visual.blocks))],
    }
    return LoraPlan(sorted(adapted), [name for part in tuned if part not in parts for name in modules[part]])


def check_parts(config: PretrainedConfig, arguments: ModelArguments, training: SftArguments) -> None:
    """Raises InputError, before any weight is loaded, where the parts of a model of `config` cannot train as asked."""
    for part, flag in RATES.items():
        rate = getattr(training, flag)
        if rate is not None and part != LANGUAGE and part not in tuned_parts(arguments):
            raise InputError(
                f"--{flag} has no effect on the {part}, which does not train: give --{FLAGS[part]} True, or omit it"
            )
    if training.optim.startswith(OWN_GROUPS):
        raise InputError(
            f"--optim {training.optim.value} creates its own parameter groups: choose another, such as adamw_torch"
        )
    check_optimizer(training)
    if arguments.lora_enable:
        plan_lora(empty_model(config, training), arguments)


def empty_model(config: PretrainedConfig, training: SftArguments) -> StockModel:
    """The layers of a model of `config`, without weights. DeepSpeed is disabled, since ZeRO-3 would allocate and
    partition them."""
    unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            return StockModel(config)
    finally:
        if training.deepspeed:
            set_hf_deepspeed_config(training.hf_deepspeed_config)


def make_trainable(
    model: PreTrainedModel, arguments: ModelArguments, training: SftArguments
) -> PreTrainedModel | PeftModel:
    """`model` with the other parameters frozen; with LoRA, wrapped with adapters that are initialized from the seed."""
    if not arguments.lora_enable:
        freeze(model, arguments)
        return model
    plan = plan_lora(model, arguments)
    torch.manual_seed(training.seed)
    return AdaptedModel(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=arguments.model_name_or_path,
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=plan.adapted,
            modules_to_save=plan.full or None,
        ),
        # DeepSpeed has float32 master weights, and ZeRO-3 needs one dtype for all trained parameters.
        autocast_adapter_dtype=not training.deepspeed,
    )


def freeze(model: nn.Module, arguments: ModelArguments) -> None:
    """Freeze the parameters of the parts whose --tune flags are off. Tied embeddings belong to the language model."""
    tuned = tuned_parts(arguments)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in tuned)


class AdaptedModel(PeftModel):
    """A model with adapters that is called with the model's own arguments, and saved as a stock peft folder."""

    def __init__(self, *arguments, **options):
        with warnings.catch_warnings():
            # peft reads a property that transformers has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(*arguments, **options)
        self.eval()  # like the base, so that all layers are in the mode that `train` compares

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Trainer calls this before every forward pass. Going through all adapters takes the host several milliseconds,
        so nothing is done where the mode stays."""
        return self if mode == self.training else super().train(mode)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        embeddings = saves_embeddings(self.peft_config["default"])
        super().save_pretrained(
            save_directory, save_embedding_layers=embeddings, is_main_process=is_main_process, **kwargs
        )


def saves_embeddings(config: PeftConfig) -> bool:
    """Whether the embeddings are saved beside an adapter, which is if they have adapters. By default peft also compares
    their number with the base's config, and retries for a long time if the hub that it asks is unreachable."""
    return any(name in config.target_modules for name in EMBEDDING_LAYER_NAMES)


def parameter_groups(model: nn.Module, training: SftArguments) -> list[dict]:
    """The trained parameters by part, with its learning rate. Weight decay applies to matrices, not to norms and
    biases."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {(part, flag): [] for part in FLAGS for flag in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the shape of a partitioned parameter is that of an empty vector.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[part_of(name), len(shape) > 1].append(parameter)
    rates = {part: getattr(training, flag) for part, flag in RATES.items()}
    return [
        {
            "params": parameters,
            "lr": training.learning_rate if rates[part] is None else rates[part],
            "weight_decay": training.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in groups.items()
        if parameters  # DeepSpeed cannot partition an empty group
    ]


def make_optimizer(model: nn.Module, training: SftArguments) -> tuple[type, dict]:
    """The optimizer's class and its arguments with parameter groups, for Trainer's `optimizer_cls_and_kwargs`."""
    optimizer, settings = optimizer_of(training, model)
    return optimizer, {**settings, "params": parameter_groups(model, training)}


def describe_parts(model: nn.Module, training: SftArguments) -> str:
    """The parts that train, with their sizes and learning rates, in one line."""
    counts: dict[tuple[str, float], int] = {}
    for group in parameter_groups(model, training):
        size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in group["params"])
        counts[group["part"], group["lr"]] = counts.get((group["part"], group["lr"]), 0) + size
    return ", ".join(f"{part} {size / 1e6:.3g}M parameters at lr {rate:g}" for (part, rate), size in counts.items())
