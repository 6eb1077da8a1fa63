"""Invalid flags, ZeRO files and data are refused in one line, before a model loads and anything is written."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from qwen_vl_streaming.devices import Devices
from qwenvl import device, train
from qwenvl.argument_checks import REFUSED
from qwenvl.arguments import DataArguments, ModelArguments
from qwenvl.folder import lock_folder
from qwenvl.training_arguments import SftArguments
from safetensors.torch import load_file
from training import finish, flags, history, refused, spoil, start_many

ZERO2 = Path(train.__file__).parents[1] / "zero2.json"


@pytest.fixture
def refusal(made, tmp_path, capsys, monkeypatch):
    """A function that returns the error line for a string of flags."""
    monkeypatch.setattr(train, "load_model", None)

    def refusal(more: str, **changes) -> str:
        line = refused([*flags(made, tmp_path / "out", **changes), *more.split()], capsys, monkeypatch)
        assert not (tmp_path / "out").exists()
        return line

    return refusal


@pytest.mark.parametrize(
    "more, reason",
    [
        ("--learning_rate abc", "--learning_rate"),
        ("--learning_rate -1", "--learning_rate -1.0: must be at least 0"),
        ("--learning_rate nan", "--learning_rate nan: must be finite"),
        ("--warmup_steps 3.5", "--warmup_steps 3.5: must be a whole number of steps"),
        ("--warmup_ratio 3", "unknown flags: --warmup_ratio 3"),
        ("--num_train_epochs -1", "--num_train_epochs -1.0: must be above 0"),
        ("--max_steps 0", "--max_steps 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: must be above 0"),
        ("--per_device_eval_batch_size -2", "--per_device_eval_batch_size -2: must be above 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be above 0"),
        ("--save_steps 0", "--save_steps 0.0: must be above 0"),
        ("--logging_steps 2.5", "--logging_steps 2.5: must be a whole number"),
        ("--save_total_limit -1", "--save_total_limit -1: must be at least 0"),
        ("--weight_decay -1", "--weight_decay -1.0: must be at least 0"),
        ("--max_grad_norm inf", "--max_grad_norm inf"),
        ("--adam_beta2 1", "--adam_beta2 1.0"),
        ("--seed -1", "--seed -1"),
        ("--max_bad_share 2", "--max_bad_share 2.0"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers -1"),
        ("--dataloader_persistent_workers True", "--dataloader_num_workers above 0"),
        (
            "--keep_frames True --dataloader_num_workers 2 --dataloader_persistent_workers False",
            "--dataloader_persistent_workers False: omit one of them",
        ),
        ("--dataloader_prefetch_factor 2", "flags are invalid (--dataloader_prefetch_factor"),
        (
            "--per_device_train_batch_size 9 --dataloader_drop_last True",
            "only 8 of 8 samples remain, and at least 9 are needed",
        ),
        ("--save_strategy nonsense", "invalid choice: 'nonsense'"),
        ("--save_strategy best", "--save_strategy best is not supported"),
        ("--eval_strategy steps", "give --eval_share or --eval_samples"),
        ("--eval_share 0.01", "--eval_share 0.01 of 8 samples is 0"),
        ("--lr_scheduler_type nonsense", "nonsense is not a valid SchedulerType"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ("--lr_scheduler_kwargs abc", "--lr_scheduler_kwargs abc: give a JSON object"),
        ("--lr_scheduler_kwargs {", "the training flags are invalid"),
        ("--optim adamw_bnb_8bit", "bitsandbytes"),
        ("--optim_args foo", "correct --optim_args"),
        ("--bf16 True --use_cpu False", "--bf16 True: no GPU of this machine supports bfloat16"),
        ("--fp16 True", "--fp16 True: train in bfloat16"),
        ("--tf32 True", "--tf32 requires"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1: it would shift the labels"),
        ("--auto_find_batch_size True", "--per_device_train_batch_size that fits"),
        ("--do_eval True", "--do_eval True: set the number of samples with --eval_share"),
        ("--do_predict True", "--do_predict True: eval.sh generates captions"),
        ("--logging_nan_inf_filter True", "unknown flags: --logging_nan_inf_filter"),
        ("--ignore_data_skip True", "must skip the data that it has seen"),
        ("--fsdp full_shard", "--deepspeed zero3.json"),
        ("--torch_compile True", "--compile_layers True"),
        ("--resume_from_checkpoint x", "the same command resumes"),
        ("--attention flex_attention", "does not train on a CPU"),
        ("--attention flex", "choose auto, sdpa, flex_attention or flash_attention_2"),
        ("--variant batch --attention flash_attention_2", "is not installed"),
        ("--variant batch --attention flash_attention_2 --pack_tokens 512", "does not support packed samples"),
        ("--model_max_length 0", "--model_max_length 0"),
        ("--model_max_length 30", "are 36 tokens, and the maximum length is 30"),
        ("--pack_tokens 30", "and --pack_tokens if it is set"),
        ("--min_pixels_per_frame 5", "min_pixels_per_frame 5 must be between"),
        ("--output_dir=", "--output_dir is empty"),
        ("--lora_r 8", "--lora_r 8 has no effect without adapters: give --lora_enable True"),
        ("--lora_targets q_proj", "--lora_targets ['q_proj'] has no effect without adapters"),
        ("--output_dir /dev/null", "--output_dir /dev/null cannot be written to"),
        ("--train_data .", "is a folder that was not written by `Dataset.save_to_disk`"),
    ],
)
def test_flags(refusal, more, reason):
    if torch.cuda.is_available() and any(word in more for word in ("use_cpu", "tf32", "flash")):
        pytest.skip("a GPU can do this")
    assert reason in refusal(more)


def test_help_shows_supported_flags_in_groups(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft.sh", "--help"])
    with pytest.raises(SystemExit) as ended:
        train.parse()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, said.splitlines())) <= 120
    titles = re.findall(r"^(\S.*):$", said, re.MULTILINE)
    assert titles == ["model", "data", "recipe and output", "run", "the other flags of transformers' TrainingArguments"]
    shown = re.findall(r"^  --(\w+)", said, re.MULTILINE)
    assert shown[0] == "model_name_or_path" and len(shown) == len(set(shown)) > 100
    kinds = ModelArguments, DataArguments, SftArguments
    every = {field.name for kind in kinds for field in fields(kind) if field.init}
    assert set(shown) == every - REFUSED.keys() and REFUSED.keys() <= every
    for name, text in (
        ("bf16", "(default: True)"), ("tune_mm_llm", "(default: True)"), ("learning_rate", "(default: 2e-05)"),
        ("lr_scheduler_type", "(default: cosine)"), ("output_dir", "qwen2_5vl-pe-<variant>"),
    ):  # fmt: skip
        assert text in re.search(rf"^  --{name} (.*\n(?:   .*\n)*)", said, re.MULTILINE)[1]


def test_workers_that_keep_frames_are_kept(made, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for more, kept in (
        ({}, False),
        ({"keep_frames": True}, True),
        ({"keep_frames": True, "dataloader_num_workers": 0}, False),
        ({"keep_frames": True, "dataloader_num_workers": 0, "dataloader_persistent_workers": False}, False),
        ({"dataloader_persistent_workers": True}, True),
        ({"keep_frames": False, "dataloader_persistent_workers": False}, False),
    ):
        given = {"dataloader_num_workers": 2, **more}
        monkeypatch.setattr("sys.argv", ["sft.sh", *flags(made, tmp_path, **given)])
        assert train.parse()[-1].dataloader_persistent_workers is kept, more


@pytest.mark.parametrize("name", REFUSED)
def test_every_unsupported_flag_is_refused_with_what_to_do(refusal, name):
    (field,) = (field for field in fields(SftArguments) if field.name == name)
    others = {"label_smoothing_factor": "0.5", "hub_strategy": "end", "liger_kernel_config": ""}
    value = str(not field.default) if "bool" in str(field.type) else "{}"
    assert refusal(f"--{name}={others.get(name, value)}").endswith(f": {REFUSED[name]}")


def test_more_processes_than_gpus(refusal, monkeypatch):
    monkeypatch.setattr(device, "look", lambda environment: Devices(1, bfloat16=True))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 processes on a machine with 1 GPUs: lower NPROC_PER_NODE" in refusal("--use_cpu False")


ZERO = {"stage": 2}


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        ([], "has no zero_optimization"),
        ({}, "has no zero_optimization"),
        ({"zero_optimization": {"stage": 7}}, "stage"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
        ({"zero_optimization": ZERO, "optimizer": {"type": "AdamW"}}, "sets an optimizer"),
        ({"zero_optimization": ZERO, "scheduler": {"type": "WarmupLR"}}, "sets a scheduler"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save"),
        ({"zero_optimization": ZERO}, "start training with scripts/sft.sh"),  # the test is a single process
    ],
)
def test_zero_files(refusal, tmp_path, content, reason):
    file = tmp_path / "zero.json"
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in refusal(f"--deepspeed {file}")


def test_zero_file_against_the_flags(made, tmp_path):
    file, log = tmp_path / "zero.json", tmp_path / "log"
    file.write_text(json.dumps({**json.loads(ZERO2.read_text()), "train_batch_size": 7}))
    (process,) = start_many(1, flags(made, tmp_path / "out", deepspeed=file), log)
    finish(process, 2)
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "train_batch_size=7" in error and "Traceback" not in log.read_text() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"video_id": "\xe9", "video_path": "a.mp4", "human_caption": "b"}', "cannot be read as UTF-8"),
        (
            b'{"video_id": 1, "video_path": "a.mp4", "human_caption": null}',
            "has the human_caption null, which is not a string",
        ),
        (b'{"video_id": 1, "video_path": 2, "human_caption": "b"}', "has the video_path 2, which is not a string"),
        (b'{"video_id": true, "video_path": "a", "human_caption": "b"}', "has the video_id true"),
        (b'{"video_id": 1, "video_path": "a.mp4"}', "has no human_caption"),
        (rb'{"video_id": 1, "video_path": "a.mp4", "human_caption": "\ud800"}', "human_caption has an unpaired"),
        (rb'{"video_id": "\udfff", "video_path": "a.mp4", "human_caption": "b"}', "video_id has an unpaired"),
        (rb'{"video_id": 1, "video_path": "\udc80.mp4", "human_caption": "b"}', "video_path has an unpaired"),
        (
            rb'{"video_id": 1, "video_path": "a", "human_caption": "b", "question": "\ud801"}',
            "question has an unpaired",
        ),
        (b'{"video_id": 1, "video_path": "a", "human_caption": "b", "question": " "}', "has the question"),
        (b"[1]", "is not a JSON object"),
        (b"{", "is not JSON"),
        (b'{"video_id": ' + b"9" * 5000 + b"}", "a number that is too long"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_invalid_lines_of_the_data(refusal, made, tmp_path, line, reason):
    data = tmp_path / "train.jsonl"
    data.write_bytes(made[1].read_bytes() + line + b"\n")
    said = refusal("", train_data=data)
    assert f"{data}, line 9: " in said and reason in said


def test_two_rows_with_one_id(refusal, made, tmp_path):
    lines = made[1].read_text().splitlines(keepends=True)
    data = tmp_path / "train.jsonl"
    data.write_text("".join([*lines, lines[3]]))
    assert f"{data}, lines 4 and 9 both have the video_id" in refusal("", train_data=data)


def test_a_model_of_another_variant(refusal, made, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(made[0], model)
    config = json.loads((model / "config.json").read_text())
    for trained, said in (("gap", "trained as gap, not group"), ("group", "trained with another rule")):
        (model / "config.json").write_text(json.dumps({**config, "streaming_variant": trained}))
        assert f"{model} was {said}" in refusal("", model_name_or_path=model)
    assert "are 36 tokens" in refusal("--force True --model_max_length 30", model_name_or_path=model)


def test_folders_with_other_files_are_refused(made, tmp_path, capsys, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(made[0], model)
    said = refused(flags((model, made[1]), tmp_path / "out/../model"), capsys, monkeypatch)
    assert "is the initial model, which would be overwritten" in said
    (out / "checkpoint-500").mkdir(parents=True)
    assert f"{out / 'checkpoint-500'} has no progress.json" in refused(flags(made, out), capsys, monkeypatch)
    before = (model / "model.safetensors").read_bytes()
    said = refused(flags(made, model), capsys, monkeypatch)
    assert f"{model}/" in said and "was not written by a training run, and would be overwritten" in said
    assert (model / "model.safetensors").read_bytes() == before
    for name, make in (("runs", Path.touch), ("being_saved", Path.touch), ("loss.png", Path.mkdir)):
        (tmp_path / f"with {name}").mkdir()
        make(tmp_path / f"with {name}" / name)
        said = refused(flags(made, tmp_path / f"with {name}"), capsys, monkeypatch)
        assert f"{name} is not a " in said
    assert "cannot be written to" in refused(flags(made, tmp_path / ("x" * 300)), capsys, monkeypatch)


def test_a_nan_or_infinite_loss_ends_the_run(made, tmp_path, capsys, monkeypatch):
    """No checkpoint has NaN weights, and the curves show the step."""
    out = tmp_path / "out"
    said = refused(flags(made, out, learning_rate=1e30, save_steps=1), capsys, monkeypatch)
    assert re.search(r"(loss|grad_norm) is (nan|inf) at step \d", said) and "lower --learning_rate" in said
    assert not (out / "config.json").exists() and (out / "loss.png").exists()
    assert json.loads((out / "run.json").read_text())["starts"][-1]["how"] in said
    for weights in out.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_a_full_disk_is_reported_and_the_same_command_resumes(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = flags(made, out, max_steps=4, save_steps=2)
    saved = torch.save

    def full(what, path, *rest, **options):
        if "optimizer" in str(path) and "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
        saved(what, path, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert f"{out} cannot be written (" in refused(arguments, capsys, monkeypatch)
    assert "cannot be written" in json.loads((out / "run.json").read_text())["starts"][-1]["how"]
    assert (out / "checkpoint-2/progress.json").exists() and not (out / "checkpoint-4").exists()
    monkeypatch.setattr("sys.argv", ["sft.sh", *arguments])
    train.main()
    assert sorted(history(out)) == [1, 2, 3, 4]


def test_only_bad_samples_end_the_run(made, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) for line in made[1].read_text().splitlines()]
    for row in rows:
        row["video_path"] = str(spoil(Path(row["video_path"]), tmp_path / f"{row['video_id']}.mp4"))
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(flags(made, tmp_path / "out", train_data=data, max_bad_share=1), capsys, monkeypatch)
    assert "8 of 8 samples are bad" in said and said.endswith(": fix the data")


def test_a_locked_folder_is_refused(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    program = "import sys; from pathlib import Path; from qwenvl.folder import lock_folder\n"
    program += "with lock_folder(Path(sys.argv[1]), True): print('held', flush=True); sys.stdin.read()"
    command, pipes = [sys.executable, "-c", program, out], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ZERO2.parent, **pipes) as other:
        while other.stdout.readline() != b"held\n":
            assert other.poll() is None
        assert f"another run is using {out}" in refused(flags(made, out), capsys, monkeypatch)
        other.kill()
    with lock_folder(out, True):
        pass


def test_invalid_files_in_the_output_folder(made, tmp_path, capsys, monkeypatch):
    for name in ("config.json", "run.json"):
        out = tmp_path / name.removesuffix(".json")
        out.mkdir()
        (out / name).write_text("{")
        assert f"{out / name} cannot be read" in refused(flags(made, out), capsys, monkeypatch)
    for broken in ('{"arguments": null}', '{"starts": {}}'):
        (out / "run.json").write_text(broken)
        assert f"{out / 'run.json'} has invalid " in refused(flags(made, out), capsys, monkeypatch)
