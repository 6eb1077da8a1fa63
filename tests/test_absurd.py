"""Absurd values in flags and files: each is reported in one line, quickly and with little memory."""

import json
import pickle
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from eval import resume
from metrics import lag
from planning import read_data
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.checkpoint import of_checkpoint, tensor_types
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.timeline.timeline import make_schedule
from qwen_vl_streaming.timeline.variants import get_variant
from results import check_row
from schedules import choose_schedules
from settings import Settings
from tasks import get_task
from test_results import row

DIGITS = "9" * 5000


def one_line(error) -> str:
    said = str(error.value)
    assert "\n" not in said and len(said) < 700, said
    return said


@pytest.mark.parametrize("claimed", ["9" * 400, DIGITS, "1e400", "NaN", "-1", "true", '"long"', "[5]", "{}" + DIGITS])
def test_durations(tmp_path, claimed):
    data = tmp_path / "data.jsonl"
    fields = '"video_id": "a", "video_path": "a.mp4", "human_caption": "words"'
    data.write_text(f'{{{fields}, "video_duration_in_s": {claimed}}}\n')
    with pytest.raises(InputError, match=r"data\.jsonl, line 1") as error:
        read_data(data, None, get_task("description"))
    one_line(error)


@pytest.mark.parametrize("text", ["wait-" + DIGITS, "random-" + DIGITS, "wait-1000000", "wait-\u0663", "wait-1e3"])
def test_schedules(tmp_path, text):
    with pytest.raises(InputError, match="unknown schedule") as error:
        make_schedule(text, get_variant("group"), 3)
    one_line(error)
    with pytest.raises(InputError, match="unknown schedule") as error:
        choose_schedules(text, get_variant("group"), 3, 0, ["a"], tmp_path)
    one_line(error)


def test_schedules_from_a_file(tmp_path):
    for counts in ("[1000000000000]", f"[{DIGITS}]", "[true]", "[1e3]", "[" * 100_000):
        (tmp_path / "counts.json").write_text(f'{{"a": {counts}}}')
        with pytest.raises(InputError) as error:
            choose_schedules(str(tmp_path / "counts.json"), get_variant("group"), 3, 0, ["a"], tmp_path)
        one_line(error)


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "batch_size", "repetition_penalty", "limit", "seed", "processes", "workers"]
)
@pytest.mark.parametrize("value", [10**30, 10**400, -(10**30), float("nan"), float("inf")])
def test_settings(name, value):
    with pytest.raises(InputError, match="--" + name.replace("_", "-")) as error:
        Settings(**{name: value})
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": [10**12, 2]},
        {"schedule": [10**12, 2], "slots": [1] * 5},
        {"tokens": [10**30] * 5},
        {"tokens": [True] * 5},
        {"tokens": [1.0] * 5},
        {"tokens": ["1"] * 5},
        {"slots": [True, True, True, 2, 2]},
        {"schedule": [[3], 2]},
        {"clips": True},
        {"clips": 10**400},
        {"seconds": float("nan")},
        {"seconds": 10**400},
        {"seconds": -1},
        {"seconds": True},
        {"tokens": [[]] * 5, "slots": [None] * 5},
    ],
)
def test_rows(tmp_path, change):
    """Of a result file, and of a run that is resumed."""
    bad = row("a", **change)
    with pytest.raises(InputError) as error:
        check_row("x.json, video 'a'", bad, "group")
    one_line(error)

    work = SimpleNamespace(out=tmp_path / "group_infer.json", rows=[{"video_id": "a"}], variant=get_variant("group"))
    work.out.write_text(json.dumps(bad) + "\n")
    (tmp_path / "group_infer.args.json").write_text("{}")
    with pytest.raises(InputError) as error:
        resume(work, {})
    one_line(error)


def test_rows_of_another_program():
    """Scored without their arguments; their durations are not trusted."""
    good = row("a")
    lag.check(good)
    for change in (
        {"tokens": [10**30] * 5},
        {"tokens": 5},
        {"slots": [True] * 5},
        {"clips": "2"},
        {"slots": ["1"] * 5},
    ):
        with pytest.raises(ValueError, match="video a"):
            lag.check({**good, **change})


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "empty", "header", "lies", "deep", "list"])
def test_weights(made, tmp_path, monkeypatch, name, kind):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    path = folder / name

    def header(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    if kind == "torch":
        torch.save({"x": Evil()}, path)
    else:
        tensor = '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [9, -99999999]}}'
        path.write_bytes(
            {
                "pickle": pickle.dumps(Evil()),
                "empty": b"",
                "header": struct.pack("<Q", 2**45) + b"{}" * 99,
                "lies": header(tensor),
                "deep": header("[" * 200_000),
                "list": header("[]"),
            }[kind]
        )
    loads = [lambda: load_model(folder, "sdpa", torch.float32), lambda: tensor_types(path)]
    for load in loads[: 1 if kind == "lies" else 2]:
        with pytest.raises(InputError) as error:
            load()
        one_line(error)
    if name == "model.safetensors":
        with pytest.raises(InputError) as error:
            of_checkpoint(str(folder))
        one_line(error)
    assert not (tmp_path / "ran").exists()
