"""The latency benchmark on a tiny model: every command runs, its results are consistent, and plots are written."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import pytest
import torch
from latency import floors
from program_server import with_server
from tiny import random_template, tiny_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "code/benchmarks"
SMALL = {
    "--size": "tiny",
    "--clips": "4",
    "--answer-tokens": "12",
    "--repeats": "1",
    "--arrivals": "3",
    "--frames": "300",
    "--sessions": "2",
    "--seconds": "1",
    "--age": "1",
    "--stream": "12",
    "--window": "3 12",
}


def latency(*arguments: str, **options: str) -> subprocess.CompletedProcess:
    flags = [flag for pair in {**SMALL, **options}.items() for part in pair for flag in part.split()]
    # In a separate process: its modules and those of the tests have the same names.
    command = [sys.executable, str(BENCHMARKS / "latency.py"), *arguments, *flags]
    return subprocess.run(command, env=with_server(os.environ), capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of all commands."""
    folder = tmp_path_factory.mktemp("latency")
    commands = ("steps", "rounds", "video", "delay", "live", "lanes", "sweep", "many", "long", "plot")
    done = latency(*commands, **{"--output": str(folder), "--points": "1x16"})
    assert done.returncode == 0, done.stderr
    return folder


def read(folder: Path, command: str) -> dict:
    data = json.loads((folder / f"tiny-{command}.json").read_text())
    assert data["about"]["size"] == "tiny" and data["about"]["byte_rate"] > 0
    return data


def test_the_theory_is_the_papers():
    assert [floors.speed_up(r) for r in (0.25, 1, 4)] == [1.25, 2, 1.25]
    assert floors.speed_up(1e-6) == pytest.approx(1) == floors.speed_up(1e6)


def test_floors_count_what_cannot_be_avoided():
    model, layout = tiny_model(), random_template(random.Random(0)).layout((2, 3), 2.0)
    layers = model.model.language_model.layers
    weights = sum(weight.numel() for weight in layers.parameters() if weight.ndim > 1)
    head = model.lm_head.weight.numel()
    reading = floors.Floors(model, layout, 1e30, 1.0)  # FLOPs for nothing: seconds are bytes
    seen = layout.prompt + 6 + layout.header
    heads = model.config.text_config.num_key_value_heads * 8
    assert reading.seconds(reading.decode(1, 0)) == 4 * (weights + head) + 4 * 2 * len(layers) * heads * seen
    counting = floors.Floors(model, layout, 1.0, 1e30)
    assert counting.seconds(counting.decode(1, 0)) > 2 * (weights + head)
    for rates in ((1e30, 1.0), (1.0, 1e30), (1e9, 1e9)):
        some = floors.Floors(model, layout, *rates)
        serial, fused, pipelined = (some.session(mode, [3] * 5) for mode in ("serial", "fused", "pipelined"))
        assert 0 < fused <= serial and pipelined > 0
        assert some.session("serial", [4] * 5) > serial and some.session("fused", [4] * 5) > fused
    # If FLOPs are the limit, sharing steps on one device saves no time.
    assert counting.session("fused", [3] * 5) == pytest.approx(counting.session("serial", [3] * 5))


def test_each_kind_of_step_is_timed(folder):
    data = read(folder, "steps")
    kinds = {(row["rows"] > 1, row["write"]) for row in data["steps"]}
    assert kinds >= {(False, True), (True, True)}
    assert all(min(row["run"], row["alone"], row["floor"]) > 0 for row in data["steps"])
    assert data["kernels"].keys() == {"decode", "prefill and decode", "vision encoder"}
    for kernels in data["kernels"].values():
        assert kernels[0]["ms"] >= kernels[-1]["ms"] > 0


def test_rounds_of_all_modes_give_the_same_tokens(folder):
    data = read(folder, "rounds")
    assert [row["way"] for row in data["rounds"]] == ["serial", "fused", "pipelined"]
    for row in data["rounds"]:
        assert min(row["floor"], row["seconds"]) > 0
        assert row["same_words"] == row["words"] == 3 * 4
    parts = data["parts"]
    assert data["r"] == pytest.approx(data["rounds"][0]["seconds"] / (3 * parts["word"]) - 1)
    assert data["rounds"][0]["speed_up"] == 1


