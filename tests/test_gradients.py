"""A recipe gives the same losses, gradients and weights for every batch size, packing, number of processes and ZeRO
stage: complete runs of the program."""

import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.modeling_qwen2_5_vl import compile_layers
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.timeline.attention import make_mask
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl.arguments import ModelArguments
from qwenvl.batches import collate
from qwenvl.data import StreamingDataset
from qwenvl.param_groups import make_trainable
from qwenvl.rows import read_rows
from safetensors.torch import load_file
from training import finish, flags, history, start, start_many

RECIPE = {
    "tune_mm_vision": True,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 2,
    "warmup_steps": 0,
    "adam_epsilon": 1e-4,  # so that AdamW does not amplify rounding in gradients near 0
    "eval_samples": 3,
    "eval_steps": 1,
    "per_device_eval_batch_size": 3,
    "save_steps": 4,
}
TRAINED = (12, 4)
"""Training and held-out samples. An epoch has a step of 8 and one of 4; neither divides evenly over two processes."""


@pytest.fixture(scope="module")
def mixed(made, tmp_path_factory):
    """The eight videos, each with its caption and with a shortened one, so that answers differ in length."""
    rows = [json.loads(line) for line in made[1].read_text().splitlines()]
    short = [
        {**row, "video_id": f"{row['video_id']} again", "human_caption": " ".join(row["human_caption"].split()[:14])}
        for row in rows
    ]
    data = tmp_path_factory.mktemp("mixed") / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows + short))
    return made[0], data


def run(mixed, out, processes: int = 0, **changes):
    """Train; without a distributed launch if `processes` is 0."""
    arguments = flags(mixed, out, **RECIPE | changes)
    log = out.with_suffix(".log")
    for process in start_many(processes, arguments, log) if processes else [start(arguments, log)]:
        finish(process, seconds=600)
    assert not (out / "skipped.jsonl").exists()
    return out


def held_out(out) -> dict[int, float]:
    log = json.loads((out / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}


@pytest.fixture(scope="module")
def plain(mixed, tmp_path_factory):
    """One sample at a time, in one process, without DeepSpeed and gradient checkpointing."""
    out = run(mixed, tmp_path_factory.mktemp("plain") / "out")
    data = json.loads((out / "run.json").read_text())["data"]
    assert (data["rows"] - data["held_out"], data["held_out"]) == TRAINED
    return out


MODES = {
    "8 at a time": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "packed": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "pack_tokens": 420},
    "checkpointing": {"gradient_checkpointing": True},
    "two processes": {"processes": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "ZeRO-2": {"processes": 1, "deepspeed": "zero2.json"},
    "ZeRO-3": {"processes": 1, "deepspeed": "zero3.json"},
    "ZeRO-3, compiled": {"processes": 1, "deepspeed": "zero3.json", "compile_layers": True},
    "ZeRO-3, offloaded": {"processes": 1, "deepspeed": "zero3_offload.json"},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_plain_training(plain, mixed, tmp_path, mode):
    out = run(mixed, tmp_path / "out", **MODES[mode])
    expected, got = history(plain), history(out)
    assert got.keys() == expected.keys() == {1, 2, 3, 4}
    for step in expected:
        assert got[step] == pytest.approx(expected[step], abs=1e-5), step
    assert held_out(out) == pytest.approx(held_out(plain), abs=1e-5) and len(held_out(plain)) == 4
    before, after, reached = (
        load_model(folder, "sdpa", torch.float32).state_dict() for folder in (mixed[0], plain, out)
    )
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3
    for name in after:
        assert torch.allclose(reached[name], after[name], atol=2e-6), name
    # Under the parameter names of the published Qwen2.5-VL.
    assert load_file(out / "model.safetensors").keys() == load_file(mixed[0] / "model.safetensors").keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": "zero3.json"},
        {"deepspeed": "zero1.json", "gradient_checkpointing": True, "checkpoint_layers": 1, "compile_layers": True},
    ],
)
def test_adapters_alone_have_the_same_gradients_under_deepspeed(mixed, tmp_path, changes):
    """The inputs of the first layer require no gradient then."""
    adapters = {"lora_enable": True, "tune_mm_mlp": False, "tune_mm_vision": False, "eval_samples": 0}
    adapters |= {"eval_share": 0, "num_train_epochs": 1, "save_steps": 2}
    plain = history(run(mixed, tmp_path / "plain", **adapters))
    got = history(run(mixed, tmp_path / "out", **adapters, processes=1, **changes))
    assert plain.keys() == got.keys() == {1, 2} and plain[1][1] > 0.01
    for step in plain:
        assert got[step] == pytest.approx(plain[step], rel=1e-5), step


