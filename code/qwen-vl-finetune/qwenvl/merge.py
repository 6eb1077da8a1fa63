"""Merge an adapter into the model that it was trained on: a complete checkpoint, as full fine-tuning leaves one.

    python -m qwenvl.merge --adapter DIR --output DIR [--base MODEL]     (run in code/qwen-vl-finetune)

It is computed in float32, on the CPU, and saved in the numbers of the base model, beside that model's own files.
"""

import argparse
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.paths import PROJECT, find_model, look_up
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_config, load_model
from qwen_vl_streaming.model.prompts import load_processor
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .param_groups import saves_embeddings

logger = logging.getLogger(__name__)

BASE = "base_sha256"
"""In an adapter's config.json: see `of_checkpoint`."""


def training_config(adapter: Path) -> dict:
    """Variant, K, pixel budget and the base's hash of the training that left `adapter`. Raises InputError where there
    was none."""
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} holds no adapter: give a folder that `sft.sh --lora_enable True` has written")
    try:
        config = json.loads((adapter / "config.json").read_text())
        said = {key: config[key] for key in ("streaming_variant", "wait_k")}
        said["position_rule"] = config.get("position_rule")  # also where there is none: the base may have one
        return {**said, **{key: config[key] for key in ("pixel_budget", BASE) if key in config}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{adapter / 'config.json'} does not say under which variant the adapter was trained ({error!r}): "
            "give the folder as `sft.sh --lora_enable True` has written it"
        ) from error


def check_base(adapter: Path, base: str | None, sha256: str | None) -> None:
    """Raises InputError where the folder `base`, or the one that `adapter` names, holds another model than the one of
    that hash, which it was trained on. What comes from a hub is not compared."""
    try:
        base = base or json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # loading it will say why
    hashed = re.compile("[0-9a-f]{64}")
    if sha256 and hashed.fullmatch(sha256) and os.path.isdir(base) and of_checkpoint(base) != sha256:
        raise InputError(f"{adapter} was trained on another model than {base} holds now: name its model with --base")


def load_adapted(adapter: Path, base: str | None) -> PeftModel:
    """`adapter` on `base`, by default the model that it was trained on, in float32.

    Raises InputError where the two do not fit, weight by weight: peft alone goes on without those that are missing.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
        if getattr(config, "megatron_config", None):  # peft imports whatever module is named there
            raise ValueError("it is of Megatron")
        if not (base := base or config.base_model_name_or_path):
            raise ValueError("it names no model that it was trained on")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"the adapter in {adapter} cannot be read ({error}): take an earlier checkpoint") from error
    model = load_model(base, "sdpa", torch.float32)
    load_processor(base)  # whose files will lie beside the merged weights
    try:
        adapted, embeddings = PeftModel(model, config), saves_embeddings(config)
        if odd := get_peft_model_state_dict(adapted, save_embedding_layers=embeddings).keys() ^ weights.keys():
            raise ValueError(f"{len(odd)} weights are in one only, {min(odd)} among them")
        set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{adapter} does not fit {base} ({reason}): name its model with --base") from error
    return adapted


def merged(adapter: Path, base: str | None) -> PreTrainedModel:
    """The model that `adapter` makes of `base`, in the numbers of that. Raises InputError where it is none."""
    adapted = load_adapted(adapter, base)
    name = adapted.get_base_model().name_or_path
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"{adapter} has weights that are no numbers ({error}): take an earlier checkpoint") from error
    return model.to(load_config(name).dtype or torch.float32)


def merge(adapter: Path, output: Path, base: str | None = None) -> None:
    """Write `adapter`, merged, to `output`, which appears when it is whole. Raises InputError where it cannot."""
    if output.exists():
        raise InputError(f"{output} is there already: name another --output, or remove it")
    trained = training_config(adapter)
    check_base(adapter, base, trained.pop(BASE, None))
    beside = output.with_name(f".{output.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        model = merged(adapter, base)
        model.save_pretrained(beside)
        BaseFiles.of(model_folder(model.name_or_path)).write(beside, trained)
        beside.rename(output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--output {output} cannot be written ({reason}): name another, or make room") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    logger.info("%s and %s: %s", model.name_or_path, adapter, output)


def main() -> None:
    parser = OneLineParser(
        prog="python -m qwenvl.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, help="folder that sft.sh --lora_enable True has written")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint; must not exist")
    parser.add_argument("--base", help="the model that was adapted; by default the one that the adapter names")
    arguments = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = find_model(arguments.base, PROJECT) if arguments.base else None
    merge(look_up(arguments.adapter, PROJECT), arguments.output, base)


if __name__ == "__main__":
    run(main)