def test_videos_delays_and_rates(folder):
    assert all(min(row["floor"], row["seconds"]) > 0 for row in read(folder, "video")["videos"])
    for row in read(folder, "delay")["delays"]:
        assert len(row["next"]) == len(row["any"]) == 2  # all but the first, before which nothing is generated
        assert all(worst >= following for following, worst in zip(row["next"], row["any"], strict=True))
    for row in read(folder, "live")["live"]:
        assert len(row["lags"]) == 9 and min(row["lags"]) > 0
    for row in read(folder, "many")["many"]:
        assert len(row["lags"]) == row["sessions"] == 2 and min(row["lags"]) > 0


def test_lanes_hold_every_round(folder):
    modes = {mine["way"]: mine for mine in read(folder, "lanes")["lanes"]}
    for mode, mine in modes.items():
        assert len(mine["slots"]) == 8 and mine["slots"] == sorted(mine["slots"])
        kinds = [tuple(each["kinds"]) for each in mine["intervals"]]
        assert all(each["begin"] <= each["end"] for each in mine["intervals"])
        perceivers = {each["who"] for each in mine["intervals"] if "vision encoder" in each["kinds"]}
        assert perceivers == ({"other"} if mode == "pipelined" else {"own"})
        both = ("prefill of a clip", "token generation")
        assert (both in kinds) == (mode == "fused")
        assert sum("token generation" in kind for kind in kinds) >= 3 * 7


def test_a_long_stream_is_sampled_to_its_end(folder):
    for row in read(folder, "long")["long"]:
        assert [sample["clips"] for sample in row["samples"]] == [*range(1, 13)]
        assert all(sample["host"] > 0 for sample in row["samples"])


@pytest.fixture(scope="module")
def resumed(folder, tmp_path_factory):
    """A folder with the sweep of `folder`, after it was resumed with more points and ways to prefill a clip, and what
    that printed."""
    own = tmp_path_factory.mktemp("resumed")
    (own / "tiny-sweep.json").write_text((folder / "tiny-sweep.json").read_text())
    more = {"--points": "1x16 2x16", "--modes": "serial fused", "--chunks": "whole 1/2 40", "--output": str(own)}
    done = latency("steps", "rounds", "sweep", **more)
    assert done.returncode == 0, done.stderr
    return own, done.stdout


def test_a_sweep_resumes_with_the_missing_points(folder, resumed):
    data = read(folder, "sweep")
    assert list(data["points"]) == ["1x16"]
    point = data["points"]["1x16"]
    theory, parts = (1 + point["r"]) / max(1, point["r"]), data["alone"]["12x16"]
    assert 1 + point["r"] == pytest.approx(point["ways"]["serial"]["seconds"] / parts["word"])
    assert point["r_alone"] == pytest.approx(parts["perception"] / parts["word"])
    for mine in point["ways"].values():
        assert mine["share"] == pytest.approx(mine["speed_up"] / theory)
        assert mine["speed_up"] == pytest.approx(point["ways"]["serial"]["seconds"] / mine["seconds"])
        assert mine["floor"] > 0
    after, ways = read(resumed[0], "sweep"), {"serial", "fused whole", "fused 1/2", "fused 40"}
    assert after["points"]["1x16"]["ways"].items() > point["ways"].items() and after["alone"] == data["alone"]
    assert set(after["points"]["1x16"]["ways"]) == {*ways, "pipelined"} and set(after["points"]["2x16"]["ways"]) == ways
    printed = resumed[1].split("same tokens")[-1]
    assert len([line for line in printed.splitlines() if line.split()[1:2] == ["16"]]) == 4 + 2


