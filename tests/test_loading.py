"""Checkpoints that would load as another model than they are: adapters, quantized and damaged weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine.decoder_layer import FusedProjections
from qwen_vl_streaming.model.loading import check_finite, load_config, load_model
from qwen_vl_streaming.model.quantization import quantize_layers
from safetensors.torch import load_file, save_file
from tiny import tiny_model

QUANTIZED = [
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"load_in_4bit": True},
    {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "fp8", "activation_scheme": "dynamic"},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": ["x"]},
    "int8",
]


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "model")
    return tmp_path / "model"


def layer(folder: Path) -> str:
    return next(
        name for name in load_file(folder / "model.safetensors") if name.endswith("layers.1.mlp.down_proj.weight")
    )


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Writes `tensors` into the weights."""
    weights = load_file(folder / "model.safetensors") | tensors
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickle_weights(folder: Path) -> None:
    """Saves the weights as PyTorch does."""
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def loads(folder: Path):
    return load_model(folder, "sdpa", torch.float32)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_beside_a_model_is_refused(folder, merged, pickled):
    """transformers would add it to the stock layers, merged or not, and the engine would ignore it."""
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    if merged:
        (folder / "adapter_model.safetensors").unlink()
    if pickled:
        pickle_weights(folder)
    for load in (load_config, loads):
        with pytest.raises(InputError, match=r"has an adapter beside its model: .* delete its adapter_\* files"):
            load(folder)
    for path in folder.glob("adapter_*"):
        path.unlink()
    assert loads(folder)


def test_the_engine_takes_plain_layers_only():
    """An adapter's layer has the base's `weight`, and the engine would compute with that alone."""
    model = tiny_model()
    quantize_layers(model.model.language_model.layers[1], "int8")
    first, second = model.model.language_model.layers
    for each in (first, second):
        FusedProjections.from_layer(each)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(InputError, match=r"has a peft\.tuners\.lora\.layer\.Linear: merge adapters"):
        FusedProjections.from_layer(adapted.get_base_model().model.language_model.layers[0])
    first.mlp.up_proj = second.mlp.up_proj
    with pytest.raises(InputError, match="QuantizedLinear"):
        FusedProjections.from_layer(first)


@pytest.mark.parametrize("part", ["quantization_config", "compression_config", "text_config"])
@pytest.mark.parametrize("quantized", QUANTIZED)
def test_quantized_checkpoints_are_refused(folder, part, quantized):
    """Alike with every method, whether transformers knows it, and has its package, or not."""
    config = json.loads((folder / "config.json").read_text())
    if part == "text_config":
        config[part] = {**config.get(part, {}), "quantization_config": quantized}
    else:
        config[part] = quantized
    (folder / "config.json").write_text(json.dumps(config))
    method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
    for load in (load_config, loads):
        with pytest.raises(InputError) as error:
            load(folder)
        assert str(error.value).startswith(f"{str(folder)!r} is quantized ({method}")
        assert str(error.value).endswith(
            "): give the original checkpoint, which --weights int8 of eval.sh, live and serve quantizes"
        )


def test_an_empty_quantization_config_is_none(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert loads(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_in_8_bits_or_integers_are_refused(folder, dtype, pickled):
    """transformers would convert the numbers as they are, without their scales."""
    name, weights = layer(folder), folder / "model.safetensors"
    change(folder, **{name: load_file(weights)[name].to(dtype)})
    if pickled:
        pickle_weights(folder)
    with pytest.raises(InputError, match=rf"is quantized \({name} is stored as \w+\): give the original"):
        loads(folder)


@pytest.mark.parametrize("pickled", [False, True])
def test_buffers_that_other_versions_saved_are_not_weights(folder, pickled):
    change(
        folder,
        **{"model.language_model.position_ids": torch.arange(9), "model.visual.rotary_pos_emb.inv_freq": torch.ones(4)},
    )
    if pickled:
        pickle_weights(folder)
        torch.save({"a.weight": torch.ones(2, dtype=torch.int64)}, folder / "pytorch_model_fsdp.bin")  # is not read
    assert loads(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_in_16_bits_are_loaded(folder, dtype, pickled):
    weights = folder / "model.safetensors"
    change(folder, **{name: weight.to(dtype) for name, weight in load_file(weights).items()})
    if pickled:
        pickle_weights(folder)
    assert loads(folder).dtype == torch.float32


@pytest.mark.parametrize("part", ["layers.1.mlp.down_proj.weight", "blocks.0.attn.proj.weight"])
def test_weights_that_the_model_does_not_have_are_refused(folder, part):
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith(part))
    change(folder, **{f"{name}_scale": torch.ones(1)})
    with pytest.raises(InputError, match=rf"has 1 weights that Qwen2.5-VL does not have, such as \S*{part}_scale:"):
        loads(folder)


def test_weights_beside_the_model_are_ignored(folder):
    """A value head of TRL, and a buffer that older versions of transformers saved."""
    change(
        folder,
        **{"v_head.summary.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    )
    assert loads(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["layers.1.mlp.down_proj.weight", "blocks.0.attn.proj.bias", "norm.weight"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_weights_that_are_not_finite_are_refused(folder, part, value, weights):
    name, tensor = next(pair for pair in load_file(folder / "model.safetensors").items() if pair[0].endswith(part))
    tensor.view(-1)[-1] = value
    change(folder, **{name: tensor})
    with pytest.raises(InputError, match=rf"has NaN or infinite weights in 1 tensors, such as \S*{part}: copy"):
        load_model(folder, "sdpa", torch.bfloat16, weights)


def test_finite_weights_of_any_size_pass():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.finfo(torch.float32).max)
    check_finite(model, "x", "y")
