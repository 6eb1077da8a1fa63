"""Checks of a run before weights are loaded: its arguments against the model, its processes against each other."""

import logging
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.loading import load_config
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor, make_template
from qwen_vl_streaming.model.trained import check_trained
from transformers import PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from .arguments import DataArguments, ModelArguments, check_checkpoint_layers
from .collectives import any_process
from .device import USE_CPU
from .folder import check_folder
from .param_groups import check_parts, empty_model
from .training_arguments import SftArguments

logger = logging.getLogger(__name__)

MAX_CPU_PARAMETERS = 500_000_000
"""The largest model that trains on a CPU without `--use_cpu True`."""


def check_attention(implementation: str, device: torch.device) -> None:
    """Raises InputError where the attention `implementation` cannot train on `device`."""
    if "flash" in implementation and not is_flash_attn_2_available():
        raise InputError(f"--attention {implementation} is not installed: use auto, or see requirements.txt")
    if "flex" in implementation and device.type == "cpu":
        raise InputError(f"--attention {implementation} does not train on a CPU: use auto or sdpa")


def check_same_model(model: str, sha256: str, device: torch.device) -> None:
    """Called by all processes at once; raises InputError on all of them where `model` differs between nodes."""
    (first,) = broadcast_object_list([sha256])
    if any_process(sha256 != first, device):
        raise InputError(
            f"{model} is not the same on every node: give a folder on shared storage, or download it again on each "
            "node with `hf download`"
        )


def check_same_machines(model: ModelArguments, data: DataArguments, training: SftArguments) -> None:
    """Called by all processes at once; raises InputError on all of them where their GPUs or their plans differ."""
    cuda = training.device.type == "cuda"
    zero = training.hf_deepspeed_config.config["zero_optimization"]["stage"] if training.deepspeed else None
    mine = {
        "GPU": torch.cuda.get_device_name(training.device) if cuda else "none",
        "ZeRO stage": zero,
        "--per_device_train_batch_size": training.per_device_train_batch_size,
        "--gradient_accumulation_steps": training.gradient_accumulation_steps,
        "--pack_tokens": data.pack_tokens,
        "--gradient_checkpointing": bool(training.activation_checkpointing),
        "--checkpoint_layers": model.checkpoint_layers,
        "--compile_layers": model.compile_layers,
    }
    every = gather_object([mine])
    for name, value in every[0].items():
        others = [each[name] for each in every if each[name] != value]
        if others:
            fix = "use GPUs of one kind" if name == "GPU" else "give all nodes the flags that the first one printed"
            raise InputError(f"the processes differ in {name}: {value} on the first, {others[0]} on another: {fix}")


def check_size(config: PretrainedConfig, training: SftArguments) -> None:
    """Raises InputError where a model of this `config` is too large to train on the CPU in reasonable time."""
    parameters = empty_model(config, training).num_parameters()
    if parameters > MAX_CPU_PARAMETERS:
        raise InputError(
            f"{training.cpu_message}, for which a model of {parameters / 1e6:,.0f} million parameters is too "
            f"large: train where PyTorch can use a GPU, or give {USE_CPU}"
        )


def check_arguments(model: ModelArguments, training: SftArguments, implementation: str) -> PretrainedConfig:
    """The model's config, once the arguments are known to fit it. Raises InputError, before any weight is loaded."""
    checkpoint, variant = model.model_name_or_path, model.rules
    check_folder(Path(training.output_dir), variant.name, checkpoint)
    check_attention(implementation, training.device)
    config = load_config(checkpoint)
    if not model.force:
        check_trained(config, checkpoint, variant, "--force True to continue from it anyway")
    if training.cpu_message:
        if training.cpu_is_fallback:
            check_size(config, training)
        logger.info(training.cpu_message)
    check_parts(config, model, training)
    most = config.text_config.num_hidden_layers
    check_checkpoint_layers(model.checkpoint_layers, training.activation_checkpointing, most)
    return config


def load_matching_processor(checkpoint: str, config: PretrainedConfig):
    """Raises InputError where the tokenizer of `checkpoint` and its `config` disagree."""
    processor = load_processor(checkpoint)
    if (video := make_template(processor, QUESTIONS[-1]).video) != config.video_token_id:
        raise InputError(
            f"{checkpoint} has the video token {config.video_token_id} in config.json and {video} in its tokenizer: "
            "copy the checkpoint again, with its own processor"
        )
    return processor
