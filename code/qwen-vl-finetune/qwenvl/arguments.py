"""The flags of the model and of the data. What can be checked without a model is checked here."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import PROJECT, find_data, find_model, find_video_root
from qwen_vl_streaming.model.prompts import END_OF_SLOT
from qwen_vl_streaming.model.trained import MODEL
from qwen_vl_streaming.timeline.timeline import MAX_PER_SLOT
from qwen_vl_streaming.timeline.variants import Variant, chosen_variant, get_variant
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from transformers.hf_argparser import HfArg

from .argument_checks import defaults

SCHEDULES = ("data", "wait", MODEL)
ATTENTIONS = ("auto", "sdpa", "flex_attention", "flash_attention_2")


@dataclass
class ModelArguments:
    model_name_or_path: str = HfArg(
        default="Qwen/Qwen2.5-VL-3B-Instruct", help="A Qwen2.5-VL checkpoint: a folder or a hub id."
    )
    variant: str = HfArg(
        default_factory=lambda: chosen_variant("group"),
        help="One of the six variants. Default: QWEN2_5_VL_VARIANT, else group.",
    )
    force: bool = HfArg(
        default=False, help="Allow continuing from a checkpoint of another variant or another position rule."
    )
    wait_k: int = HfArg(default=3, help="Answer tokens per clip in training (wait-K).")
    schedule: str = HfArg(
        default="data",
        help="When an answer is written. data: that of a row with `segments` as their times say, any other by "
        "wait-K. wait: all by wait-K, with the human_caption if a row has both. model: as data, and each slot ends "
        "with an end-of-slot token, so that the model learns to decide when to speak.",
    )
    max_tokens_per_slot: int = HfArg(
        default=8,
        help="With the times of the data, the most answer tokens after a clip. What does not fit runs on after "
        "the next clip.",
    )
    end_of_slot: str = HfArg(
        default=END_OF_SLOT,
        help="With --schedule model, the token that ends each slot but the last: one token of the vocabulary "
        "that no caption contains. A slot with --max_tokens_per_slot tokens ends without it.",
    )
    attention: str = HfArg(
        default="auto", help="Attention of the language model: auto, sdpa, flex_attention, flash_attention_2."
    )
    compile_layers: bool = HfArg(
        default=False, help="Compile each layer: 1.5 times as fast on a GPU, after about a minute."
    )
    checkpoint_layers: int | None = HfArg(
        default=None, help="Layers of the language model that --gradient_checkpointing recomputes. Default: all."
    )
    tune_mm_llm: bool = HfArg(default=True, help="Train the language model, embeddings included.")
    tune_mm_mlp: bool = HfArg(default=True, help="Train the merger that follows the vision tower.")
    tune_mm_vision: bool = HfArg(default=False, help="Train the vision tower.")
    lora_enable: bool = HfArg(
        default=False,
        help="Train LoRA adapters instead of the language model's own weights. A part that --tune_mm_mlp or "
        "--tune_mm_vision selects gets adapters if --lora_targets match some of its layers, else it trains in "
        "full. `python -m qwenvl.merge` merges the result into a complete checkpoint.",
    )
    lora_r: int = HfArg(default=64, help="Rank of the adapters.")
    lora_alpha: int = HfArg(default=128, help="Adapters are scaled by this divided by their rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout probability of the adapters' inputs.")
    lora_targets: list[str] = HfArg(  # noqa: RUF009  it makes a field
        default_factory=lambda: [r"language_model\..*_proj"],
        help="Linear layers that get adapters, as regular expressions for the end of their dotted names, such "
        "as q_proj v_proj. Default: those of the language model's attention and MLP.",
    )

    def __post_init__(self):
        self.model_name_or_path = find_model(self.model_name_or_path, PROJECT)
        if Path(self.model_name_or_path).is_dir():
            self.model_name_or_path = str(Path(self.model_name_or_path).resolve())
        self.rules  # noqa: B018  raises for an unknown variant
        for name in ("wait_k", "max_tokens_per_slot"):
            if not 1 <= (value := getattr(self, name)) <= MAX_PER_SLOT:
                raise InputError(f"--{name} {value}: must be between 1 and {MAX_PER_SLOT:,}")
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
        if self.checkpoint_layers is not None and self.checkpoint_layers < 1:
            raise InputError(
                f"--checkpoint_layers {self.checkpoint_layers}: must be at least 1; to recompute nothing give "
                "--gradient_checkpointing False"
            )
        if not (self.tune_mm_llm or self.tune_mm_mlp or self.tune_mm_vision):
            raise InputError("there is nothing to train: set one of --tune_mm_llm, --tune_mm_mlp, --tune_mm_vision")
        if self.attention not in ATTENTIONS:
            raise InputError(f"--attention {self.attention}: choose {', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}")
        if self.rules.parallel and "flash" in self.attention:
            raise InputError(
                f"--attention {self.attention} does not support the streaming mask of {self.variant}: "
                "use auto, flex_attention or sdpa"
            )
        if self.compile_layers and "flash" in self.attention:
            raise InputError(
                f"--compile_layers True does not work with --attention {self.attention} (no step within 200 s): "
                "omit one of them"
            )
        for name, default in defaults(self).items():
            value = getattr(self, name)
            if name.startswith("lora_") and value != default and not self.lora_enable:
                raise InputError(
                    f"--{name} {value} has no effect without adapters: give --lora_enable True, or omit it"
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
    train_data: str = HfArg(
        default="dataset/train_3_5.jsonl",
        help="JSON Lines, as mani_data.py writes them, a Parquet file or pattern, a folder of "
        "Dataset.save_to_disk, or hf://datasets/OWNER/NAME[:SPLIT], with columns video_id, video_path, "
        "human_caption or segments, and optionally question.",
    )
    video_root: str = HfArg(
        default="",
        help="Folder of the videos. A video_path that does not exist as it is, or under the project's root, is "
        "looked up in this folder, then its file name alone.",
    )
    min_pixels_per_frame: int = HfArg(default=PixelBudget.min_pixels_per_frame, help="Smallest size of a frame.")
    max_pixels_per_frame: int = HfArg(default=PixelBudget.max_pixels_per_frame, help="Largest size of a frame.")
    max_pixels_per_video: int = HfArg(
        default=PixelBudget.max_pixels_per_video, help="Pixels of all sampled frames together."
    )
    budget: str = HfArg(
        default=PixelBudget.budget,
        help="Frames that share --max_pixels_per_video. video: those of the video, as in the paper. stream: as "
        "many as the longest video has, so that the size of a frame does not reveal the length of the video.",
    )
    model_max_length: int = HfArg(default=8192, help="Longer samples are skipped, never truncated.")
    pack_tokens: int = HfArg(
        default=0, help="Pack the samples of a batch into rows of this many tokens; 0: a row each."
    )
    keep_frames: bool = HfArg(
        default=False,
        help="Cache decoded frames in memory, for several epochs over data that fits; each worker has its own.",
    )

    def __post_init__(self):
        self.train_data = find_data(self.train_data, PROJECT, "the training data")
        folder = find_video_root(self.video_root, PROJECT)
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


def check_checkpoint_layers(layers: int | None, recomputes: bool, most: int) -> None:
    """Raises InputError where so many `layers` cannot be recomputed, of a model with `most`."""
    if layers is None:
        return
    if not recomputes:
        raise InputError(f"--checkpoint_layers {layers} contradicts --gradient_checkpointing False: omit one of them")
    if layers > most:
        raise InputError(f"--checkpoint_layers {layers}: the model has {most} layers: give at most that, or omit it")


def dataset_options(model: ModelArguments, data: DataArguments) -> dict[str, Any]:
    """The arguments of StreamingDataset that these flags determine."""
    return {
        "root": PROJECT,
        "video_root": data.video_folder,
        "variant": model.rules,
        "schedule": model.wait_schedule,
        "uses_times": model.uses_times,
        "max_tokens_per_slot": model.max_tokens_per_slot,
        "end_of_slot": model.end_of_slot if model.decides else None,
        "budget": data.pixel_budget,
        "max_length": data.max_length,
    }
