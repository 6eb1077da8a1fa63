"""Checks of transformers' own flags. transformers would accept many invalid values, and fail once a model has loaded or
silently train on something else."""

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
UPLOAD = "upload the finished checkpoint with `hf upload`"
TRACKIO = "Trackio is not supported: use --report_to tensorboard or wandb"
REFUSED = {
    "accelerator_config": f"it could change the order of the data, which resuming relies on: {OMIT}",
    "auto_find_batch_size": "the order of the data depends on it: give a --per_device_train_batch_size that fits",
    "average_tokens_across_devices": f"samples would be weighted differently on each process: {OMIT}",
    "do_eval": "set the number of samples with --eval_share or --eval_samples",
    "do_predict": "eval.sh generates captions",
    "bf16_full_eval": f"evaluation uses the precision of training: {OMIT}",
    "enable_jit_checkpoint": f"every run saves on SIGTERM already: {OMIT}",
    "fp16": "train in bfloat16 with --bf16 True, or in float32 with --bf16 False",
    "fp16_full_eval": f"evaluation uses the precision of training: {OMIT}",
    "fsdp": "DeepSpeed shards the model: use --deepspeed zero3.json",
    "fsdp_config": "DeepSpeed shards the model: use --deepspeed zero3.json",
    "ignore_data_skip": f"a resumed run must skip the data that it has seen: {OMIT}",
    "label_smoothing_factor": f"it would shift the labels by one row: {OMIT}",
    "metric_for_best_model": f"checkpoints are not selected by a metric: {OMIT}",
    "optim_target_modules": f"optimizers with their own parameter groups are not supported: {OMIT}",
    "greater_is_better": f"checkpoints are not selected by a metric: {OMIT}",
    "hub_always_push": UPLOAD,
    "hub_model_id": UPLOAD,
    "hub_private_repo": UPLOAD,
    "hub_revision": UPLOAD,
    "hub_strategy": UPLOAD,
    "hub_token": UPLOAD,
    "length_column_name": f"samples are not grouped by length: {OMIT}",
    "liger_kernel_config": f"it would replace layers that apply the streaming mask: {OMIT}",
    "project": TRACKIO,
    "push_to_hub": UPLOAD,
    "resume_from_checkpoint": "the same command resumes from the newest complete checkpoint in --output_dir",
    "save_on_each_node": f"all nodes write to one shared --output_dir: {OMIT}",
    "save_only_model": f"a run could not resume from such a checkpoint: {OMIT}",
    "torch_compile": "compile with --compile_layers True",
    "torch_compile_backend": "compile with --compile_layers True",
    "torch_compile_mode": "compile with --compile_layers True",
    "trackio_bucket_id": TRACKIO,
    "trackio_space_id": TRACKIO,
    "trackio_static_space_id": TRACKIO,
    "use_liger_kernel": f"it would replace layers that apply the streaming mask: {OMIT}",
}
"""Flags of transformers that this program does not support, and what to do instead."""
CHOICES = {
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "save_strategy": ("best",),
    "train_sampling_strategy": ("group_by_length", "batch_rebalance"),
}
"""Values that need a metric, or the length of samples that are not yet read."""
VALUE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, ImportError, OSError, NotImplementedError)
"""What transformers and DeepSpeed raise for an invalid value."""


def check_values(training: TrainingArguments) -> None:
    """Raises InputError for values that transformers would accept or fail on later."""
    for names, allowed, rule in BOUNDS:
        for name in names.split():
            value = getattr(training, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name} {value}: must be finite")
            if value is not None and not allowed(value):
                raise InputError(f"--{name} {value}: {rule}")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, reason in REFUSED.items():
        if (value := getattr(training, name)) != defaults[name]:
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


def check_optimizer(training: TrainingArguments) -> None:
    """Create the optimizer that --optim names, for one weight. Raises InputError where that fails."""
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
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
