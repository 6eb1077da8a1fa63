"""The record of a run: run.json, throughput, curves, TensorBoard, and the loss on held-out samples."""

import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from matplotlib import image
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl.batches import collate
from qwenvl.curves import draw_curves
from qwenvl.data import IGNORED, StreamingDataset
from qwenvl.record import commit
from qwenvl.rows import file_of, hold_out, read_rows
from qwenvl.throughput import Throughput
from qwenvl.training_arguments import SftArguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import finish, flags, history, spoil, start


def test_the_record_of_a_run(made, tmp_path):
    """A run that is stopped once, with three held-out samples, one of them bad: the record covers both starts."""
    rows = read_rows(made[1])
    _, held = hold_out(rows, 0.0, 3, seed=42)
    for row in rows:
        if row["video_id"] == held[0]["video_id"]:
            row["video_path"] = str(spoil(Path(row["video_path"]), tmp_path / "spoilt.mp4"))
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(
        made,
        out,
        train_data=data,
        eval_samples=3,
        eval_steps=2,
        num_train_epochs=2,
        max_bad_share=0.2,
        report_to="wandb",
    )
    finish(start(arguments, log), 2)
    assert log.read_text().splitlines()[-1].startswith("error: --report_to wandb is not installed")
    assert not out.exists()

    arguments[arguments.index("wandb")] = "tensorboard"
    finish(start(arguments, log, "SIGTERM", 3), 143)
    finish(start(arguments, log))
    record = json.loads((out / "run.json").read_text())
    assert record["variant"] == "group" and record["schedule"] == "wait-3" and record["world_size"] == 1
    assert record["arguments"]["learning_rate"] == 1e-3 and record["arguments"]["max_pixels_per_frame"] == 3136
    assert torch.__version__.startswith(record["versions"]["torch"]) and record["versions"]["peft"]
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert (record["data"]["rows"], record["data"]["held_out"]) == (8, 3)
    assert [(one["from_step"], one["to_step"], one["how"]) for one in record["starts"]] == [
        (0, 3, "stopped by SIGTERM"),
        (3, 6, "finished"),
    ]
    assert "--eval_samples 3" in record["starts"][0]["command"] and record["finished"]
    for entry in record["starts"]:
        parts = entry["seconds_to_first_step"]
        assert list(parts) == ["data", "model", "optimizer", "first batch", "first step"] and min(parts.values()) >= 0
    assert len(re.findall(r"^first step after [\d.]+ s: data [\d.]+, model ", log.read_text(), re.MULTILINE)) == 2

    throughput = json.loads((out / "throughput.json").read_text())
    left, _ = hold_out(read_rows(data), 0.0, 3, seed=42)
    good = [row for row in left if "spoilt" not in row["video_path"]]
    assert (throughput["steps"], throughput["samples"]) == (6, 2 * len(good))
    assert 0 < throughput["seconds_waiting_for_data"] < throughput["seconds"]
    assert throughput["tokens_per_second"] == pytest.approx(throughput["tokens"] / throughput["seconds"])
    assert throughput["peak_memory_bytes"] > 2**27
    assert image.imread(out / "loss.png").shape[:2] == (720, 840)

    entries = json.loads((out / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    measured = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    assert [step for step, _ in measured] == [2, 4, 6] and all(3 < loss < 9 for _, loss in measured)
    # The bad sample is skipped and reported; both starts continue one TensorBoard curve.
    (bad,) = (json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines())
    assert bad["video_id"] == held[0]["video_id"]
    curve = EventAccumulator(str(out / "runs")).Reload().Scalars("train/loss")
    losses = history(out)
    assert [(point.step, pytest.approx(point.value)) for point in curve] == [(s, losses[s][0]) for s in range(1, 7)]


def test_held_out_rows_are_whole_videos(made):
    rows = [{"video_path": f"{i // 2}.mp4", "video_id": i} for i in range(20)]
    left, held = hold_out(rows, 0.1, 0, seed=1)
    assert len(held) == 2 and len({row["video_path"] for row in held}) == 1
    assert sorted([*left, *held], key=lambda row: row["video_id"]) == rows and (left, held) == hold_out(rows, 0.1, 0, 1)
    assert hold_out(rows, 0.0, 0, 1) == (rows, [])
    with pytest.raises(InputError, match="lower --eval_samples"):
        hold_out(rows, 0.0, 20, 1)
    with pytest.raises(InputError, match="--eval_share 1"):
        SftArguments(output_dir="x", use_cpu=True, bf16=False, eval_share=1)


def test_one_video_in_several_spellings_is_on_one_side(tmp_path):
    (tmp_path / "films").mkdir()
    for number in range(6):
        (tmp_path / f"films/{number}.mp4").write_bytes(b"")
    (tmp_path / "link.mp4").symlink_to("films/0.mp4")
    spellings = ("films/{}.mp4", "{}.mp4", f"{tmp_path}/films/{{}}.mp4", "./films/../films/{}.mp4", "gone/gone{}.mp4")
    paths = [spelling.format(number) for number in range(6) for spelling in spellings] + ["link.mp4"]
    rows = [{"video_path": path, "video_id": i} for i, path in enumerate(paths)]
    find = partial(file_of, root=tmp_path, video_root=tmp_path / "films")
    for seed in range(10):
        left, held = hold_out(rows, 0.4, 0, seed, find)
        assert sorted([*left, *held], key=lambda row: row["video_id"]) == rows
        sides = [{find(row["video_path"]) for row in side} for side in (left, held)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12


@pytest.mark.parametrize("pack_tokens", [0, 600])
def test_tokens_are_counted_without_padding(made, pack_tokens):
    processor = load_processor(made[0])
    arguments = (processor, 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096)
    dataset = StreamingDataset(read_rows(made[1]), made[1].parent, *arguments)
    samples = [dataset[i] for i in range(5)]
    batch = collate(samples, pack_tokens)
    assert batch["input_ids"].numel() > sum(len(sample.input_ids) for sample in samples)
    throughput = Throughput(torch.device("cpu"))
    tally = collate([*samples, dataset.blank(dataset.templates[0])], pack_tokens)["tally"]
    throughput.count(tally["samples"], tally["tokens"])
    assert throughput.work().samples == 5
    assert throughput.work().tokens == sum(len(sample.input_ids) for sample in samples)
    assert int((batch["labels"] != IGNORED).sum()) > 0


def test_curves_of_incomplete_histories(tmp_path):
    assert not draw_curves([{"step": 1, "train_loss": 2.0}], tmp_path / "none.png", "nothing was logged")
    assert not (tmp_path / "none.png").exists()
    losses = [*(math.exp(-s) for s in range(5)), math.nan]
    assert draw_curves([{"step": s, "loss": loss} for s, loss in enumerate(losses)], tmp_path / "some.png", "no norms")
    assert draw_curves([{"step": 1, "loss": math.nan}], tmp_path / "nan.png", "nothing but NaN")
    assert image.imread(tmp_path / "some.png").std() > 0


def test_git_is_optional(tmp_path):
    assert commit(tmp_path) is None


@pytest.mark.parametrize(
    "given, when",
    [
        ({"save_strategy": "epoch"}, ("epoch", None)),
        ({"save_strategy": "epoch", "eval_steps": 7}, ("steps", 7)),
        ({"eval_strategy": "steps", "save_steps": 8}, ("steps", 8)),
        ({"save_steps": 30}, ("steps", 30)),
    ],
)
def test_the_held_out_loss_is_measured_when_a_checkpoint_is_saved(given, when):
    arguments = SftArguments(output_dir="x", use_cpu=True, bf16=False, eval_samples=1, **given)
    assert (arguments.eval_strategy.value, when[1] and arguments.eval_steps) == when
