"""Skips GPU tests if there is no GPU or tests run in several processes, starts long tests first, and defines fixtures
of several files."""

import importlib
import json
import os
import sys
import tarfile

import pytest
import torch
from endpoint import endpoint  # noqa: F401  a fixture
from serving import serve, wall  # noqa: F401  fixtures


def pytest_collection_modifyitems(items):
    reason = None if torch.cuda.is_available() else "no CUDA device"
    if "PYTEST_XDIST_WORKER" in os.environ and not reason:
        reason = "several processes share the tests, and a GPU is for one: run pytest -m gpu"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
    # One that starts last would run alone, while the other processes have nothing left to do. Each process begins with
    # an equal share of the list.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in long]
    share = -(-len(items) // processes)
    items.clear()
    for process in range(processes):
        first = long[process::processes]
        room = max(share - len(first), 0)
        items += first + others[:room]
        del others[:room]
    items += others


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny checkpoint, and a data file of eight real videos in the format of mani_data.py."""
    # Imported here, because GPU tests also run on machines that cannot decode videos.
    from make_data import make_dataset
    from make_model import tiny_checkpoint
    from samples import DataConfig, plan

    folder = tmp_path_factory.mktemp("made")
    make_dataset(DataConfig(folder / "data", train_videos=8, test_videos=0, dropped=0, size=56))
    rows = []
    for shard in (folder / "data/train").glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder / "videos", filter="data")
    for path in sorted((folder / "videos").glob("*.json")):
        rows.append({**json.loads(path.read_text()), "video_path": str(path.with_suffix(".mp4"))})
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) == len(plan(DataConfig(folder, train_videos=8, test_videos=0, dropped=0))["train"])
    return tiny_checkpoint(folder / "model"), data


@pytest.fixture(scope="session")
def undisturbed(made, tmp_path_factory):
    """The output of a training run of one process from start to end: 4 steps per epoch, 12 in total."""
    from training import finish, flags, history, start

    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(flags(made, folder / "out"), folder / "log"))
    assert sorted(history(folder / "out")) == list(range(1, 13))
    return folder / "out"


@pytest.fixture(scope="module")
def model():
    from tiny import tiny_model

    return tiny_model()


@pytest.fixture
def mani_refusal(monkeypatch, capsys):
    """Runs mani_data.py in this process, in the project's root; returns the one line with which it refuses its
    arguments."""

    from published import ROOT
    from qwen_vl_streaming.common.errors import run

    def call(*arguments: str) -> str:
        monkeypatch.syspath_prepend(ROOT)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["mani_data.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(importlib.import_module("mani_data").main)
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
        assert ended.value.code == 2 and len(lines) == 1
        return lines[0]

    return call
