"""Which parameters train: freezing, adapters, learning rates and weight decay by part, and merging."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_layout import write_checkpoint
from make_model import SPECIAL_TOKENS, TINY, make_config, make_model
from peft import PeftModel
from program_server import with_server
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.model.base_files import BaseFiles
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl import merge, train
from qwenvl.arguments import ModelArguments
from qwenvl.checkpointing import save_final_model
from qwenvl.data import StreamingDataset
from qwenvl.folder import check_folder
from qwenvl.param_groups import freeze, make_trainable
from qwenvl.rows import read_rows
from qwenvl.training_arguments import SftArguments
from refusing import refused
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as StockModel

SHORT = (
    "--variant group --use_cpu True --bf16 False --gradient_checkpointing False --report_to none --save_strategy no "
    "--dataloader_num_workers 0 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --warmup_steps 0 "
    "--lr_scheduler_type constant --min_pixels_per_frame 3136 --max_pixels_per_frame 3136"
)
ADAPTERS = "--lora_enable True --lora_r 4 --lora_alpha 8"


@pytest.fixture(scope="module")
def untied(made, tmp_path_factory):
    """A tiny checkpoint with an untied lm_head, in bfloat16 like the published ones."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = load_processor(made[0]).tokenizer
    config = make_config(tokenizer, TINY)
    config.tie_word_embeddings = False
    model = make_model(config, seed=1).to(torch.bfloat16)
    write_checkpoint(folder / "model", model, tokenizer, SPECIAL_TOKENS[1:], 3136)
    return folder / "model"


def flags(made, output: Path, more: str = "") -> list[str]:
    checkpoint, data = made
    paths = ["--model_name_or_path", str(checkpoint), "--train_data", str(data), "--output_dir", str(output)]
    return [*SHORT.split(), *paths, *more.split()]


def call(main, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
    run(main)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, "sdpa", torch.float32).state_dict()


def logits(model, made) -> torch.Tensor:
    """The logits of a complete sample, video included."""
    processor = load_processor(made[0])
    budget = PixelBudget(3136, 3136)
    data = StreamingDataset(
        read_rows(made[1]), made[1].parent, processor, 2, VARIANTS["origin"], "wait-3", budget, 4096
    )
    sample = data[0]
    with torch.no_grad():
        return model.eval()(
            input_ids=sample.input_ids[None],
            position_ids=sample.position_ids[:, None],
            pixel_values_videos=sample.pixel_values,
            video_grid_thw=sample.grid_thw[None],
        ).logits


@pytest.fixture(scope="module")
def training() -> SftArguments:
    return SftArguments(output_dir="unused", bf16=False, use_cpu=True)


def tune(**given) -> ModelArguments:
    return ModelArguments(variant="group", **given)


@pytest.mark.parametrize("tied", [True, False])
def test_freezing_freezes(made, untied, tied):
    model = load_model(made[0] if tied else untied, "sdpa", torch.float32)
    names = {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in names) is not tied

    def trained(**given):
        freeze(model, tune(**given))
        assert model.lm_head.weight.requires_grad is given.get("tune_mm_llm", True)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained() == {name for name in names if "visual" not in name or "visual.merger" in name}
    assert trained(tune_mm_llm=False) == {name for name in names if "visual.merger" in name}
    no_merger = {name for name in names if "visual.merger" not in name}
    assert trained(tune_mm_mlp=False, tune_mm_vision=True) == no_merger


def assert_one_step_at(rates: dict[str, float], decay: float, before: dict, after: dict) -> None:
    """AdamW's first step moves each weight by its learning rate, after decay, so the change shows both."""
    for part, rate in rates.items():
        moved = []
        for name, old in before.items():
            where = "merger" if "visual.merger" in name else "vision" if "visual" in name else "language"
            if where != part:
                continue
            vector = name.endswith("bias") or any(word in name for word in ("norm", "ln_q"))
            expected = old * (1 if vector else 1 - rate * decay)
            moved.append((after[name] - expected).abs().max().item())
            assert moved[-1] <= 1.01 * rate + 1e-7, name
        assert max(moved) >= 0.99 * rate


