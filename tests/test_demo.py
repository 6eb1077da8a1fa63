"""A short run of the demo from end to end, with real files, and its user errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import check_flags
import pytest
from program_server import with_server
from qwen_vl_streaming import devices
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline.positions import RULE
from show import existing_outputs

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("QWEN2_5_VL_")}
    return subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.long
def test_short_demo(tmp_path):
    flags = ["--output", "the demo", "--train-videos", "8", "--test-videos", "2", "--steps"]
    demo = ["bash", os.path.relpath(ROOT / "demo.sh", tmp_path), *flags]
    environment = with_server({"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    ended = run(*demo, "10", cwd=tmp_path, **environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    output = tmp_path / "the demo"
    for name in (
        "dataset/train_3_5.jsonl",
        "dataset/report.png",
        "qwen2_5vl-pe-group/config.json",
        "qwen2_5vl-pe-group/loss.png",
        "evaluation/group_infer.json",
        "evaluation/group_scores.json",
    ):
        assert (output / name).stat().st_size > 0
        assert str(output / name).removesuffix("/train_3_5.jsonl").removesuffix("/config.json") in ended.stdout
    config = json.loads((output / "qwen2_5vl-pe-group/config.json").read_text())
    assert config["streaming_variant"] == "group" and config["wait_k"] == 3 and config["position_rule"] == RULE
    evaluated = json.loads((output / "evaluation/group_infer.args.json").read_text())
    assert config["pixel_budget"]["max_pixels_per_frame"] == evaluated["max_pixels_per_frame"] == 7056
    assert len((output / "dataset/train_3_5.jsonl").read_text().splitlines()) == 8
    assert len((output / "evaluation/group_infer.json").read_text().splitlines()) == 2
    assert "METEOR" in ended.stdout and "1s '" in ended.stdout
    # Without a terminal, progress is printed as lines.
    for line in ("draw: 34/34 videos in", "read: 2/2 shards in", "training: 10/10 steps in", "group: 2/2 videos in"):
        assert line in ended.stderr
    assert "\r" not in ended.stderr + ended.stdout and "%|" not in ended.stderr

    check, live = (line for line in ended.stdout.splitlines() if "check.py" in line or "qwen_vl_streaming.live" in line)
    ended = run("bash", "-c", f"{live} --speed 4 --record 'live session.json'", cwd=tmp_path, **environment)
    assert ended.returncode == 0 and json.loads((tmp_path / "live session.json").read_text())["tokens"], ended.stderr

    checked = run("bash", "-c", f"{check} --videos 1", cwd=tmp_path, **environment)
    assert checked.returncode == 0, checked.stderr
    assert "tokens before slot j changed in 0;" in checked.stdout

    longer = run(*demo, "11", cwd=tmp_path)
    assert longer.returncode == 2 and "== 1." not in longer.stdout
    (line,) = longer.stderr.splitlines()
    assert f"{output / 'qwen2_5vl-pe-group'} was trained for 10 steps, not 11: give another --output, or" in line


@pytest.mark.parametrize(
    ("flags", "variant", "message"),
    [
        ([], "grup", "grup"),
        (["--outptu", "x"], "group", "unknown flag --outptu"),
        (["--steps"], "group", "--steps needs a value"),
        (["--output", ""], "group", "--output needs a value"),
        (["--steps", "ten"], "group", "--steps ten: give a positive integer"),
        (["--steps", "0"], "group", "--steps 0: give a positive integer"),
        (["--train-videos", "-1"], "group", "--train-videos -1: give a positive integer"),
        (["--test-videos", "1.5"], "group", "--test-videos 1.5: give a positive integer"),
        (["--output", "/dev/null"], "group", "--output /dev/null is not a writable folder"),
    ],
)
def test_user_errors_are_one_line_and_create_nothing(tmp_path, flags, variant, message):
    ended = run("bash", "demo.sh", "--output", str(tmp_path), *flags, QWEN2_5_VL_VARIANT=variant)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not any(tmp_path.iterdir())


def test_a_variant_trained_for_other_steps_is_refused(tmp_path, monkeypatch):
    """Any of the requested variants. An unfinished one is left to sft.sh, which resumes it or refuses."""
    trained = tmp_path / "qwen2_5vl-pe-gap"
    trained.mkdir()
    (trained / "run.json").write_text('{"arguments": {"max_steps": 1000}}')

    def check(steps):
        monkeypatch.setattr(sys, "argv", ["c", "--output", str(tmp_path), "--steps", str(steps), "origin", "gap"])
        check_flags.main()

    check(4000)
    (trained / "config.json").write_text("{}")
    check(1000)
    with pytest.raises(InputError, match="qwen2_5vl-pe-gap was trained for 1000 steps, not 4000: give another"):
        check(4000)
    (trained / "run.json").unlink()
    with pytest.raises(InputError, match=r"qwen2_5vl-pe-gap has no run\.json"):
        check(1000)


def test_the_demo_lists_only_files_that_exist(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for name in ("dataset", "model", "qwen2_5vl-pe-gap"):
        (tmp_path / name).mkdir()
    for name in ("gap_infer.json", "gap_scores.json"):
        (tmp_path / "evaluation" / name).touch()
    names = [path.name for _, path in existing_outputs(tmp_path, ["gap"])]
    assert names == ["dataset", "model", "qwen2_5vl-pe-gap", "gap_infer.json", "gap_scores.json"]
    (tmp_path / "qwen2_5vl-pe-gap/loss.png").touch()
    assert ("            loss curve", tmp_path / "qwen2_5vl-pe-gap/loss.png") in list(
        existing_outputs(tmp_path, ["gap"])
    )


def test_the_demo_reports_unusable_gpus_first(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "ask_driver", lambda: devices.Driver(("NVIDIA H100",), "535.129.03"))
    monkeypatch.setattr(devices, "ask_torch", lambda: devices.Torch("2.14.1", "13.0", fault="CUDA does not start"))
    command = ["check_flags.py", "--output", str(tmp_path), "--steps", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "gap"])
    with pytest.raises(InputError, match=r"needs driver 580 or newer: .*; or give --device cpu to use the CPU"):
        check_flags.main()
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "gap"])
    check_flags.main()
