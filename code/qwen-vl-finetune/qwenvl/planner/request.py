"""What a command line asks for: its flags, the run that it would resume, and the inputs of a plan."""

import argparse
import math
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import PROJECT
from qwen_vl_streaming.model.loading import load_config
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.model.released import SIZES, released_config
from transformers.hf_argparser import string_to_bool

from ..arguments import DataArguments, ModelArguments, dataset_options
from ..data import StreamingDataset
from ..headers import Headers
from ..parser import FlagParser
from ..record import recorded_arguments
from ..rows import file_of, hold_out, read_rows
from ..training_arguments import FINETUNE, SftArguments, default_output, find_deepspeed
from .gpus import Gpus
from .host import available_memory
from .lengths import Lengths, assumed_lengths, find_lengths
from .optimizers import state_bytes
from .plan import BATCH, Given, Plan, choose
from .settings import Zero, configurations
from .shape import Shape, find_shape
from .text import count_steps, describe

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Two names of one flag of transformers."""
FIELDS = (
    ("zero", "deepspeed"),
    ("samples", "per_device_train_batch_size"),
    ("accumulation", "gradient_accumulation_steps"),
    ("pack_tokens", "pack_tokens"),
    ("checkpointed", "checkpoint_layers"),
    ("compiled", "compile_layers"),
    *(("checkpointing", flag) for flag in CHECKPOINTING),
)
"""Fields of Given, with the flags that set them."""
PLANNED = (
    "deepspeed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "pack_tokens",
    "gradient_checkpointing",
    "checkpoint_layers",
    "compile_layers",
)
"""Flags that the planner sets."""


@dataclass(frozen=True)
class Request:
    """The flags of one command."""

    given: dict[str, Any]
    """Those that the user gave, by name."""
    model: ModelArguments
    data: DataArguments | None
    """None where the training data are not here."""
    no_data: str = ""
    """Why they are not."""
    headers: Headers = field(default_factory=Headers)
    """The headers of videos and lengths of captions that were read for the plan."""

    @classmethod
    def parse(cls, words: list[str]) -> "Request":
        """Parses flags of train.py. Unknown ones are left for train.py to refuse. Raises InputError."""
        parser = FlagParser()
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        given = vars(parser.parse_known_args(words)[0])
        if config := os.environ.get("DEEPSPEED_CONFIG"):
            given.setdefault("deepspeed", config)

        def group(kind):
            names = {name for name, field in kind.__dataclass_fields__.items() if field.init}
            return kind(**{name: value for name, value in given.items() if name in names})

        try:
            data, reason = group(DataArguments), ""
        except InputError as error:
            data, reason = None, str(error)
        return cls(given, group(ModelArguments), data, reason)

    @property
    def output(self) -> Path:
        return Path(self.given.get("output_dir") or default_output(self.model.variant))

    def resumed(self) -> dict[str, object]:
        """The planned flags of the run in the output folder, if it has a checkpoint or is finished; else nothing."""
        arguments = recorded_arguments(self.output)
        flags = {
            name: arguments[name]
            for name in PLANNED
            if name != "deepspeed" and arguments.get(name) is not None and name not in self.given
        }
        if "flash" in self.model.attention and "compile_layers" in flags:
            flags["compile_layers"] = False  # runs of earlier versions say True
        if any(name in self.given for name in (*CHECKPOINTING, "checkpoint_layers")):
            for name in ("gradient_checkpointing", "checkpoint_layers"):
                flags.pop(name, None)
        zero = (arguments.get("deepspeed") or {}).get("zero_optimization")
        if zero and "deepspeed" not in self.given:
            used = Zero.of(zero)
            same = [configuration.file for configuration in configurations() if configuration.kind == used.kind]
            if not same:
                raise InputError(
                    f"{self.output} was started with a DeepSpeed configuration of your own ({used.title}): give it "
                    "again in DEEPSPEED_CONFIG"
                )
            flags = {"deepspeed": same[0], **flags}
        return flags

    def choices(self) -> Given:
        """What the flags leave the planner to choose. Raises InputError for invalid values."""
        given = [(name, flag) for name, flag in FIELDS if flag in self.given]
        values = {name: self.given[flag] for name, flag in given}
        names = {name: f"--{flag} {self.given[flag]}" for name, flag in given}
        if "zero" in values:
            path = find_deepspeed(values["zero"])
            values["zero"] = Zero.read(path, path.name if path.parent == FINETUNE else values["zero"])
        if "checkpointing" in values:
            values["checkpointing"] = string_to_bool(str(values["checkpointing"]))
        for name in BATCH:
            if name in values and values[name] < 1:
                raise InputError(f"{names[name]}: must be above 0")
        optimizer = self.given.get("optim", SftArguments.__dataclass_fields__["optim"].default)
        return Given(
            **values,
            flexible="flash" not in self.model.attention,
            bf16=self.given.get("bf16", True),
            states=state_bytes(getattr(optimizer, "value", optimizer), self.given.get("optim_args") or ""),
            flags=names,
        )

    def plan(self, gpus: Gpus) -> tuple[str, dict[str, object]]:
        """The plan for `gpus` as text, and the flags that give it, without those that the user gave.

        Raises InputError where nothing fits or the inputs cannot be read.
        """
        plan, shape, lengths, steps = self.predict(gpus)
        text = describe(plan, shape, lengths, gpus, steps, self.choices().describe())
        flags = plan.settings.flags(shape.layers)
        if any(name in self.given for name in CHECKPOINTING):
            flags.pop("gradient_checkpointing")
        return text, {name: value for name, value in flags.items() if name not in self.given}

    def predict(self, gpus: Gpus) -> tuple[Plan, Shape, Lengths, int]:
        """The plan for `gpus`, the model's sizes, the samples' lengths and the number of optimizer steps. Raises
        InputError as `plan`."""
        given = self.choices()
        config = self._config(gpus)
        shape = find_shape(config, self.model)
        lengths = self._lengths(config, gpus)
        host = available_memory() if gpus.here else math.inf
        plan = choose(shape, lengths, gpus, given, host)
        settings = plan.settings
        samples = settings.samples * settings.accumulation * gpus.count
        epochs, most = self.given.get("num_train_epochs", 1.0), self.given.get("max_steps", -1)
        steps = count_steps(lengths.rows - lengths.held_out, samples, epochs, most)
        return plan, shape, lengths, steps

    def _config(self, gpus: Gpus):
        """The model's config; for GPUs that are not here, that of a released size if the model cannot be reached."""
        try:
            return load_config(self.model.model_name_or_path)
        except InputError:
            size = next((s for s in SIZES if f"VL-{s}-" in self.model.model_name_or_path), None)
            if gpus.here or size is None:
                raise
            return released_config(size)

    def _lengths(self, config, gpus: Gpus) -> Lengths:
        share, held_out = self.given.get("eval_share", 0.0), self.given.get("eval_samples", 0)
        seed = self.given.get("seed", 42)

        def assumed(max_length: int) -> Lengths:
            lengths = assumed_lengths(max_length)
            return replace(lengths, held_out=min(held_out or round(share * lengths.rows), lengths.rows))

        if self.data is None:
            if gpus.here:
                raise InputError(self.no_data)
            return assumed(self.given.get("model_max_length", 8192))
        data = self.data
        try:
            processor = load_processor(self.model.model_name_or_path)
        except InputError:
            if gpus.here:
                raise
            return assumed(data.max_length)
        rows = read_rows(data.train_data)
        samples = StreamingDataset(
            rows,
            **dataset_options(self.model, data),
            processor=processor,
            tokens_per_second=config.vision_config.tokens_per_second,
            seed=seed,
        )
        find = partial(file_of, root=PROJECT, video_root=data.video_folder)
        _, held = hold_out(rows, share, held_out, seed, find)
        return replace(find_lengths(samples, self.headers), held_out=len(held))
