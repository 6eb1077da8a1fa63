"""A run that is killed resumes from its newest complete checkpoint, with the same losses as an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib import image
from qwen_vl_streaming.launch.signals import STOPPED
from qwen_vl_streaming.model.loading import load_model
from safetensors.torch import load_file, save_file
from training import finish, flags, free_port, history, refused, spoil, start, start_two
from waiting import SECONDS, until


def assert_same(one, other) -> None:
    """Losses and gradient norms of all steps, and the weights, are equal."""
    a, b = history(one), history(other)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-5), step
    a, b = (load_model(folder, "sdpa", torch.float32).state_dict() for folder in (one, other))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def checkpoints(out) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_a_run_killed_at_any_step_resumes_exactly(undisturbed, made, tmp_path, capsys, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, save_steps=3)
    for step in (2, 5, 12):  # before the first checkpoint, within an epoch, before the last step is saved
        finish(start(arguments, log, "SIGKILL", step), -signal.SIGKILL)
    finish(start(arguments, log))
    assert_same(undisturbed, out)
    assert checkpoints(out) == ["checkpoint-12", "checkpoint-9"]
    record = json.loads((out / "run.json").read_text())
    assert [(entry["from_step"], entry["how"]) for entry in record["starts"]] == [
        (0, None),
        (3, None),
        (9, "finished"),
    ]

    # Started again, it reports that it has finished and does not train.
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    finish(start(arguments, tmp_path / "again"))
    assert f"{out}: training finished at {record['finished']}" in (tmp_path / "again").read_text()
    arguments += ["--learning_rate", "1e-4"]
    assert "--learning_rate 0.001, now 0.0001" in refused(arguments, capsys, monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written


def test_a_partial_checkpoint_is_not_used(undisturbed, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, save_steps=4, logging_steps=3, num_train_epochs=3)
    process = start(arguments, log, "slow save", 8)
    until(log.with_suffix(".saving").exists)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert (out / "being_saved/checkpoint-8").exists() and checkpoints(out) == ["checkpoint-4"]
    # A partial copy is not used either, nor overwritten.
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-7/trainer_state.json").write_text("{}")
    finish(start(arguments, log), 2)
    assert f"error: {out / 'checkpoint-7'} has no progress.json" in log.read_text()
    shutil.rmtree(out / "checkpoint-7")
    finish(start(arguments, log))
    assert not (out / "being_saved").exists()
    assert "resuming from " + str(out / "checkpoint-4") in log.read_text()
    # The loss logged at step 6 is the mean of steps 4 to 6, though the run was resumed after step 4.
    losses = history(undisturbed)
    for step, (loss, _) in history(out).items():
        assert loss == pytest.approx(sum(losses[s][0] for s in range(step - 2, step + 1)) / 3, abs=1e-5)


def test_sigterm_saves_and_the_same_command_resumes(undisturbed, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, dataloader_num_workers=1, dataloader_prefetch_factor=1)
    finish(start(arguments, log, "SIGTERM", 5), STOPPED)
    assert checkpoints(out) == ["checkpoint-5"] and not (out / "config.json").exists()
    assert json.loads((out / "run.json").read_text())["starts"][0]["how"] == "stopped by SIGTERM"
    finish(start(arguments, log))
    assert_same(undisturbed, out)


def test_a_run_killed_after_its_last_step_only_saves_the_model(made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, max_steps=6)  # within the second epoch
    finish(start(arguments, log, "kill at the end"), -signal.SIGKILL)
    assert checkpoints(out) == ["checkpoint-6"] and not (out / "config.json").exists()
    finish(start(arguments, log))
    assert sorted(history(out)) == [1, 2, 3, 4, 5, 6]
    saved, final = (load_file(folder / "model.safetensors") for folder in (out / "checkpoint-6", out))
    assert all(torch.equal(saved[name], final[name]) for name in saved)
    throughput = json.loads((out / "throughput.json").read_text())
    assert throughput["steps"] == 6


def test_a_different_run_is_refused(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    finish(start(flags(made, out), tmp_path / "log", "SIGTERM", 2), STOPPED)
    assert image.imread(out / "loss.png").any() and json.loads((out / "throughput.json").read_text())["steps"] == 2
    assert not (out / "being_saved").exists()
    data = tmp_path / "other.jsonl"
    data.write_text("".join(made[1].read_text().splitlines(keepends=True)[:6]))
    other = tmp_path / "model"
    shutil.copytree(made[0], other)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for changes, reason in (
        ({"gradient_accumulation_steps": 1}, "--gradient_accumulation_steps 2, now 1"),
        ({"wait_k": 4}, "schedule wait-3, now wait-4"),
        ({"train_data": data}, "different contents of"),
        ({"variant": "gap"}, "variant group, now gap"),
        ({"model_name_or_path": other}, f"--model_name_or_path {made[0]}, now {other}"),
        ({"learning_rate": 1e-4}, "--learning_rate 0.001, now 0.0001"),
        ({"mm_projector_lr": 1e-4}, "--mm_projector_lr None, now 0.0001"),
        ({"weight_decay": 0.1}, "--weight_decay 0.0, now 0.1"),
        ({"adam_beta2": 0.9}, "--adam_beta2 0.999, now 0.9"),
        ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type cosine, now linear"),
        ({"warmup_steps": 2}, "--warmup_steps 0.03, now 2"),
        ({"num_train_epochs": 4}, "--num_train_epochs 3.0, now 4.0"),
        ({"train_sampling_strategy": "sequential"}, "--train_sampling_strategy random, now sequential"),
        ({"dataloader_drop_last": True}, "--dataloader_drop_last False, now True"),
        ({"max_pixels_per_frame": 6272}, "--max_pixels_per_frame 3136, now 6272"),
        ({"lora_enable": True}, "--lora_enable False, now True"),
    ):
        assert reason in refused(flags(made, out, **changes), capsys, monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written
    weights = load_file(other / "model.safetensors")
    first = next(iter(weights))
    save_file({**weights, first: weights[first] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((out / "run.json").read_text())
    record["arguments"]["model_name_or_path"] = str(other)
    (out / "run.json").write_text(json.dumps(record))
    said = refused(flags(made, out, model_name_or_path=other), capsys, monkeypatch)
    assert f"started with different contents of the model {other}" in said
    (out / "run.json").rename(tmp_path / "run.json")
    assert "has checkpoints, but no run.json" in refused(flags(made, out), capsys, monkeypatch)


def test_new_save_and_logging_steps_apply_after_resuming(made, tmp_path):
    out = tmp_path / "out"
    finish(start(flags(made, out, max_steps=6), tmp_path / "log", "SIGTERM", 1), STOPPED)
    finish(start(flags(made, out, max_steps=6, save_steps=2, logging_steps=3, save_total_limit=0), tmp_path / "log"))
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(history(out)) == [1, 3, 6]


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = flags(made, out, max_steps=4, save_steps=1)
    finish(start(arguments, tmp_path / "log", "SIGTERM", 3), STOPPED)
    newest = out / "checkpoint-3"
    for name, content in (("progress.json", b""), ("progress.json", b"[]"), ("optimizer.pt", b"half")):
        sound = (newest / name).read_bytes()
        (newest / name).write_bytes(content)
        said = refused(arguments, capsys, monkeypatch)
        assert f"{newest / name} " in said and f"remove {newest} to resume from the previous checkpoint" in said
        (newest / name).write_bytes(sound)
    for name in ("optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        sound = (newest / name).read_bytes()
        (newest / name).write_bytes(bytes(len(sound)))
        assert f"{newest} is damaged (" in refused(arguments, capsys, monkeypatch)
        (newest / name).write_bytes(sound)
    sound = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(sound[:-40] + bytes([sound[-40] ^ 1]) + sound[-39:])
    said = refused(arguments, capsys, monkeypatch)
    assert f"{newest} is damaged (optimizer.pt has changed since it was saved)" in said
    (newest / "optimizer.pt").write_bytes(sound)
    (newest / "pytorch_model.bin").write_bytes(b"")
    assert f"{newest / 'pytorch_model.bin'} was not saved with" in refused(arguments, capsys, monkeypatch)
    (newest / "pytorch_model.bin").unlink()
    (newest / "scheduler.pt").unlink()
    assert f"{newest / 'scheduler.pt'} is missing" in refused(arguments, capsys, monkeypatch)
    shutil.rmtree(newest)
    finish(start(arguments, tmp_path / "log"))
    assert "resuming from " + str(out / "checkpoint-2") in (tmp_path / "log").read_text()


def test_two_processes_know_the_same_bad_samples_and_stop_together(made, tmp_path):
    """Both skip the same samples, and one line reports why they stop. One video is missing, two cannot be decoded."""
    rows = [json.loads(line) for line in made[1].read_text().splitlines()]
    for row in rows[1:3]:
        row["video_path"] = str(spoil(Path(row["video_path"]), tmp_path / f"nowhere.mp4 in {row['video_id']}"))
    rows[0]["video_path"] = "nowhere.mp4"
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out, status, **changes):
        log = tmp_path / f"{out}.log"
        arguments = flags(made, tmp_path / out, train_data=data, **changes)
        for process in start_two(arguments, log):
            finish(process, status)
        skipped = [json.loads(line) for line in (tmp_path / out / "skipped.jsonl").read_text().splitlines()]
        return log.read_text(), skipped

    said, skipped = run("few", 0, max_bad_share=0.4)
    assert sorted(row["video_id"] for row in skipped) == sorted(row["video_id"] for row in rows[:3])
    assert all("nowhere.mp4" in row["reason"] for row in skipped) and said.count("skipped ") == 3 + 1
    said, skipped = run("many", 2, max_bad_share=0.2)
    assert len(skipped) in (2, 3) and said.count("error:") == 1 and "fix the data" in said


def test_two_processes_with_zero3_equal_one_and_resume_after_sigterm_and_kill(undisturbed, made, tmp_path):
    """Through sft.sh, with half the gradient accumulation: the losses of one process without DeepSpeed."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, gradient_accumulation_steps=1, save_steps=2)
    script = Path(__file__).parents[1] / "code/qwen-vl-finetune/scripts/sft.sh"
    environment = {**os.environ, "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(["bash", script, *arguments], env=environment, stdout=said, stderr=said)
        until(lambda: (out / "checkpoint-2").exists() or process.poll() is not None)
        process.terminate()
        assert process.wait(SECONDS) == STOPPED, log.read_text()
    (stopped,) = [int(name.split("-")[1]) for name in checkpoints(out)[-1:]]
    assert 2 <= stopped < 12

    arguments += ["--deepspeed", "zero3.json"]  # as sft.sh does
    if stopped < 8:
        first, second = start_two(arguments, log, act="SIGKILL", step=9)
        finish(second, -signal.SIGKILL)
        finish(first, 1)
    for process in start_two(arguments, log):
        finish(process)
    a, b = history(undisturbed), history(out)
    assert sorted(b) == list(range(1, 13))
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-4), step
    assert json.loads((out / "run.json").read_text())["zero_stage"] == 3
