"""Loads the config and the weights of a checkpoint. Refuses what is not a complete Qwen2.5-VL in one line."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig

from ..common.ending import lost_worker
from ..common.errors import InputError, first_line
from ..common.files import read_object
from .checkpoint import tensor_dtypes
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
STORED = {"F64", "F32", "F16", "BF16"}
"""Data types of weights that are not quantized, as named in safetensors files."""
WEIGHTS = ("weight", "bias", "weight_packed")
"""What the names of weights end with, as against those of buffers."""
PARTS = ("model.", "lm_head.")
"""What the names of a model's weights begin with."""


def load_config(path: str | Path) -> Qwen2_5_VLConfig:
    """Loads the config of a checkpoint in a folder or on the Hub. Raises InputError if there is none, if it is not of a
    Qwen2.5-VL, is quantized or has an adapter, or if it has sliding-window attention, which does not support streaming
    masks."""
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

    Raises InputError, with the reason in one line, if it cannot be loaded, or if its weights are not those of a whole
    Qwen2.5-VL in floating point, all finite.
    """
    config = load_config(path)
    check_precision(weights, device, dtype)
    stored = tensor_dtypes(model_folder(path))
    check_layers(config, stored, str(path))

    dtypes: dict[str, str] = {}

    def load(folder: Path) -> Any:
        dtypes.update(_pickled_dtypes(folder) if stored is None else stored)
        _check_stored(dtypes, path)
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, trust_remote_code=False
        )

    model, report = _loaded(path, load)
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{str(path)!r} lacks {len(missing)} weights, such as {missing[0]}: save it again")
    unexpected = (key for key in report["unexpected_keys"] if key.startswith(PARTS) and not key.endswith("inv_freq"))
    if others := sorted(key for key in unexpected if dtypes.get(key, "F32") in STORED):  # others are buffers
        raise InputError(
            f"{str(path)!r} has {len(others)} weights that Qwen2.5-VL does not have, such as {others[0]}: give the "
            "original checkpoint"
        )
    check_finite(model, repr(str(path)), "copy or download it again, or use an earlier checkpoint")
    model.name_or_path = model.config._name_or_path = str(path)  # for a Hub model the id, not the cache folder
    # With ZeRO-3, transformers also keeps renamings that matched no weight, and would save weights under wrong names.
    model._weight_conversions = [renaming for renaming in model._weight_conversions if renaming.was_used()]
    model.model.language_model.set_attn_implementation(implementation)
    if weights is not None:
        quantize_model(model, weights, device)
    return model


def check_finite(model: nn.Module, name: str, fix: str) -> None:
    """Raises InputError, which names the checkpoint `name` and the `fix`, if a weight of `model` has NaN or infinite
    values. Reads each weight once, where it is, without a copy. Does not see weights that ZeRO-3 has partitioned:
    training ends at the first loss that is not finite."""
    bounds = {key: torch.stack(weight.detach().aminmax()) for key, weight in model.named_parameters() if weight.numel()}
    if wrong := [key for key, pair in bounds.items() if not pair.isfinite().all()]:
        raise InputError(f"{name} has NaN or infinite weights in {len(wrong)} tensors, such as {wrong[0]}: {fix}")


def tokens_per_second(config: Qwen2_5_VLConfig) -> float:
    """Returns how many position steps a second of video has."""
    vision: Any = config.vision_config  # as in `all_full`
    return vision.tokens_per_second


def _loaded(path: str | Path, load: Callable[[Path], Any], weights: bool = True) -> Any:
    if os.path.isfile(path):
        raise InputError(f"{path} is a file: give the folder of the checkpoint")
    folder = model_folder(path, weights)
    if os.path.isfile(folder / "adapter_config.json"):
        if any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
            raise InputError(
                f"{folder} has an adapter beside its model: merge it into the model with merge_and_unload of peft; or, "
                "if the weights are merged already, delete its adapter_* files"
            )
        raise InputError(
            f"{folder} has an adapter, not a model: merge it with "
            f"`python -m qwenvl.merge --adapter {folder} --output DIR`, run in code/qwen-vl-finetune"
        )
    if not os.path.isfile(folder / "config.json"):
        raise InputError(f"{folder} has no config.json and is not a checkpoint: check the path")
    try:
        given = Qwen2_5_VLConfig.get_config_dict(folder)[0]
        kind = given.get("model_type")
        if kind != Qwen2_5_VLConfig.model_type:  # transformers would only warn
            raise ValueError(f"its config.json has the model type {kind}")
        check_config(given, str(folder / "config.json"))
        _check_not_quantized(given, path)
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


def _check_not_quantized(config: Mapping, path: str | Path) -> None:
    """Raises InputError if `config`, as in config.json, is of a quantized checkpoint, whatever the method: the engine
    computes with plain layers, and transformers loads unknown methods as if the numbers were weights."""
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        for key in ("quantization_config", "compression_config"):  # the second in older files of compressed-tensors
            if method := part.get(key):
                raise _quantized(path, method.get("quant_method", key) if isinstance(method, Mapping) else key)


def _check_stored(dtypes: Mapping[str, str], path: str | Path) -> None:
    """Raises InputError if weights of these `dtypes`, by name, are not all in floating point of 16 bits or more."""
    for name, dtype in dtypes.items():
        if dtype not in STORED and name.endswith(WEIGHTS):
            raise _quantized(path, f"{name} is stored as {dtype}")


def _quantized(path: str | Path, how: str) -> InputError:
    return InputError(
        f"{str(path)!r} is quantized ({how}): give the original checkpoint, which --weights int8 of eval.sh, live and "
        "serve quantizes"
    )


def _pickled_dtypes(folder: Path) -> dict[str, str]:
    """As `tensor_dtypes`, for weights in files of PyTorch. Reads no values."""
    plain = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtypes = {}
    files, index = [folder / "pytorch_model.bin"], folder / "pytorch_model.bin.index.json"
    if not files[0].is_file() and index.is_file():
        files = sorted(
            {folder / file for file in read_object(index, "copy the checkpoint again")["weight_map"].values()}
        )
    for file in files if files[0].is_file() else ():
        for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
            if isinstance(tensor, Tensor):
                dtypes[name] = plain.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return dtypes
