"""Checks of transformers' own flags. transformers would accept many invalid values, and fail once a model has loaded or
silently train on something else."""

import dataclasses
import json
import math
import os
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from qwen_vl_streaming.common.errors import InputError
from torch import nn
from transformers import TrainingArguments, get_scheduler

BOUNDS = (
    (
        "num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "logging_steps save_steps eval_steps dataloader_prefetch_factor ddp_timeout torch_empty_cache_steps",
        lambda value: value > 0,
        "must be above 0",
    ),
    (
        "learning_rate mm_projector_lr vision_tower_lr warmup_steps weight_decay adam_epsilon max_grad_norm eval_delay "
        "eval_samples dataloader_num_workers save_total_limit neftune_noise_alpha",
        lambda value: value >= 0,
        "must be at least 0",
    ),
    (
        "logging_steps save_steps eval_steps warmup_steps",
        lambda value: value < 1 or value == int(value),
        "must be a whole number of steps, or a share of all steps below 1",
    ),
    ("adam_beta1 adam_beta2 eval_share", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("max_bad_share", lambda value: 0 <= value <= 1, "must be between 0 and 1"),
    ("seed data_seed", lambda value: 0 <= value < 2**32, "must be between 0 and 2**32 - 1"),
    ("max_steps", lambda value: value == -1 or value > 0, "must be above 0; omit it to use --num_train_epochs"),
)
OMIT = "omit it"
REASONS = {
    f"it could change the order of the data, which resuming relies on: {OMIT}": "accelerator_config",
    "the order of the data depends on it: give a --per_device_train_batch_size that fits": "auto_find_batch_size",
    f"samples would be weighted differently on each process: {OMIT}": "average_tokens_across_devices",
    "set the number of samples with --eval_share or --eval_samples": "do_eval",
    "eval.sh generates captions": "do_predict",
    f"evaluation uses the precision of training: {OMIT}": "bf16_full_eval fp16_full_eval",
    f"every run saves on SIGTERM already: {OMIT}": "enable_jit_checkpoint",
    "train in bfloat16 with --bf16 True, or in float32 with --bf16 False": "fp16",
    "DeepSpeed shards the model: use --deepspeed zero3.json": "fsdp fsdp_config",
    f"a resumed run must skip the data that it has seen: {OMIT}": "ignore_data_skip",
    f"it would shift the labels by one row: {OMIT}": "label_smoothing_factor",
    f"checkpoints are not selected by a metric: {OMIT}": "metric_for_best_model greater_is_better",
    f"optimizers with their own parameter groups are not supported: {OMIT}": "optim_target_modules",
    "upload the finished checkpoint with `hf upload`": (
        "push_to_hub hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token"
    ),
    f"samples are not grouped by length: {OMIT}": "length_column_name",
    f"it would replace layers that apply the streaming mask: {OMIT}": "use_liger_kernel liger_kernel_config",
    "the same command resumes from the newest complete checkpoint in --output_dir": "resume_from_checkpoint",
    f"all nodes write to one shared --output_dir: {OMIT}": "save_on_each_node",
    f"a run could not resume from such a checkpoint: {OMIT}": "save_only_model",
    "compile with --compile_layers True": "torch_compile torch_compile_backend torch_compile_mode",
    "Trackio is not supported: use --report_to tensorboard or wandb": (
        "project trackio_bucket_id trackio_space_id trackio_static_space_id"
    ),
}
"""Why this program does not support flags of transformers, or what to do instead, with their names."""
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}
CHOICES = {
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "save_strategy": ("best",),
    "train_sampling_strategy": ("group_by_length", "batch_rebalance"),
}
"""Values that need a metric, or the length of samples that are not yet read."""
VALUE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError, NotImplementedError)
"""What transformers and DeepSpeed raise for an invalid value."""


def defaults(group) -> dict[str, Any]:
    """The default of each field of a dataclass."""
    return {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in dataclasses.fields(group)
    }


