"""The flags of training, with the paper's values as defaults. What can be checked without a model is checked here."""

import re
import warnings
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_data, find_model, find_path, find_video_root
from qwen_vl_streaming.model.prompts import END_OF_SLOT
from qwen_vl_streaming.model.trained import MODEL
from qwen_vl_streaming.timeline.timeline import MAX_PER_SLOT, make_schedule
from qwen_vl_streaming.timeline.variants import Variant, chosen_variant, get_variant
from qwen_vl_streaming.video.frames import PixelBudget
from transformers import TrainingArguments

from .argument_checks import VALUE_ERRORS, check_parsed, check_values, check_zero, one_line
from .device import choose_training_device

ROOT = Path(__file__).resolve().parents[3]
SCHEDULES = ("data", "wait", MODEL)
OUTPUT = Path(__file__).resolve().parents[1] / "output"
PAPER_SAMPLES = 16
"""Samples of a process in an optimizer step, as in the paper."""


def default_output(variant: str) -> Path:
    """Where training writes without --output_dir."""
    return OUTPUT / f"qwen2_5vl-pe-{variant}"


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
class ModelArguments:
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "A Qwen2.5-VL checkpoint: a folder or a hub id."}
    )
    variant: str = field(
        default_factory=lambda: chosen_variant("group"),
        metadata={"help": "One of the six variants. Default: QWEN2_5_VL_VARIANT, else group."},
    )
    force: bool = field(
        default=False,
        metadata={"help": "Allow continuing from a checkpoint of another variant or another position rule."},
    )
    wait_k: int = field(default=3, metadata={"help": "Answer tokens per clip in training (wait-K)."})
    schedule: str = field(
        default="data",
        metadata={
            "help": "When an answer is written. data: that of a row with `segments` as their times say, any other by "
            "wait-K. wait: all by wait-K, with the human_caption if a row has both. model: as data, and each slot ends "
            "with an end-of-slot token, so that the model learns to decide when to speak."
        },
    )
    max_tokens_per_slot: int = field(
        default=8,
        metadata={
            "help": "With the times of the data, the most answer tokens after a clip. What does not fit runs on after "
            "the next clip."
        },
    )
    end_of_slot: str = field(
        default=END_OF_SLOT,
        metadata={
            "help": "With --schedule model, the token that ends each slot but the last: one token of the vocabulary "
            "that no caption contains. A slot with --max_tokens_per_slot tokens ends without it."
        },
    )
    attention: str = field(
        default="auto",
        metadata={"help": "Attention of the language model: auto, sdpa, flex_attention, flash_attention_2."},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "Compile each layer: 1.5 times as fast on a GPU, after about a minute."},
    )
    checkpoint_layers: int | None = field(
        default=None,
        metadata={"help": "Layers of the language model that --gradient_checkpointing recomputes. Default: all."},
    )
    tune_mm_llm: bool = field(default=True, metadata={"help": "Train the language model, embeddings included."})
    tune_mm_mlp: bool = field(default=True, metadata={"help": "Train the merger that follows the vision tower."})
    tune_mm_vision: bool = field(default=False, metadata={"help": "Train the vision tower."})
    lora_enable: bool = field(
        default=False,
        metadata={
            "help": "Train LoRA adapters instead of the language model's own weights. A part that --tune_mm_mlp or "
            "--tune_mm_vision selects gets adapters if --lora_targets match some of its layers, else it trains in "
            "full. `python -m qwenvl.merge` merges the result into a complete checkpoint."
        },
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=128, metadata={"help": "Adapters are scaled by this divided by their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapters' inputs."})
    lora_targets: list[str] = field(
        default_factory=lambda: [r"language_model\..*_proj"],
        metadata={
            "help": "Linear layers that get adapters, as regular expressions for the end of their dotted names, such "
            "as q_proj v_proj. Default: those of the language model's attention and MLP."
        },
    )

    def __post_init__(self):
        self.model_name_or_path = find_model(self.model_name_or_path, ROOT)
        if Path(self.model_name_or_path).is_dir():
            self.model_name_or_path = str(Path(self.model_name_or_path).resolve())
        self.rules  # noqa: B018  raises for an unknown variant
        if self.wait_k < 1:
            raise InputError(f"--wait_k {self.wait_k}: must be at least 1")
        if self.schedule not in SCHEDULES:
            raise InputError(f"--schedule {self.schedule}: choose {', '.join(SCHEDULES)}; --wait_k sets K of wait-K")
        if self.decides and not self.rules.streams:
            raise InputError(
                f"--schedule {self.schedule}: {self.variant} writes only after the whole video: use one of interleave, "
                "overlap, group and gap"
            )
        if self.end_of_slot != END_OF_SLOT and not self.decides:
            raise InputError(
                f"--end_of_slot {self.end_of_slot} has no effect without --schedule {MODEL}: give both, or omit it"
            )
        if not 1 <= self.max_tokens_per_slot <= MAX_PER_SLOT:
            raise InputError(
                f"--max_tokens_per_slot {self.max_tokens_per_slot}: must be between 1 and {MAX_PER_SLOT:,}"
            )
        if self.checkpoint_layers is not None and self.checkpoint_layers < 1:
            raise InputError(
                f"--checkpoint_layers {self.checkpoint_layers}: must be at least 1; to recompute nothing give "
                "--gradient_checkpointing False"
            )
        if not (self.tune_mm_llm or self.tune_mm_mlp or self.tune_mm_vision):
            raise InputError("there is nothing to train: set one of --tune_mm_llm, --tune_mm_mlp, --tune_mm_vision")
        if self.attention not in ("auto", "sdpa", "flex_attention", "flash_attention_2"):
            raise InputError(f"--attention {self.attention}: choose auto, sdpa, flex_attention or flash_attention_2")
        if self.rules.parallel and "flash" in self.attention:
            raise InputError(
                f"--attention {self.attention} does not support the streaming mask of {self.variant}: "
                "use auto, flex_attention or sdpa"
            )
        for flag in fields(self) if not self.lora_enable else ():
            default = flag.default if flag.default is not MISSING else flag.default_factory()
            if flag.name.startswith("lora_") and (value := getattr(self, flag.name)) != default:
                raise InputError(
                    f"--{flag.name} {value} has no effect without adapters: give --lora_enable True, or omit it"
                )
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise InputError(f"--lora_r {self.lora_r}, --lora_alpha {self.lora_alpha}: both must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")
        for target in self.lora_targets:
            try:
                re.compile(target)
            except re.error as error:
                raise InputError(
                    f"--lora_targets {target!r} is not a regular expression ({error}): correct it"
                ) from error
        make_schedule(self.wait_schedule, self.rules, clips=1)

    @property
    def rules(self) -> Variant:
        return get_variant(self.variant)

    @property
    def wait_schedule(self) -> str:
        """The schedule of rows without times."""
        return f"wait-{self.wait_k}"

    @property
    def decides(self) -> bool:
        """Whether the model learns to end slots."""
        return self.schedule == MODEL

    @property
    def uses_times(self) -> bool:
        """Whether the `segments` of a row decide when its answer is written."""
        return self.schedule != "wait"

    def choose_attention(self, cuda: bool, packed: bool) -> str:
        """The attention implementation. `auto` is FlexAttention on a GPU where a mask is needed, for a parallel variant
        or for packed samples, else SDPA. Raises InputError where the requested one does not support the mask."""
        if packed and "flash" in self.attention:
            raise InputError(
                f"--attention {self.attention} does not support packed samples: omit --pack_tokens, or use auto, "
                "flex_attention or sdpa"
            )
        if self.attention != "auto":
            return self.attention
        return "flex_attention" if cuda and (packed or self.rules.parallel) else "sdpa"


