"""Every flag of training, with the paper's values as defaults. Cheap mistakes are found here, before a model loads."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from qwen_vl_streaming.errors import InputError, find_path
from qwen_vl_streaming.timeline import make_schedule
from qwen_vl_streaming.variants import Variant, chosen_variant, get_variant
from qwen_vl_streaming.video import PixelBudget
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "A Qwen2.5-VL checkpoint: a folder or a hub id."}
    )
    variant: str = field(
        default_factory=lambda: chosen_variant("group"),
        metadata={"help": "One of the six variants; by default QWEN2_5_VL_VARIANT, else group."},
    )
    wait_k: int = field(default=3, metadata={"help": "Answer tokens written after each clip while training."})
    attention: str = field(
        default="auto",
        metadata={"help": "Attention of the language model: auto, sdpa, eager, flex_attention, flash_attention_2."},
    )
    tune_mm_llm: bool = field(default=True, metadata={"help": "Train the language model, embeddings included."})
    tune_mm_mlp: bool = field(default=True, metadata={"help": "Train the merger after the vision tower."})
    tune_mm_vision: bool = field(default=False, metadata={"help": "Train the vision tower."})

    def __post_init__(self):
        self.rules  # noqa: B018  an unknown variant is refused here
        if self.wait_k < 1:
            raise InputError(f"--wait_k {self.wait_k}: write at least 1 token after each clip")
        if not (self.tune_mm_llm or self.tune_mm_mlp or self.tune_mm_vision):
            raise InputError("nothing is left to train: set one of --tune_mm_llm, --tune_mm_mlp, --tune_mm_vision")
        if self.rules.parallel and "flash" in self.attention:
            raise InputError(
                f"--attention {self.attention} cannot hold the streaming mask of {self.variant}: "
                "use auto, flex_attention or sdpa"
            )
        make_schedule(self.schedule, self.rules, clips=1)

    @property
    def rules(self) -> Variant:
        return get_variant(self.variant)

    @property
    def schedule(self) -> str:
        return f"wait-{self.wait_k}"

    def implementation(self, cuda: bool) -> str:
        """The attention that `auto` stands for: FlexAttention where a GPU must hold the streaming mask."""
        if self.attention != "auto":
            return self.attention
        return "flex_attention" if cuda and self.rules.parallel else "sdpa"


@dataclass
class DataArguments:
    train_data: str = field(
        default="dataset/train_3_5.jsonl", metadata={"help": "JSON Lines that mani_data.py has made."}
    )
    min_pixels_per_frame: int = field(default=PixelBudget.min_pixels_per_frame, metadata={"help": "At least this."})
    max_pixels_per_frame: int = field(default=PixelBudget.max_pixels_per_frame, metadata={"help": "At most this."})
    max_pixels_per_video: int = field(
        default=PixelBudget.max_pixels_per_video, metadata={"help": "At most this, shared over the sampled frames."}
    )
    model_max_length: int = field(default=8192, metadata={"help": "A longer sample is left out, never cut."})
    keep_frames: bool = field(
        default=False, metadata={"help": "Keep decoded frames in memory: for data that fits and many epochs."}
    )

    def __post_init__(self):
        path = find_path(self.train_data, ROOT, "the training data")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: make it with `python mani_data.py`")
        self.train_data = str(path)

    @property
    def budget(self) -> PixelBudget:
        return PixelBudget(self.min_pixels_per_frame, self.max_pixels_per_frame, self.max_pixels_per_video)


@dataclass
class SftArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's recipe as defaults."""

    num_train_epochs: float = 1.0
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.03, metadata={"help": "Below 1: that share of all steps."})
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    bf16: bool = True
    gradient_checkpointing: bool = True
    logging_steps: float = 1
    save_steps: float = 500
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 4
    report_to: str = "tensorboard"
    remove_unused_columns: bool = field(default=False, init=False)
    max_bad_share: float = field(default=0.05, metadata={"help": "Stop when a larger share of samples is bad."})

    def __post_init__(self):
        if isinstance(self.deepspeed, str):
            path = find_path(self.deepspeed, Path(__file__).resolve().parents[1], "the DeepSpeed configuration")
            try:
                json.loads(path.read_text())
            except ValueError as error:
                raise InputError(f"{path} is not valid JSON ({error}): mend it or leave --deepspeed out") from error
            self.deepspeed = str(path)
        super().__post_init__()