def check_values(training: TrainingArguments) -> None:
    """Raises InputError for values that transformers would accept or fail on later."""
    for names, allowed, rule in BOUNDS:
        for name in names.split():
            value = getattr(training, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name} {value}: must be finite")
            if value is not None and not allowed(value):
                raise InputError(f"--{name} {value}: {rule}")
    stock = defaults(TrainingArguments)
    for name, reason in REFUSED.items():
        if (value := getattr(training, name)) != stock[name]:
            raise InputError(f"--{name} {value}: {reason}")
    for name, refused in CHOICES.items():
        value = getattr(training, name)
        if value in refused:
            raise InputError(f"--{name} {getattr(value, 'value', value)} is not supported: choose another")
    if training.dataloader_persistent_workers and not training.dataloader_num_workers:
        raise InputError("--dataloader_persistent_workers True: set --dataloader_num_workers above 0")


def keep_workers(training: TrainingArguments, keep_frames: bool) -> None:
    """Keep the workers between epochs by default where they keep frames. Raises InputError if they must not be kept."""
    if keep_frames and training.dataloader_num_workers and training.dataloader_persistent_workers is False:
        raise InputError(
            "--keep_frames True keeps frames in the workers, which end with each epoch by "
            "--dataloader_persistent_workers False: omit one of them"
        )
    if training.dataloader_persistent_workers is None:
        training.dataloader_persistent_workers = keep_frames and training.dataloader_num_workers > 0


def check_parsed(training: TrainingArguments) -> None:
    """Raises InputError for values that transformers has parsed and would fail on later."""
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if isinstance(value := getattr(training, name), str):
            raise InputError(f"--{name} {value}: give a JSON object, such as '{{\"name\": 1}}'")
    if training.deepspeed and training.lr_scheduler_type == "polynomial":
        raise InputError("--lr_scheduler_type polynomial is not supported with DeepSpeed: choose another")
    if training.deepspeed and (conflicts := training.hf_deepspeed_config.mismatches):
        raise InputError(f'{training.deepspeed} contradicts the flags ({" ".join(conflicts)}): use "auto" there')
    weight = nn.Parameter(torch.zeros(1))
    try:
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([weight]),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except VALUE_ERRORS as error:
        raise InputError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} is invalid ({one_line(error)}): "
            "correct --lr_scheduler_kwargs, or choose another"
        ) from error


def optimizer_of(training: TrainingArguments, model: nn.Module | None = None) -> tuple[type, dict[str, Any]]:
    """The class of the optimizer that --optim names, and its arguments."""
    from transformers import Trainer  # imports datasets and pandas, which the planner does not wait for

    return Trainer.get_optimizer_cls_and_kwargs(training, model)


def check_optimizer(training: TrainingArguments) -> None:
    """Create the optimizer that --optim names, for one weight. Raises InputError where that fails."""
    try:
        kind, settings = optimizer_of(training)
        kind([nn.Parameter(torch.zeros(1))], **settings)
    except (*VALUE_ERRORS, RuntimeError) as error:
        raise InputError(
            f"--optim {training.optim.value} is invalid ({one_line(error)}): "
            "correct --optim_args, or choose another such as adamw_torch"
        ) from error


def check_zero(path: Path) -> None:
    """Raises InputError for a DeepSpeed configuration that DeepSpeed or this program does not support."""
    try:
        zero = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): correct it, or omit --deepspeed") from error
    if not isinstance(zero, dict) or not isinstance(zero.get("zero_optimization"), dict):
        raise InputError(f"{path} has no zero_optimization: see zero2.json and zero3.json")
    if "optimizer" in zero:
        raise InputError(f"{path} sets an optimizer, which would ignore the learning rates of the parts: use --optim")
    if "scheduler" in zero:
        raise InputError(f"{path} sets a scheduler: use --lr_scheduler_type")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        settings = DeepSpeedZeroConfig(**zero["zero_optimization"])
    except VALUE_ERRORS as error:
        raise InputError(f"{path}: zero_optimization is invalid ({one_line(error)}): correct it") from error
    if settings.stage == 3 and not settings.gather_16bit_weights_on_model_save:
        raise InputError(
            f"{path} would not save the model: set stage3_gather_16bit_weights_on_model_save to true there"
        )
    if "RANK" not in os.environ:
        raise InputError("--deepspeed needs a distributed launch: start training with scripts/sft.sh")


def one_line(error: Exception) -> str:
    """The message of an error, without line breaks, shortened."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else f"{message[:300]} ..."