@dataclass
class DataArguments:
    train_data: str = field(
        default="dataset/train_3_5.jsonl",
        metadata={
            "help": "JSON Lines, as mani_data.py writes them, a Parquet file or pattern, a folder of "
            "Dataset.save_to_disk, or hf://datasets/OWNER/NAME[:SPLIT], with columns video_id, video_path, "
            "human_caption or segments, and optionally question."
        },
    )
    video_root: str = field(
        default="",
        metadata={
            "help": "Folder of the videos. A video_path that does not exist as it is, or under the project's root, is "
            "looked up in this folder, then its file name alone."
        },
    )
    min_pixels_per_frame: int = field(
        default=PixelBudget.min_pixels_per_frame, metadata={"help": "Smallest size of a frame."}
    )
    max_pixels_per_frame: int = field(
        default=PixelBudget.max_pixels_per_frame, metadata={"help": "Largest size of a frame."}
    )
    max_pixels_per_video: int = field(
        default=PixelBudget.max_pixels_per_video, metadata={"help": "Pixels of all sampled frames together."}
    )
    budget: str = field(
        default=PixelBudget.budget,
        metadata={
            "help": "Frames that share --max_pixels_per_video. video: those of the video, as in the paper. stream: as "
            "many as the longest video has, so that the size of a frame does not reveal the length of the video."
        },
    )
    model_max_length: int = field(default=8192, metadata={"help": "Longer samples are skipped, never truncated."})
    pack_tokens: int = field(
        default=0, metadata={"help": "Pack the samples of a batch into rows of this many tokens; 0: a row each."}
    )
    keep_frames: bool = field(
        default=False,
        metadata={
            "help": "Cache decoded frames in memory, for several epochs over data that fits; each worker has its own."
        },
    )

    def __post_init__(self):
        self.train_data = find_data(self.train_data, ROOT, "the training data")
        folder = find_video_root(self.video_root, ROOT)
        self.video_root = str(folder.absolute()) if folder else ""
        self.pixel_budget  # noqa: B018  raises for an invalid one
        if self.model_max_length < 1:
            raise InputError(f"--model_max_length {self.model_max_length}: must be at least 1")
        if self.pack_tokens < 0:
            raise InputError(f"--pack_tokens {self.pack_tokens}: give the tokens per row, or 0 for one row per sample")

    @property
    def video_folder(self) -> Path | None:
        return Path(self.video_root) if self.video_root else None

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a sample."""
        return min(self.model_max_length, self.pack_tokens or self.model_max_length)

    @property
    def pixel_budget(self) -> PixelBudget:
        return PixelBudget(**{field.name: getattr(self, field.name) for field in fields(PixelBudget)})


@dataclass
class SftArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's recipe as defaults."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Default: output/qwen2_5vl-pe-<variant> in code/qwen-vl-finetune."}
    )
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-5
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the merger. Default: --learning_rate."}
    )
    vision_tower_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: --learning_rate."}
    )
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Forward passes of an optimizer step. Default: as many as give {PAPER_SAMPLES} samples a process; "
            "a run that resumes keeps its own."
        },
    )
    bf16: bool = field(
        default=True, metadata={"help": "Train in bfloat16, else in float32. sft.sh sets False on a CPU."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )
    logging_steps: float = 1
    save_steps: float = 500
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of newest checkpoints to keep; 0: all."})
    dataloader_num_workers: int = 4
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Keep the workers between epochs; default: with --keep_frames True only."}
    )
    report_to: str = field(
        default="tensorboard", metadata={"help": "wandb adds Weights & Biases to TensorBoard; none disables both."}
    )
    remove_unused_columns: bool = field(default=False, init=False)
    load_best_model_at_end: bool = field(default=False, init=False)
    logging_nan_inf_filter: bool = field(default=False, init=False)
    eval_share: float = field(
        default=0.0, metadata={"help": "Share of the samples to hold out for evaluation every --eval_steps."}
    )
    eval_samples: int = field(default=0, metadata={"help": "Number of samples to hold out, by whole videos."})
    max_bad_share: float = field(
        default=0.05, metadata={"help": "Stop with an error when a larger share of the samples is bad."}
    )

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
            path = find_path(self.deepspeed, ROOT, "the DeepSpeed configuration", Path(__file__).resolve().parents[1])
            check_zero(path)
            self.deepspeed = str(path)
        if self.eval_share or self.eval_samples:
            if self.eval_strategy == "no":
                self.eval_strategy, self.eval_steps = "steps", self.eval_steps or self.save_steps
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
        if default_folder:
            self.output_dir = None  # set in `parse`, where the variant is known; transformers sets another
        check_parsed(self)
