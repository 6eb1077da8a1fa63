"""The demo end to end in a shortened form: the commands that a newcomer runs, on real files."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("QWEN2_5_VL_")}
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=600, check=False
    )


def test_demo_in_short_form(tmp_path):
    flags = ["--output", str(tmp_path / "demo"), "--train-videos", "24", "--test-videos", "6", "--steps", "10"]
    ended = run("bash", "demo.sh", *flags)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    output = tmp_path / "demo"
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
    assert config["streaming_variant"] == "group" and config["wait_k"] == 3
    evaluated = json.loads((output / "evaluation/group_infer.args.json").read_text())
    assert config["pixel_budget"]["max_pixels_per_frame"] == evaluated["max_pixels_per_frame"] == 7056
    assert len((output / "dataset/train_3_5.jsonl").read_text().splitlines()) == 24
    assert len((output / "evaluation/group_infer.json").read_text().splitlines()) == 6
    assert "METEOR" in ended.stdout and "1s '" in ended.stdout

    (line,) = [line for line in ended.stdout.splitlines() if "qwen_vl_streaming.live" in line]
    live = run(str(ROOT / ".venv/bin/python"), *line.split()[1:], "--speed", "4", "--record", str(output / "live.json"))
    assert live.returncode == 0 and json.loads((output / "live.json").read_text())["tokens"], live.stderr

    checked = run(str(ROOT / ".venv/bin/python"), "code/demo/check.py", "--output", str(output), "--videos", "1")
    assert checked.returncode == 0, checked.stderr
    assert "something written before slot j changed in 0;" in checked.stdout


def test_an_unknown_variant_or_flag_is_refused_in_one_line(tmp_path):
    for ended in (
        run("bash", "demo.sh", "--output", str(tmp_path), QWEN2_5_VL_VARIANT="grup"),
        run("bash", "demo.sh", "--outptu", str(tmp_path)),
    ):
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("error:")
    assert not any(tmp_path.iterdir())