RATES = {"language": 1e-3, "merger": 1e-4, "vision": 3e-4}
ONE_STEP = (
    "--max_steps 1 --learning_rate 1e-3 --mm_projector_lr 1e-4 --vision_tower_lr 3e-4 --weight_decay 100 "
    "--tune_mm_vision True --max_grad_norm 0"
)


def test_each_part_has_its_learning_rate_and_norms_have_no_weight_decay(made, tmp_path, monkeypatch):
    call(train.main, flags(made, tmp_path / "out", ONE_STEP), monkeypatch)
    assert_one_step_at(RATES, 100, weights(made[0]), weights(tmp_path / "out"))


def launched(arguments: list[str]) -> None:
    """Train as sft.sh does on a CPU: with the launcher and DeepSpeed."""
    folder = Path(train.__file__).parents[1]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "qwen_vl_streaming.launch", "--nproc_per_node", "1", "--standalone"]
    command += ["-m", "qwenvl.rank", *arguments]
    done = subprocess.run(command, cwd=folder, env=with_server(environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_adapters_and_rates_under_zero3(made, tmp_path):
    """Adapters on the language model, merger and tower in full, all partitioned by ZeRO-3."""
    out = tmp_path / "out"
    launched(flags(made, out, f"{ONE_STEP} {ADAPTERS} --deepspeed zero3.json"))
    merge.merge(out, tmp_path / "merged")
    before, after = weights(made[0]), weights(tmp_path / "merged")
    visual = {name for name in before if "visual" in name}
    rates = {part: RATES[part] for part in ("merger", "vision")}
    assert_one_step_at(rates, 100, {name: before[name] for name in visual}, after)
    adapter = load_file(out / "adapter_model.safetensors")
    moved = [tensor.abs().max().item() for name, tensor in adapter.items() if "lora_B" in name]
    assert len(moved) == 7 * 2 and all(abs(value - 1e-3) < 1e-5 for value in moved)


def test_only_adapters_and_the_merger_train(made, tmp_path, monkeypatch, recwarn):
    """Trained, saved by peft, merged by the command and loaded by stock transformers: the same logits."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    out, merged = tmp_path / "out", tmp_path / "merged"
    call(train.main, flags(made, out, f"--max_steps 3 --learning_rate 1e-2 {ADAPTERS}"), monkeypatch)
    assert not list(out.glob("model*.safetensors"))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(made[0])
    adapter = load_file(out / "adapter_model.safetensors")
    layers = {name.split(".lora_")[0] for name in adapter if ".lora_" in name}
    assert len(layers) == 7 * 2 and all(".language_model.layers." in name for name in layers)
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    rest = {name.removeprefix("base_model.model.") for name in adapter if ".lora_" not in name}
    before = weights(made[0])
    assert rest == {name for name in before if "visual.merger" in name}

    call(merge.main, ["--adapter", out, "--output", merged], monkeypatch)
    record, of_merged = (json.loads((folder / "run.json").read_text()) for folder in (out, merged))
    assert of_merged == {**record, "merged": {"adapter": str(out), "base": str(made[0])}}
    assert record["recipe_differences"]["lora_enable"] is False
    with pytest.raises(InputError, match=r"merged.*was not written by a training run, and would be overwritten"):
        check_folder(merged, "group", str(made[0]))
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert not [each for each in recwarn if "is_gradient_checkpointing" in str(each.message)]
    after = weights(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == rest | {f"{name.removeprefix('base_model.model.')}.weight" for name in layers}

    model = StockModel.from_pretrained(merged)
    assert (model.config.streaming_variant, model.config.wait_k) == ("group", 3)
    assert load_processor(merged).tokenizer.get_vocab() == load_processor(made[0]).tokenizer.get_vocab()
    adapted = PeftModel.from_pretrained(StockModel.from_pretrained(made[0]), out)
    assert (logits(model, made) - logits(adapted, made)).abs().max() < 1e-5
    assert (logits(model, made) - logits(StockModel.from_pretrained(made[0]), made)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "adapted", "whole"),
    [
        ({}, "language_model", "visual.merger"),
        ({"tune_mm_mlp": False, "tune_mm_vision": True}, "language_model", "visual.(blocks|patch_embed)"),
        ({"lora_targets": ["[qkvo]_proj", "qkv", "merger.mlp.2"], "tune_mm_vision": True}, "attn|merger.mlp.2", "none"),
        ({"lora_targets": ["qkv"], "tune_mm_llm": False, "tune_mm_vision": True}, "visual.blocks", "visual.merger"),
        ({"lora_targets": ["gate_proj", "lm_head"], "tune_mm_mlp": False}, "language_model|lm_head", "none"),
    ],
)
def test_merged_equals_unmerged(made, untied, training, tmp_path, given, adapted, whole):
    """For adapters and whole modules in every part: only they train, and merging them changes no logit."""
    base = tmp_path / "base"
    shutil.copytree(untied if "lm_head" in given.get("lora_targets", "") else made[0], base)
    model = load_model(base, "sdpa", torch.float32)
    names = [name for name, _ in model.named_parameters()]
    model = make_trainable(
        model, tune(model_name_or_path=str(base), lora_enable=True, lora_r=4, lora_alpha=4, **given), training
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        assert re.search(adapted if "lora_" in name else whole, name), name
        parameter.data += 0.05 * torch.randn_like(parameter)
    assert any("lora_" in name for name in trained)
    in_full = {name[len("base_model.model.") :].replace("modules_to_save.default.", "") for name in trained}
    assert {name for name in in_full if "lora_" not in name} == {name for name in names if re.search(whole, name)}
    model.save_pretrained(tmp_path / "adapter")
    BaseFiles.of(base).write(tmp_path / "adapter", {"streaming_variant": "group", "wait_k": 3})
    merge.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = StockModel.from_pretrained(tmp_path / "merged")
    stock = StockModel.from_pretrained(base)
    assert merged.dtype == stock.dtype
    if stock.dtype == torch.float32:
        unmerged = PeftModel.from_pretrained(stock, tmp_path / "adapter")
        assert (logits(merged, made) - logits(unmerged, made)).abs().max() < 1e-5


def test_adapters_resume_from_a_checkpoint(made, tmp_path, monkeypatch):
    steps = f"--max_steps 4 --learning_rate 1e-2 {ADAPTERS} --save_strategy steps --save_steps 2"
    call(train.main, flags(made, tmp_path / "whole", steps), monkeypatch)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "halted/checkpoint-2")
    record = json.loads((tmp_path / "whole/run.json").read_text())
    (tmp_path / "halted/run.json").write_text(json.dumps({**record, "finished": None}))
    call(train.main, flags(made, tmp_path / "halted", steps), monkeypatch)
    whole, halted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halted"))
    early = load_file(tmp_path / "whole/checkpoint-2/adapter_model.safetensors")
    assert all(torch.equal(whole[name], halted[name]) for name in whole)
    assert any((whole[name] - early[name]).abs().max() > 1e-3 for name in whole)


def test_invalid_arguments_are_refused_before_a_model_loads(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    (tmp_path / "zero.json").write_text('{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}')
    for more, reason in (
        ("--lora_enable True --tune_mm_llm False", "matches no linear layer of the parts that train (merger)"),
        ("--lora_enable True --lora_targets q_proj w_proj", "--lora_targets w_proj matches no linear layer"),
        ("--lora_enable True --lora_targets qkv", "matches no linear layer"),
        ("--lora_enable True --lora_targets merger.mlp.0", "match no layer of the language model"),
        ("--lora_enable True --lora_targets q_proj lm_head", "which shares its weights with the embeddings"),
        ("--lora_enable True --lora_targets q_(proj", "is not a regular expression"),
        ("--lora_enable True --lora_r 0", "--lora_r 0"),
        ("--lora_enable True --lora_dropout 1", "--lora_dropout 1"),
        (f"--lora_enable True --model_name_or_path {tmp_path}", "has no config.json"),
        ("--optim galore_adamw", "creates its own parameter groups"),
        (
            "--mm_projector_lr 1e-4 --tune_mm_mlp False",
            "--mm_projector_lr has no effect on the merger, which does not train",
        ),
        ("--vision_tower_lr 1e-4", "--vision_tower_lr has no effect on the vision tower"),
        ("--vision_tower_lr -1 --tune_mm_vision True", "must be at least 0"),
        (f"--deepspeed {tmp_path / 'zero.json'}", "sets an optimizer"),
    ):
        assert reason in refused(call, capsys, train.main, flags(made, tmp_path / "out", more), monkeypatch)


def test_the_mode_of_a_model_with_adapters_reaches_every_layer(made, training):
    arguments = tune(model_name_or_path=str(made[0]), lora_enable=True, lora_r=4, lora_dropout=0.1)
    model = make_trainable(load_model(made[0], "sdpa", torch.float32), arguments, training)
    for mode in (True, True, False, False, True):
        model.train(mode)
        assert {layer.training for layer in model.modules()} == {mode}


def test_invalid_merges_are_refused(made, training, tmp_path, capsys, monkeypatch):
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    model = load_model(made[0], "sdpa", torch.float32)
    arguments = tune(model_name_or_path=str(made[0]), lora_enable=True, lora_r=4)
    make_trainable(model, arguments, training).save_pretrained(adapter)
    BaseFiles.of(made[0]).write(adapter, {"streaming_variant": "gap", "wait_k": 2})

    def reason(*more) -> str:
        return refused(call, capsys, merge.main, ["--adapter", adapter, "--output", output, *more], monkeypatch)

    assert "already exists" in reason("--output", made[0])
    (tmp_path / "file").touch()
    with monkeypatch.context() as patched:
        patched.setattr(merge, "load_model", None)  # it is reported before anything is computed
        assert "cannot be written (Not a directory)" in reason("--output", tmp_path / "file/merged")
    assert "has no adapter" in reason("--adapter", made[0])
    assert "has no config.json" in reason("--base", tmp_path)
    assert f"python -m qwenvl.merge --adapter {adapter}" in reason("--base", adapter)
    tokenizer = load_processor(made[0]).tokenizer
    for shape, says in (({"layers": 1}, "weights are in only one of them"), ({"hidden": 64}, "does not fit")):
        config = make_config(tokenizer, dataclasses.replace(TINY, **shape))
        write_checkpoint(tmp_path / says, make_model(config), tokenizer, SPECIAL_TOKENS[1:], 3136)
        assert says in reason("--base", tmp_path / says)
    config = adapter / "config.json"
    original = json.loads(config.read_text())
    for sha256, says in ((of_checkpoint(str(made[0])), "already exists"), ("0" * 64, "on a model other than")):
        config.write_text(json.dumps({**original, "base_sha256": sha256}))
        assert says in reason("--output", made[0] if says == "already exists" else output)
    config.write_text(json.dumps(original))
    shutil.copytree(made[0], tmp_path / "base", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    assert "no processor could be loaded" in reason("--base", tmp_path / "base")
    for name in ("config.json", "adapter_config.json"):
        sound = (adapter / name).read_text()
        for broken in ("[1]", "{}"):
            (adapter / name).write_text(broken)
            assert "error: " in reason()
        (adapter / name).write_text(sound)
    file = adapter / "adapter_model.safetensors"
    sound = load_file(file)
    for broken, says in (
        (
            {name: tensor for name, tensor in sound.items() if "merger.ln_q" not in name},
            "1 weights are in only one of them",
        ),
        ({name: tensor / 0 for name, tensor in sound.items()}, "NaN or infinite weights"),
    ):
        save_file(broken, file)
        assert says in reason()
    file.write_bytes(b"half")
    assert "cannot be read" in reason()
    (adapter / "config.json").unlink()
    assert "does not name the variant" in reason()
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_damaged_weights_are_named(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    for content in (weights.read_bytes()[:-100], b"half", b""):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"weights in .*(are damaged|cannot be read)"):
            load_model(tmp_path / "model", "sdpa", torch.float32)


def test_a_model_without_weights_is_not_saved(tmp_path):
    class Saver:
        def save_model(self, folder: str) -> None:
            Path(folder).mkdir()
            (Path(folder) / "config.json").touch()

        def is_world_process_zero(self) -> bool:
            return True

    with pytest.raises(RuntimeError, match="no weights were saved"):
        save_final_model(Saver(), tmp_path)
    assert not (tmp_path / "config.json").exists()
