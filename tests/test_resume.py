"""Training that is killed goes on from its last whole checkpoint as if it had never been away."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from qwen_vl_streaming.modeling_qwen2_5_vl import load_model
from qwenvl.keeping import STOPPED
from safetensors.torch import load_file
from training import finish, flags, free_port, history, spoil, start, start_two


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """A run from start to end, 12 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(flags(made, folder / "out"), folder / "log"))
    assert sorted(history(folder / "out")) == list(range(1, 13))
    return folder / "out"


def same(one, other) -> None:
    """Losses and gradient norms of all steps, and the weights, are the same."""
    a, b = history(one), history(other)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-5), step
    a, b = (load_model(folder, "sdpa", torch.float32).state_dict() for folder in (one, other))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def checkpoints(out) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_killed_at_any_step_it_goes_on_as_if_undisturbed(undisturbed, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, save_steps=3)
    for step in (2, 5, 12):  # before the first checkpoint, in the midst of an epoch, before the last step is saved
        finish(start(arguments, log, "SIGKILL", step), -signal.SIGKILL)
    finish(start(arguments, log))
    same(undisturbed, out)
    assert checkpoints(out) == ["checkpoint-12", "checkpoint-9"]
    record = json.loads((out / "run.json").read_text())
    assert [(entry["from_step"], entry["how"]) for entry in record["starts"]] == [
        (0, None),
        (3, None),
        (9, "finished"),
    ]

    # Started again, it says that it is finished and trains nothing.
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    finish(start(arguments, tmp_path / "again"))
    assert f"{out} was finished at {record['finished']}" in (tmp_path / "again").read_text()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written


def test_killed_while_saving_it_takes_no_half_checkpoint(undisturbed, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, save_steps=4, logging_steps=3, num_train_epochs=3)
    process = start(arguments, log, "slow save", 8)
    until = time.monotonic() + 30
    while not log.with_suffix(".saving").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert (out / "being_saved/checkpoint-8").exists() and checkpoints(out) == ["checkpoint-4"]
    # One that someone copied only in part is not taken for whole either.
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-7/trainer_state.json").write_text("{}")
    finish(start(arguments, log))
    assert not (out / "being_saved").exists()
    assert "goes on from " + str(out / "checkpoint-4") in log.read_text()
    # The loss logged at step 6 is that of steps 4 to 6, though the run was resumed after step 4.
    losses = history(undisturbed)
    for step, (loss, _) in history(out).items():
        assert loss == pytest.approx(sum(losses[s][0] for s in range(step - 2, step + 1)) / 3, abs=1e-5)


def test_sigterm_saves_and_ends_and_the_same_command_goes_on(undisturbed, made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, dataloader_num_workers=1, dataloader_prefetch_factor=1)
    finish(start(arguments, log, "SIGTERM", 5), STOPPED)
    assert checkpoints(out) == ["checkpoint-5"] and not (out / "config.json").exists()
    assert json.loads((out / "run.json").read_text())["starts"][0]["how"] == "stopped by SIGTERM"
    finish(start(arguments, log))
    same(undisturbed, out)


def test_killed_after_its_last_step_it_only_saves_the_model(made, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, max_steps=6)  # in the midst of the second epoch
    finish(start(arguments, log, "kill at the end"), -signal.SIGKILL)
    assert checkpoints(out) == ["checkpoint-6"] and not (out / "config.json").exists()
    finish(start(arguments, log))
    assert sorted(history(out)) == [1, 2, 3, 4, 5, 6]
    saved, final = (load_file(folder / "model.safetensors") for folder in (out / "checkpoint-6", out))
    assert all(torch.equal(saved[name], final[name]) for name in saved)
    throughput = json.loads((out / "throughput.json").read_text())
    assert throughput["steps"] == 6


def test_another_run_is_not_taken_for_this_one(made, tmp_path):
    out = tmp_path / "out"
    finish(start(flags(made, out), tmp_path / "log", "SIGTERM", 2), STOPPED)
    data = tmp_path / "other.jsonl"
    data.write_text("".join(made[1].read_text().splitlines(keepends=True)[:6]))
    for changes, reason in (
        ({"gradient_accumulation_steps": 1}, "--gradient_accumulation_steps 2, now 1"),
        ({"wait_k": 4}, "schedule wait-3, now wait-4"),
        ({"train_data": data}, "other contents of"),
    ):
        log = tmp_path / "refused"
        finish(start(flags(made, out, **changes), log), 2)
        assert reason in log.read_text().splitlines()[-1]
        log.unlink()


def test_two_processes_know_the_same_bad_samples_and_stop_together(made, tmp_path):
    """Each leaves out what the other does, and one line says why they end. One is missing, two do not decode."""
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
    assert all("nowhere.mp4" in row["reason"] for row in skipped) and said.count("left out") == 3 + 1
    said, skipped = run("many", 2, max_bad_share=0.2)
    assert len(skipped) in (2, 3) and said.count("error:") == 1 and "mend the data" in said


def test_two_processes_under_zero3_equal_one_and_go_on_after_sigterm_and_kill(undisturbed, made, tmp_path):
    """Through sft.sh, with half the accumulation: the losses of one process without DeepSpeed."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = flags(made, out, gradient_accumulation_steps=1, save_steps=2)
    script = Path(__file__).parents[1] / "code/qwen-vl-finetune/scripts/sft.sh"
    environment = {**os.environ, "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with log.open("w") as said:
        process = subprocess.Popen(["bash", script, *arguments], env=environment, stdout=said, stderr=said)
        until = time.monotonic() + 90
        while not (out / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == STOPPED, log.read_text()
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
