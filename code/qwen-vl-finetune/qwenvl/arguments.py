"""Every flag of training, with the paper's values as defaults. Cheap mistakes are found here, before a model loads."""

import re
import warnings
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_data, find_folder, find_model, find_path
from qwen_vl_streaming.timeline.timeline import make_schedule
from qwen_vl_streaming.timeline.variants import Variant, chosen_variant, get_variant
from qwen_vl_streaming.video.frames import PixelBudget
from transformers import TrainingArguments

from .argument_checks import MISTAKES, check_after, check_values, check_zero, one_line
from .device import settle_device

ROOT = Path(__file__).resolve().parents[3]
OUTPUT = Path(__file__).resolve().parents[1] / "output"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "A Qwen2.5-VL checkpoint: a folder or a hub id."}
    )
    variant: str = field(
        default_factory=lambda: chosen_variant("group"),
        metadata={"help": "One of the six variants; by default QWEN2_5_VL_VARIANT, else group."},
    )
    force: bool = field(
        default=False,
        metadata={
            "help": "Continue from a checkpoint that was trained as another variant or under another position rule."
        },
    )
    wait_k: int = field(default=3, metadata={"help": "Answer tokens written after each clip while training."})
    attention: str = field(
        default="auto",
        metadata={"help": "Attention of the language model: auto, sdpa, flex_attention, flash_attention_2."},
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "Compile each layer: 1.5 times as fast on a GPU after a minute's start. Not under ZeRO-3."},
    )
    tune_mm_llm: bool = field(default=True, metadata={"help": "Train the language model, embeddings included."})
    tune_mm_mlp: bool = field(default=True, metadata={"help": "Train the merger after the vision tower."})
    tune_mm_vision: bool = field(default=False, metadata={"help": "Train the vision tower."})
    lora_enable: bool = field(
        default=False,
        metadata={
            "help": "Train adapters (LoRA) in place of the language model's own weights. The other parts that "
            "--tune_mm_mlp and --tune_mm_vision choose get adapters where --lora_targets name layers of theirs, "
            "else they train in full. `python -m qwenvl.merge` makes a complete checkpoint of the result."
        },
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=128, metadata={"help": "Adapters are scaled by this over their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of an adapter's inputs that is dropped."})
    lora_targets: list[str] = field(
        default_factory=lambda: [r"language_model\..*_proj"],
        metadata={
            "help": "Linear layers that get adapters: ends of their dotted names, as regular expressions, such as "
            "q_proj v_proj; by default those of the language model's attention and MLP."
        },
    )

    def __post_init__(self):
        self.model_name_or_path = find_model(self.model_name_or_path, ROOT)
        if Path(self.model_name_or_path).is_dir():
            self.model_name_or_path = str(Path(self.model_name_or_path).resolve())
        self.rules  # noqa: B018  an unknown variant is refused here
        if self.wait_k < 1:
            raise InputError(f"--wait_k {self.wait_k}: write at least 1 token after each clip")
        if not (self.tune_mm_llm or self.tune_mm_mlp or self.tune_mm_vision):
            raise InputError("nothing is left to train: set one of --tune_mm_llm, --tune_mm_mlp, --tune_mm_vision")
        if self.attention not in ("auto", "sdpa", "flex_attention", "flash_attention_2"):
            raise InputError(f"--attention {self.attention}: choose auto, sdpa, flex_attention or flash_attention_2")
        if self.rules.parallel and "flash" in self.attention:
            raise InputError(
                f"--attention {self.attention} cannot hold the streaming mask of {self.variant}: "
                "use auto, flex_attention or sdpa"
            )
        for flag in fields(self) if not self.lora_enable else ():
            default = flag.default if flag.default is not MISSING else flag.default_factory()
            if flag.name.startswith("lora_") and (value := getattr(self, flag.name)) != default:
                raise InputError(f"--{flag.name} {value} is for adapters: give --lora_enable True, or leave it out")
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise InputError(f"--lora_r {self.lora_r}, --lora_alpha {self.lora_alpha}: both must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout {self.lora_dropout}: give a share from 0 up to, not including, 1")
        for target in self.lora_targets:
            try:
                re.compile(target)
            except re.error as error:
                raise InputError(f"--lora_targets {target!r} is no regular expression: {error}") from error
        make_schedule(self.schedule, self.rules, clips=1)

    @property
    def rules(self) -> Variant:
        return get_variant(self.variant)

    @property
    def schedule(self) -> str:
        return f"wait-{self.wait_k}"

    def implementation(self, cuda: bool, packed: bool) -> str:
        """The attention that `auto` stands for: FlexAttention where a GPU must hold a mask, the streaming one or that
        which keeps packed samples apart. Raises InputError where the one that was asked for cannot."""
        if packed and "flash" in self.attention:
            raise InputError(
                f"--attention {self.attention} cannot keep packed samples apart: "
                "leave --pack_tokens out, or use auto, flex_attention or sdpa"
            )
        if self.attention != "auto":
            return self.attention
        return "flex_attention" if cuda and (packed or self.rules.parallel) else "sdpa"


