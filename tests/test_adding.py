"""What CONTRIBUTING says about adding things: each is added in one place, and every program supports it. A custom frame
source is tested in test_captioner.py."""

import contextlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from metrics import scorecard
from preparation.report import SplitStatistics
from preparation.rules import Rules
from qwen_vl_streaming.explain import cli as explain
from qwen_vl_streaming.reference import caption
from qwen_vl_streaming.timeline.timeline import Schedule, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
from test_reference import Forced, full_pass, random_batch
from tiny import tiny_model
from training import flags

import mani_data

LATE = Variant("late", "Streaming, Late", streams=True, parallel=True, count="own", text_start=700)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setitem(VARIANTS, LATE.name, LATE)
    return LATE


def test_a_seventh_variant_streams_as_one_full_pass(late):
    model, draw = tiny_model(), random.Random(7)
    torch.manual_seed(7)
    cases = random_batch(draw, late, 3)
    streams = Forced(model, late, [c[1] for c in cases], [c[2] for c in cases], answers=[c[3] for c in cases])
    captions = caption(streams, [c[4] for c in cases], [Schedule(tuple(c[0][:-1])) for c in cases])
    for i, (counts, template, layout, answer, visual) in enumerate(cases):
        timeline = make_timeline(late, layout, counts)
        expected = full_pass(model, timeline, template, answer, visual)
        streamed = torch.stack(streams.produced[i][: len(answer)])
        assert captions[i].tokens == answer and (streamed - expected).abs().max() < 1e-4


def test_a_seventh_variant_is_explained(late, monkeypatch, capsys):
    for arguments in (["--variant", "late"], ["--variant", "late", "--format", "json"]):
        monkeypatch.setattr("sys.argv", ["explain", *arguments])
        explain.main()
    out = capsys.readouterr().out
    assert "late" in out and '"late"' in out and "700" in out


PROGRAMS = """
import sys
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant
VARIANTS["late"] = Variant("late", "Streaming, Late", streams=True, parallel=True, count="own", text_start=700)
train, evaluate = sys.argv[1].split("\\n"), sys.argv[2].split("\\n")
import torch
torch.set_num_threads(1)
from qwenvl import train as training
sys.argv = ["sft.sh", *train]
training.main()
import eval as evaluation
evaluation.prepare_scoring = evaluation.score_rows = lambda *_: None
sys.argv = ["eval.sh", *evaluate]
evaluation.main()
from qwen_vl_streaming import Captioner
captioner = Captioner(sys.argv[sys.argv.index("--model") + 1], device="cpu")
print("captioner:", captioner.variant.name, len([*captioner.watch("synthetic", speed=20, max_clips=3)]) > 0)
"""


def test_a_seventh_variant_is_trained_evaluated_and_used_live(made, tmp_path):
    train = flags(made, tmp_path / "model", max_steps=1, variant="late")
    evaluate = [
        *("--model", tmp_path / "model", "--data", made[1], "--output-dir", tmp_path / "out", "--variant", "late"),
        *("--device", "cpu", "--workers", 0, "--max-new-tokens", 12),
    ]
    arguments = ["\n".join(map(str, train)), "\n".join(map(str, evaluate))]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "QWEN2_5_VL_VARIANT": "late"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "model/config.json").read_text())["streaming_variant"] == "late"
    rows = [json.loads(line) for line in (tmp_path / "out/late_infer.json").read_text().splitlines()]
    assert len(rows) == 8 and done.stdout.endswith("captioner: late True\n")


def test_a_metric_of_videos_is_scored_and_averaged(monkeypatch, tmp_path):
    def score_length(rows, videos, captions, scoring):
        for row, video in zip(rows, videos, strict=True):
            video["words"] = float(len(row["result"].split()))
        return {"length": {"unit": "words"}}

    monkeypatch.setattr(scorecard, "VIDEO_METRICS", [scorecard.VideoMetric(("words",), score_length)])
    monkeypatch.setattr(scorecard, "score", lambda *_: {"BLEU-1": 50.0})
    rows = [{"video_id": str(n), "annotation": "a cat", "result": "a " * n} for n in (1, 3)]
    scorecard.score_rows(
        rows, tmp_path / "mine.json", tmp_path / "scores.json", 0, scorecard.Scoring(None, None, "cpu")
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["words"] == 2.0 and scores["length"] == {"unit": "words"}


def test_a_custom_data_set_is_prepared(monkeypatch, tmp_path, capsys):
    seen = {}

    def options(arguments, folder, splits, common):
        seen.update(common, folder=folder, splits=splits)
        return replace(base, **{name: common[name] for name in ("outputs", "output_dir", "prefix")})

    from preparation.run import RunOptions

    names = RunOptions.__dataclass_fields__
    base = RunOptions(**{name: None for name in names})
    mine = mani_data.DataSet(
        "me/mine", "mine_{}.jsonl", Rules(), lambda options: {"test": SplitStatistics(rows=1)}, options, prefix="mine_"
    )
    monkeypatch.setitem(mani_data.DATASETS, "mine", mine)
    arguments = ["--dataset", "mine", "--split", "test", "--dataset-root", tmp_path, "--seed", 3]
    monkeypatch.setattr("sys.argv", ["mani_data.py", *map(str, arguments)])
    with contextlib.suppress(SystemExit):
        mani_data.main()
    out = capsys.readouterr().out
    assert f"test: 0 samples, 1 rows in {tmp_path / 'mine_test.jsonl'}" in out and "mine_skipped.jsonl" in out
    assert (seen["folder"], seen["splits"], seen["seed"]) == (tmp_path / "mine", ["test"], 3)