@pytest.mark.parametrize("lora, tower", [(False, True), (True, True), (False, False), (True, False)])
def test_gradient_checkpointing_recomputes_layers_and_keeps_gradients(made, lora, tower):
    """In the language model and in a vision tower that trains, whose layers must run twice. A frozen tower computes no
    gradient."""
    processor = load_processor(made[0])
    arguments = (processor, 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096)
    dataset = StreamingDataset(read_rows(made[1]), made[1].parent, *arguments)

    def gradients(recompute: bool) -> tuple[Counter, dict[str, torch.Tensor]]:
        given = ModelArguments(variant="group", model_name_or_path=str(made[0]), lora_enable=lora, tune_mm_vision=tower)
        model = load_model(made[0], "sdpa", torch.float32)
        model = make_trainable(model, given, SimpleNamespace(seed=1, deepspeed=None)).train()
        if recompute:
            model.activation_checkpointing_enable()
        runs = Counter()

        def count(_, inputs, part):
            runs.update([part])
            assert inputs[0].requires_grad is (tower or part == "language_model.layers.0"), part

        for name, layer in model.named_modules():
            for part in ("language_model.layers.0", "visual.blocks.0"):
                if part in name and name.endswith(".mlp"):
                    layer.register_forward_pre_hook(partial(count, part=part))
        batch = collate([dataset[0], dataset[1]])
        assert not batch.pop("tally")["bad"]
        mask = make_mask(batch.pop("visual"), batch.pop("text"), True, "sdpa")
        model(**batch, attention_mask=mask).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        return runs, found

    (once, expected), (twice, got) = gradients(False), gradients(True)
    assert len(once) == 2 and set(once.values()) == {1}
    assert twice == {"language_model.layers.0": 2, "visual.blocks.0": 2 if tower else 1}
    assert expected.keys() == got.keys() and any("lora" in name for name in got) is lora
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, atol=1e-6), name
    assert sum(gradient.abs().max() > 1e-4 for gradient in expected.values()) > len(expected) // 3


def test_compiled_layers_train_what_peft_copied(made):
    """With adapters on the language model, the vision tower trains in full, as a copy of its blocks."""
    processor = load_processor(made[0])
    arguments = (processor, 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096)
    dataset = StreamingDataset(read_rows(made[1]), made[1].parent, *arguments)
    given = ModelArguments(variant="group", model_name_or_path=str(made[0]), lora_enable=True, tune_mm_vision=True)

    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = load_model(made[0], "sdpa", torch.float32)
        model = make_trainable(model, given, SimpleNamespace(seed=1, deepspeed=None)).train()
        if compiled:
            compile_layers(model)
        batch = collate([dataset[0], dataset[1]])
        batch.pop("tally")
        mask = make_mask(batch.pop("visual"), batch.pop("text"), True, "sdpa")
        model(**batch, attention_mask=mask).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    torch.compiler.set_default_backend("eager")
    try:
        expected, got = gradients(False), gradients(True)
    finally:
        torch.compiler.set_default_backend("inductor")
    assert any("visual.blocks" in name for name in got) and expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert got[name] is not None and torch.allclose(got[name], gradient, atol=1e-6), name
