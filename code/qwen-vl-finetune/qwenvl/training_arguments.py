"""The flags of a training run: transformers' TrainingArguments, with the paper's recipe as defaults."""

import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import PROJECT, find_path
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from .argument_checks import VALUE_ERRORS, check_parsed, check_values, check_zero, one_line
from .device import choose_training_device

FINETUNE = Path(__file__).resolve().parents[1]
PAPER_SAMPLES = 16
"""Samples of a process in an optimizer step, as in the paper."""


def default_output(variant: str) -> Path:
    """Where training writes without --output_dir."""
    return FINETUNE / "output" / f"qwen2_5vl-pe-{variant}"


def find_deepspeed(path: str) -> Path:
    """The file that --deepspeed names. Raises InputError where there is none."""
    return find_path(path, PROJECT, "the DeepSpeed configuration", FINETUNE)


def accumulation_steps(batch_size: int) -> int:
    """Forward passes of an optimizer step, each with `batch_size` samples, where --gradient_accumulation_steps is not
    given: those of PAPER_SAMPLES samples. Raises InputError where they do not divide evenly."""
    if PAPER_SAMPLES % batch_size:
        raise InputError(
            f"--per_device_train_batch_size {batch_size} does not divide the {PAPER_SAMPLES} samples of a step: "
            "give --gradient_accumulation_steps too, or another"
        )
    return PAPER_SAMPLES // batch_size


@dataclass
class SftArguments(TrainingArguments):
    output_dir: str | None = HfArg(
        default=None, help="Default: output/qwen2_5vl-pe-<variant> in code/qwen-vl-finetune."
    )
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-5
    mm_projector_lr: float | None = HfArg(default=None, help="Learning rate of the merger. Default: --learning_rate.")
    vision_tower_lr: float | None = HfArg(
        default=None, help="Learning rate of the vision tower. Default: --learning_rate."
    )
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = HfArg(default=0.03, help="Steps of warm-up; below 1, a share of all steps.")
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int | None = HfArg(
        default=None,
        help=f"Forward passes of an optimizer step. Default: as many as give {PAPER_SAMPLES} samples a process; "
        "a run that resumes keeps its own.",
    )
    bf16: bool = HfArg(default=True, help="Train in bfloat16, else in float32. sft.sh sets False on a CPU.")
    gradient_checkpointing: bool = HfArg(
        default=True, help="Recompute activations in the backward pass: less memory, slower."
    )
    logging_steps: float = 1
    save_steps: float = 500
    save_total_limit: int | None = HfArg(default=2, help="Number of newest checkpoints to keep; 0: all.")
    dataloader_num_workers: int = 4
    dataloader_prefetch_factor: int | None = HfArg(
        default=None,
        help="Batches that each data worker reads ahead. Default: those of an optimizer step in all, at least 2 each.",
    )
    dataloader_persistent_workers: bool | None = HfArg(
        default=None, help="Keep the workers between epochs; default: with --keep_frames True only."
    )
    report_to: str = HfArg(
        default="tensorboard", help="wandb adds Weights & Biases to TensorBoard; none disables both."
    )
    remove_unused_columns: bool = field(default=False, init=False)
    load_best_model_at_end: bool = field(default=False, init=False)
    logging_nan_inf_filter: bool = field(default=False, init=False)
    eval_steps: float | None = HfArg(
        default=None,
        help="Optimizer steps between measurements of the held-out loss. Default: --save_steps, or each epoch with "
        "--save_strategy epoch.",
    )
    eval_share: float = HfArg(default=0.0, help="Share of the samples to hold out for evaluation every --eval_steps.")
    eval_samples: int = HfArg(default=0, help="Number of samples to hold out, by whole videos.")
    max_bad_share: float = HfArg(default=0.05, help="Stop with an error when a larger share of the samples is bad.")

    def __post_init__(self):
        check_values(self)
        if self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = accumulation_steps(self.per_device_train_batch_size)
        self.cpu_is_fallback = not self.use_cpu  # then large models are refused
        self.cpu_message = choose_training_device(self)
        if self.output_dir is not None and not self.output_dir.strip():
            raise InputError("--output_dir is empty: give a folder, or omit it")
        default_folder = self.output_dir is None
        if isinstance(self.deepspeed, str):
            path = find_deepspeed(self.deepspeed)
            check_zero(path)
            self.deepspeed = str(path)
        if self.eval_share or self.eval_samples:
            if self.eval_strategy == "no":
                with_epochs = self.save_strategy == "epoch" and self.eval_steps is None
                self.eval_strategy = "epoch" if with_epochs else "steps"
            self.eval_steps = self.eval_steps or self.save_steps
        elif self.eval_strategy != "no" or self.eval_on_start:
            raise InputError("evaluation needs held-out samples: give --eval_share or --eval_samples")
        reporters = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        for name in reporters:
            if name not in ("tensorboard", "wandb", "none"):
                raise InputError(f"--report_to {name}: choose tensorboard, wandb or none")
            if name != "none" and find_spec(name) is None:
                raise InputError(f"--report_to {name} is not installed: pip install {name}, or omit it")
        self.report_to = "none" if "none" in reporters else sorted({"tensorboard", *reporters})
        try:
            with warnings.catch_warnings():
                # transformers has renamed --gradient_checkpointing, and removes the old name in its next version.
                warnings.simplefilter("ignore", FutureWarning)
                super().__post_init__()
        except VALUE_ERRORS as error:
            raise InputError(f"the training flags are invalid ({one_line(error)}): correct them") from error
        if self.deepspeed:
            # DeepSpeed's throughput timer makes the host wait for the GPU twice in each pass.
            self.hf_deepspeed_config.config.setdefault("timers", {"throughput": {"enabled": False}})
        if default_folder:
            self.output_dir = None  # set in `parse`, where the variant is known; transformers sets another
        check_parsed(self)
