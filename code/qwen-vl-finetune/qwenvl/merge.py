"""Merge a LoRA adapter into its base model, into a complete checkpoint like that of full fine-tuning.

    python -m qwenvl.merge --adapter DIR --output DIR [--base MODEL]     (run in code/qwen-vl-finetune)

The merge runs on the CPU in float32. The result has the dtype and the other files of the base model, and the adapter's
run.json, with the paths of adapter and base as `merged`.
"""

import argparse
import json
import logging
import os
import re
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.files import atomic_folder
from qwen_vl_streaming.common.paths import PROJECT, find_model, look_up
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.loading import check_finite, load_config, load_model
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.model.trained import training_record
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .folder import MERGED
from .param_groups import AdaptedModel, saves_embeddings

logger = logging.getLogger(__name__)

OPTIONAL = ("pixel_budget", "end_of_slot", "max_tokens_per_slot")
"""Keys of training that not every adapter's config.json has."""
BASE = "base_sha256"
"""Key in an adapter's config.json: the base's hash by `of_checkpoint`."""


def training_config(adapter: Path) -> dict:
    """Variant, K, pixel budget and the base's hash from the training of `adapter`. Raises InputError where they are not
    recorded."""
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} has no adapter: give a folder written by `sft.sh --lora_enable True`")
    try:
        config = json.loads((adapter / "config.json").read_text())
        required = {key: config[key] for key in ("streaming_variant", "wait_k")}
        required["position_rule"] = config.get("position_rule")  # None overrides that of the base
        return {**required, **{key: config[key] for key in (*OPTIONAL, BASE) if key in config}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{adapter / 'config.json'} does not name the variant of the adapter ({error!r}): give an unchanged folder "
            "written by `sft.sh --lora_enable True`"
        ) from error


def load_adapted(adapter: Path, base: str | None, sha256: str) -> AdaptedModel:
    """`adapter` on `base`, by default the model that it names, in float32.

    Raises InputError where their weights do not match, since peft would ignore missing ones; and where a folder `base`
    is not the model with the hash `sha256` that the adapter was trained on. Models from a hub are not compared.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
        if getattr(config, "megatron_config", None):  # peft would import the module that is named there
            raise ValueError("Megatron adapters are not supported")
        if not (base := base or config.base_model_name_or_path):
            raise ValueError("it does not name its base model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"the adapter in {adapter} cannot be read ({error}): use an earlier checkpoint") from error
    if re.fullmatch("[0-9a-f]{64}", sha256) and os.path.isdir(base) and of_checkpoint(base) != sha256:
        raise InputError(f"{adapter} was trained on a model other than {base}: give its model with --base")
    model = load_model(base, "sdpa", torch.float32)
    load_processor(base)  # its files are saved beside the merged weights
    try:
        adapted, embeddings = AdaptedModel(model, config), saves_embeddings(config)
        if different := get_peft_model_state_dict(adapted, save_embedding_layers=embeddings).keys() ^ weights.keys():
            raise ValueError(f"{len(different)} weights are in only one of them, such as {min(different)}")
        set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{adapter} does not fit {base} ({reason}): give its model with --base") from error
    return adapted


def merged(adapter: Path, base: str | None, sha256: str) -> PreTrainedModel:
    """`base` with `adapter` merged, in the dtype of `base`. Raises InputError where weights are NaN or infinite."""
    adapted = load_adapted(adapter, base, sha256)
    name = adapted.get_base_model().name_or_path
    model = adapted.merge_and_unload().to(load_config(name).dtype or torch.float32)
    check_finite(model, str(adapter), "use an earlier checkpoint")
    return model


def merge(adapter: Path, output: Path, base: str | None = None) -> None:
    """Write the merged checkpoint to `output`, which is created once it is complete. Raises InputError."""
    if output.exists():
        raise InputError(f"{output} already exists: give another --output, or remove it")
    trained = training_config(adapter)
    sha256, record = str(trained.pop(BASE, "")), training_record(adapter)
    try:
        with atomic_folder(output) as partial:
            model = merged(adapter, base, sha256)
            model.save_pretrained(partial)
            BaseFiles.of(model_folder(model.name_or_path)).write(partial, trained)
            if record:
                record[MERGED] = {"adapter": str(adapter.resolve()), "base": model.name_or_path}
                (partial / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--output {output} cannot be written ({reason}): give another, or free some space") from error
    logger.info("merged %s into %s: %s", adapter, model.name_or_path, output)


def main() -> None:
    parser = OneLineParser(
        prog="python -m qwenvl.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, help="folder written by sft.sh --lora_enable True")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint; must not exist")
    parser.add_argument("--base", help="base model (default: the one that the adapter names)")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns of a missing GPU
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = find_model(arguments.base, PROJECT) if arguments.base else None
    merge(look_up(arguments.adapter, PROJECT), arguments.output, base)


if __name__ == "__main__":
    run(main)
