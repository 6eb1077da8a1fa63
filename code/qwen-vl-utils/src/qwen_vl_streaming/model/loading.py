"""Loads the config and the weights of a checkpoint. Refuses what is not a complete Qwen2.5-VL in one line."""

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import Qwen2_5_VLConfig

from ..common.ending import lost_worker
from ..common.errors import InputError, first_line
from .checkpoint import tensor_names
from .checks import check_config, check_layers
from .hub import model_folder
from .modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, all_full
from .quantization import check_precision, quantize_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model can run in: the values of --dtype."""
UNLOADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError, KeyError, ArithmeticError),
    *(EOFError, UnpicklingError, StrictDataclassError),
)
"""Errors that transformers raises for invalid or inconsistent checkpoint files."""


def load_config(path: str | Path) -> Qwen2_5_VLConfig:
    """Loads the config of a checkpoint in a folder or on the Hub. Raises InputError if there is none, if it is not of a
    Qwen2.5-VL, or if it has sliding-window attention, which does not support streaming masks."""
    config = _loaded(path, Qwen2_5_VLConfig.from_pretrained, weights=False)
    if not all_full(config):
        raise InputError(
            f"{str(path)!r} has sliding-window attention, which does not support streaming masks: set "
            "use_sliding_window to false in its config.json"
        )
    return config


def load_model(
    path: str | Path,
    implementation: str,
    dtype: torch.dtype,
    weights: str | None = None,
    device: torch.device | str = "cpu",
) -> Qwen2_5_VLForConditionalGeneration:
    """Loads a Qwen2.5-VL from a folder or the Hub. Its language model uses the attention `implementation`. With
    `weights`, one of `quantization.WEIGHTS`, its linear layers are quantized, and moved to `device` one by one.

    Raises InputError, with the reason in one line, if it cannot be loaded.
    """
    config = load_config(path)
    check_precision(weights, device, dtype, config)
    check_layers(config, tensor_names(model_folder(path)), str(path))
    model, report = _loaded(
        path,
        lambda folder: Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, trust_remote_code=False
        ),
    )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{str(path)!r} lacks {len(missing)} weights, such as {missing[0]}: save it again")
    model.name_or_path = model.config._name_or_path = str(path)  # for a Hub model the id, not the cache folder
    # With ZeRO-3, transformers also keeps renamings that matched no weight, and would save weights under wrong names.
    model._weight_conversions = [renaming for renaming in model._weight_conversions if renaming.was_used()]
    model.model.language_model.set_attn_implementation(implementation)
    if weights is not None:
        quantize_model(model, weights, device)
    return model


def tokens_per_second(config: Qwen2_5_VLConfig) -> float:
    """Returns how many position steps a second of video has."""
    vision: Any = config.vision_config  # as in `all_full`
    return vision.tokens_per_second


def _loaded(path: str | Path, load: Callable[[Path], Any], weights: bool = True) -> Any:
    if os.path.isfile(path):
        raise InputError(f"{path} is a file: give the folder of the checkpoint")
    folder = model_folder(path, weights)
    adapter = os.path.isfile(folder / "adapter_config.json")
    if not (adapter or os.path.isfile(folder / "config.json")):
        raise InputError(f"{folder} has no config.json and is not a checkpoint: check the path")
    if adapter and not any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{folder} has an adapter, not a model: merge it with "
            f"`python -m qwenvl.merge --adapter {folder} --output DIR`, run in code/qwen-vl-finetune"
        )
    try:
        given = Qwen2_5_VLConfig.get_config_dict(folder)[0]
        kind = given.get("model_type")
        if kind != Qwen2_5_VLConfig.model_type:  # transformers would only warn
            raise ValueError(f"its config.json has the model type {kind}")
        check_config(given, str(folder / "config.json"))
        return load(folder)
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"the weights in {str(path)!r} are damaged ({error}): copy or download them again") from error
    except torch.OutOfMemoryError:
        raise
    except (*UNLOADABLE, LookupError) as error:  # torch raises LookupError for a damaged pickle
        if lost_worker(error):  # raised by the SIGCHLD handler of a DataLoader, at any point of the program
            raise
        first = first_line(error)
        raise InputError(
            f"no Qwen2.5-VL could be loaded from {str(path)!r} ({first}): give a complete checkpoint, or copy it again"
        ) from error