def test_each_way_to_prefill_a_clip_is_measured(resumed):
    """In one call, and all ways give the same tokens."""
    table = read(resumed[0], "rounds")["rounds"]
    assert [(row["chunk"], row["chunks"]) for row in table[1:]] == [(None, 1), (None, 2), (40, None)]
    assert all(row["same_words"] == row["words"] == 3 * 4 for row in table)
    rows = {}
    for row in read(resumed[0], "steps")["steps"]:
        rows.setdefault(row["how"], set()).add(row["rows"])
    assert 1 + 91 + 3 in rows["whole"] and 1 + 47 in rows["1/2"] and max(rows["40"]) <= 1 + 40


def test_plots_are_written(folder):
    for name in ("sweep", "tiny-lanes", "tiny-delay", "tiny-long"):
        plot = (folder / f"{name}.png").read_bytes()
        assert plot.startswith(b"\x89PNG") and len(plot) > 10_000


def test_sweeps_of_8_bit_weights_are_marked(tmp_path):
    """Hollow: a mark has fewer pixels of its colour than one of the same size that is filled."""
    inked = {}
    for kind in (None, "int8"):
        sweep = {"r": 2.0, "ways": {"fused auto": {"speed_up": 1.25, "share": 0.9}}}
        (tmp_path / str(kind)).mkdir()
        (tmp_path / str(kind) / "7B-sweep.json").write_text(
            json.dumps({"about": {"size": "7B", "weights": kind}, "points": {"1x16": sweep}})
        )
        done = latency("plot", **{"--output": str(tmp_path / str(kind))})
        assert done.returncode == 0, done.stderr
        pixels = matplotlib.image.imread(tmp_path / str(kind) / "sweep.png")[..., :3]
        inked[kind] = int((abs(pixels - matplotlib.colors.to_rgb("#D55E00")).max(-1) < 0.02).sum())
    assert 0 < inked["int8"] < inked[None]


def test_errors_are_one_line():
    mistakes = [
        (["sweep", "--points", "3x90"], "3x90"),
        (["rounds", "--chunks", "some"], "some"),
        (["rounds", "--chunks", "whole", "1/0"], "1/0"),
        (["rounds", "--answer-tokens", "5"], "--answer-tokens 5"),
        (["rounds", "--size", "7B"], "GPU"),
        (["plot", "--output", "nowhere"], "nowhere"),
        (["rounds", "--size", "tiny", "--ordinary-launches"], "--ordinary-launches"),
    ]
    if torch.cuda.is_available():
        del mistakes[4]
    program = (
        "import sys\n"
        "from latency.cli import main\n"
        "from qwen_vl_streaming.common.errors import run\n"
        f"for arguments in {[arguments for arguments, _ in mistakes]}:\n"
        "    sys.argv[1:] = arguments\n"
        "    try: run(main)\n"
        "    except SystemExit as end: assert end.code == 2\n"
        "    else: raise AssertionError(arguments)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for line, (_, named) in zip(done.stderr.splitlines(), mistakes, strict=True):
        assert line.startswith("error: ") and named in line


def test_the_load_of_a_server_ends_if_the_engine_does_not_start():
    program = (
        "from argparse import Namespace\n"
        "from serving import load\n"
        "asked = Namespace(size='tiny', k=3, seconds=1, age=0, ramp=0, sessions=[1], sides=['alone'])\n"
        "load(asked, ['--nonsense'], None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "EOFError" in done.stderr.splitlines()[-1]


def test_attention_is_timed_for_each_option():
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--size", "tiny", "--options"]
    options = {"env": with_server(os.environ), "capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run([*command, "64x64x4x3", "8x2"], **options)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert [line.split()[0] for line in lines] == ["4x3", "8x2"] + 2 * ["64x64x4x2", "64x64x4x3"]
    assert ["the engine's" in line for line in lines] == 3 * [True, False]
    assert all(float(line.split()[1]) > 0 for line in lines)
    done = subprocess.run([*command, "48x64x4x3"], **options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --options 48x64x4x3: give BLOCK_M x BLOCK_N x num_warps")