@dataclass
class DataArguments:
    train_data: str = field(
        default="dataset/train_3_5.jsonl", metadata={"help": "JSON Lines that mani_data.py has made."}
    )
    video_root: str = field(
        default="",
        metadata={
            "help": "Folder of the videos: a video_path that is neither there as it is nor under the project's root is "
            "looked up under this, then its file name alone."
        },
    )
    min_pixels_per_frame: int = field(default=PixelBudget.min_pixels_per_frame, metadata={"help": "At least this."})
    max_pixels_per_frame: int = field(default=PixelBudget.max_pixels_per_frame, metadata={"help": "At most this."})
    max_pixels_per_video: int = field(
        default=PixelBudget.max_pixels_per_video, metadata={"help": "At most this, shared over the sampled frames."}
    )
    budget: str = field(
        default=PixelBudget.budget,
        metadata={
            "help": "Which frames share --max_pixels_per_video. video: those that the video has, as in the paper. "
            "stream: always as many as the longest video has, so that no frame tells how long the video will be."
        },
    )
    model_max_length: int = field(default=8192, metadata={"help": "A longer sample is left out, never cut."})
    pack_tokens: int = field(
        default=0, metadata={"help": "Lay a batch's samples end to end in rows of this many tokens; 0: a row each."}
    )
    keep_frames: bool = field(
        default=False, metadata={"help": "Keep decoded frames in memory: for data that fits and many epochs."}
    )

    def __post_init__(self):
        self.train_data = str(find_data(self.train_data, ROOT, "the training data"))
        folder = find_folder(self.video_root, ROOT, "the video root")
        self.video_root = str(folder.absolute()) if folder else ""
        self.pixel_budget  # noqa: B018  a wrong one is refused here
        if self.model_max_length < 1:
            raise InputError(f"--model_max_length {self.model_max_length}: give the tokens that a sample may have")
        if self.pack_tokens < 0:
            raise InputError(f"--pack_tokens {self.pack_tokens}: give the tokens of a row, or 0 for a row a sample")

    @property
    def video_folder(self) -> Path | None:
        return Path(self.video_root) if self.video_root else None

    @property
    def longest(self) -> int:
        """Tokens that a sample may have."""
        return min(self.model_max_length, self.pack_tokens or self.model_max_length)

    @property
    def pixel_budget(self) -> PixelBudget:
        return PixelBudget(**{field.name: getattr(self, field.name) for field in fields(PixelBudget)})


@dataclass
class SftArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's recipe as defaults."""

    output_dir: str | None = field(
        default=None, metadata={"help": "By default output/qwen2_5vl-pe-<variant> in code/qwen-vl-finetune."}
    )
    num_train_epochs: float = 1.0
    learning_rate: float = 2e-5
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the merger; by default --learning_rate."}
    )
    vision_tower_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; by default --learning_rate."}
    )
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.03, metadata={"help": "Below 1: that share of all steps."})
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    bf16: bool = field(default=True, metadata={"help": "Train in bfloat16, else in float32, as sft.sh does on a CPU."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute activations again for the backward pass: less memory, slower."}
    )
    logging_steps: float = 1
    save_steps: float = 500
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep this many checkpoints, the newest; 0: all."}
    )
    dataloader_num_workers: int = 4
    report_to: str = field(default="tensorboard", metadata={"help": "wandb: that as well; none: not even TensorBoard."})
    remove_unused_columns: bool = field(default=False, init=False)
    load_best_model_at_end: bool = field(default=False, init=False)
    logging_nan_inf_filter: bool = field(default=False, init=False)
    eval_share: float = field(default=0.0, metadata={"help": "Hold out this share of the videos for --eval_steps."})
    eval_samples: int = field(default=0, metadata={"help": "Hold out samples of videos until there are this many."})
    max_bad_share: float = field(default=0.05, metadata={"help": "Stop when a larger share of samples is bad."})

    def __post_init__(self):
        check_values(self)
        self.cpu_by_itself = not self.use_cpu  # then a model that is too large for it is refused
        self.cpu_line = settle_device(self)
        if self.output_dir is not None and not self.output_dir.strip():
            raise InputError("--output_dir is empty: name a folder, or leave it out")
        no_folder = self.output_dir is None
        if isinstance(self.deepspeed, str):
            path = find_path(self.deepspeed, ROOT, "the DeepSpeed configuration", Path(__file__).resolve().parents[1])
            check_zero(path)
            self.deepspeed = str(path)
        if self.eval_share or self.eval_samples:
            if self.eval_strategy == "no":
                self.eval_strategy, self.eval_steps = "steps", self.eval_steps or self.save_steps
        elif self.eval_strategy != "no" or self.eval_on_start:
            raise InputError("evaluation needs held-out samples: give --eval_share or --eval_samples")
        named = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        for name in named:
            if name not in ("tensorboard", "wandb", "none"):
                raise InputError(f"--report_to {name}: choose tensorboard, wandb or none")
            if name != "none" and find_spec(name) is None:
                raise InputError(f"--report_to {name}: it is not installed; pip install {name}, or leave it out")
        self.report_to = "none" if "none" in named else sorted({"tensorboard", *named})
        try:
            with warnings.catch_warnings():
                # --gradient_checkpointing has a new name in transformers, and is there until its next version.
                warnings.simplefilter("ignore", FutureWarning)
                super().__post_init__()
        except MISTAKES as error:
            raise InputError(f"the training flags cannot be used: {one_line(error)}") from error
        if no_folder:
            self.output_dir = None  # set where the variant is known, in place of transformers' own default
        check_after(self)
