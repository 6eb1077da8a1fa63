"""What transformers' own flags may be: it would take much of this, and trip over it once a model has loaded, or train
on something else than was asked without a word. Knows nothing of this program's own flags but their names."""

import dataclasses
import json
import math
import os
from pathlib import Path

import torch
from qwen_vl_streaming.common.errors import InputError
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

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
        "cannot be below 0",
    ),
    (
        "logging_steps save_steps eval_steps warmup_steps",
        lambda value: value < 1 or value == int(value),
        "must be a whole number of steps, or below 1 a share of all steps",
    ),
    ("adam_beta1 adam_beta2 eval_share", lambda value: 0 <= value < 1, "must be from 0 up to, not including, 1"),
    ("max_bad_share", lambda value: 0 <= value <= 1, "must be a share from 0 to 1"),
    ("seed data_seed", lambda value: 0 <= value < 2**32, "must be from 0 to 2**32 - 1"),
    ("max_steps", lambda value: value == -1 or value > 0, "must be above 0; leave it out for --num_train_epochs"),
)
LEAVE = "leave it out"
UPLOAD = "upload the finished checkpoint with `hf upload`"
TRACKIO = "it is for Trackio: log with --report_to tensorboard or wandb"
REFUSED = {
    "accelerator_config": f"it could change the order of data, which a run that goes on relies on: {LEAVE}",
    "auto_find_batch_size": "the order of data hangs on the batch: name a --per_device_train_batch_size that fits",
    "average_tokens_across_devices": f"samples would weigh more on one process than on another: {LEAVE}",
    "do_eval": "say on how many samples with --eval_share or --eval_samples",
    "do_predict": "captions are written by eval.sh",
    "bf16_full_eval": f"held-out samples are measured in the numbers of training: {LEAVE}",
    "enable_jit_checkpoint": f"SIGTERM has every run save as it is: {LEAVE}",
    "fp16": "train in bfloat16 with --bf16 True, or in float32 with --bf16 False",
    "fp16_full_eval": f"held-out samples are measured in the numbers of training: {LEAVE}",
    "fsdp": "weights are split by DeepSpeed: --deepspeed zero3.json",
    "fsdp_config": "weights are split by DeepSpeed: --deepspeed zero3.json",
    "ignore_data_skip": f"a run that goes on must see the data that are left: {LEAVE}",
    "label_smoothing_factor": f"it would take each label for that of the row before: {LEAVE}",
    "metric_for_best_model": f"no checkpoint is chosen by a metric: {LEAVE}",
    "optim_target_modules": f"it is for optimizers that make their own parameter groups: {LEAVE}",
    "greater_is_better": f"no checkpoint is chosen by a metric: {LEAVE}",
    "hub_always_push": UPLOAD,
    "hub_model_id": UPLOAD,
    "hub_private_repo": UPLOAD,
    "hub_revision": UPLOAD,
    "hub_strategy": UPLOAD,
    "hub_token": UPLOAD,
    "length_column_name": f"samples are not grouped by length: {LEAVE}",
    "liger_kernel_config": f"it would replace layers that hold the streaming mask: {LEAVE}",
    "project": TRACKIO,
    "push_to_hub": UPLOAD,
    "resume_from_checkpoint": "the same command goes on from the newest whole checkpoint in --output_dir",
    "save_on_each_node": f"all machines write to one --output_dir: {LEAVE}",
    "save_only_model": f"no run could go on from such a checkpoint: {LEAVE}",
    "torch_compile": "compile with --compile_layers True",
    "torch_compile_backend": "compile with --compile_layers True",
    "torch_compile_mode": "compile with --compile_layers True",
    "trackio_bucket_id": TRACKIO,
    "trackio_space_id": TRACKIO,
    "trackio_static_space_id": TRACKIO,
    "use_liger_kernel": f"it would replace layers that hold the streaming mask: {LEAVE}",
}
"""Flags of transformers that this program cannot do right, and why."""
CHOICES = {
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "save_strategy": ("best",),
    "train_sampling_strategy": ("group_by_length", "batch_rebalance"),
}
"""Choices that need what this program does not give: a metric, or lengths of samples that are not yet read."""
MISTAKES = (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError, NotImplementedError)
"""What transformers and DeepSpeed raise for a wrong value."""


def check_values(training: TrainingArguments) -> None:
    """Refuse values before transformers sees them. Raises InputError."""
    for names, allowed, words in BOUNDS:
        for name in names.split():
            value = getattr(training, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name} {value}: give a finite number")
            if value is not None and not allowed(value):
                raise InputError(f"--{name} {value}: {words}")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, reason in REFUSED.items():
        if (value := getattr(training, name)) != defaults[name]:
            raise InputError(f"--{name} {value}: {reason}")
    for name, refused in CHOICES.items():
        value = getattr(training, name)
        if value in refused:
            raise InputError(f"--{name} {getattr(value, 'value', value)} does not work here: choose another")
    if training.dataloader_persistent_workers and not training.dataloader_num_workers:
        raise InputError("--dataloader_persistent_workers True: give --dataloader_num_workers above 0")


def check_after(training: TrainingArguments) -> None:
    """Refuse what transformers has taken and would trip over later. Raises InputError."""
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if isinstance(value := getattr(training, name), str):
            raise InputError(f"--{name} {value}: give a JSON object, such as '{{\"name\": 1}}'")
    if training.deepspeed and training.lr_scheduler_type == "polynomial":
        raise InputError("--lr_scheduler_type polynomial does not work under DeepSpeed: choose another")
    if training.deepspeed and (wrong := training.hf_deepspeed_config.mismatches):
        raise InputError(f'{training.deepspeed} is against the flags ({" ".join(wrong)}): say "auto" there')
    weight = nn.Parameter(torch.zeros(1))
    try:
        get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([weight]),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except MISTAKES as error:
        raise InputError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} cannot be made ({one_line(error)}): "
            "mend --lr_scheduler_kwargs, or choose another"
        ) from error


def check_optimizer(training: TrainingArguments) -> None:
    """Make the optimizer that --optim names for one weight. Raises InputError where it cannot be made."""
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
        kind([nn.Parameter(torch.zeros(1))], **settings)
    except (*MISTAKES, RuntimeError) as error:
        raise InputError(
            f"--optim {training.optim.value} cannot be made ({one_line(error)}): "
            "mend --optim_args, or choose another such as adamw_torch"
        ) from error


def check_zero(path: Path) -> None:
    """Refuse a DeepSpeed configuration that DeepSpeed or the training program cannot take. Raises InputError."""
    try:
        zero = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): mend it or leave --deepspeed out") from error
    if not isinstance(zero, dict) or not isinstance(zero.get("zero_optimization"), dict):
        raise InputError(f"{path} has no zero_optimization: take zero2.json or zero3.json as a pattern")
    if "optimizer" in zero:
        raise InputError(f"{path} names an optimizer, which would train all parts alike: leave it to --optim")
    if "scheduler" in zero:
        raise InputError(f"{path} names a scheduler: leave it to --lr_scheduler_type")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        settings = DeepSpeedZeroConfig(**zero["zero_optimization"])
    except MISTAKES as error:
        raise InputError(f"{path}: zero_optimization is wrong ({one_line(error)}): mend it") from error
    if settings.stage == 3 and not settings.gather_16bit_weights_on_model_save:
        raise InputError(f"{path} would save no model: set stage3_gather_16bit_weights_on_model_save to true there")
    if "RANK" not in os.environ:
        raise InputError("--deepspeed needs processes that know of each other: start them with scripts/sft.sh")


def one_line(error: Exception, most: int = 300) -> str:
    """What an error says, without its line breaks."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} ..."
