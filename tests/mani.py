"""Helpers for the tests of mani_data.py: a small PE-Video, options for a run on it, and readers of its output."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from media import make_files, make_tar, make_tokenizer, sample_json, video_bytes
from pe_video.run import Options
from preparation.rules import Rules

ROOT = Path(__file__).resolve().parents[1]
KEPT, SECONDS = 24, 6.0  # words and seconds: 4 tokens per second
MP4 = video_bytes(seconds=6, fps=5, size=(64, 48))


def make_options(tmp_path, **changes) -> Options:
    """Options for the train split under tmp_path/source, with one token per word and one worker."""
    options = Options(
        splits={"train": tmp_path / "source" / "train"},
        outputs={"train": tmp_path / "dataset" / "train_3_5.jsonl"},
        root=tmp_path,
        videos=tmp_path / "dataset" / "PE-Video" / "videos",
        output_dir=tmp_path / "dataset",
        hub_name="",
        rules=Rules(),
        tokenizer=str(make_tokenizer(tmp_path / "tokenizer")),
        max_samples=None,
        seed=0,
        workers=1,
    )
    return replace(options, **changes)


def good(**fields):
    return sample_json(KEPT, SECONDS, **fields)


def rows(options):
    path = options.outputs["train"]  # not written without rows
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def skipped(options):
    return [json.loads(line) for line in (options.output_dir / "skipped.jsonl").read_text().splitlines()]


def ids(options):
    return [row["video_id"] for row in rows(options)]


def everything(folder):
    """Content of all files below `folder` by relative path, except the state of the run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".mani_data" not in path.parts
    }


def fill(folder):
    """Write two splits: train with three shards that contain invalid and duplicate samples, test with 60 JSON files."""
    for k in range(3):
        members = [(f"{k}{i}{e}", d) for i in range(8) for e, d in ((".mp4", MP4), (".json", good()))]
        make_tar(folder / f"train/s{k}.tar", [*members, ("dup.json", good(n=k)), ("dup.mp4", MP4), ("bad.json", b"{")])
    make_files(folder / "test", {f"{i}.json": sample_json(10 + i, SECONDS) for i in range(60)})


def command(tmp_path, dataset, *more):
    make_tokenizer(tmp_path / "tokenizer")
    return [
        sys.executable,
        str(ROOT / "mani_data.py"),
        *("--source", str(tmp_path / "source"), "--dataset-root", str(dataset)),
        *("--tokenizer-model-id", str(tmp_path / "tokenizer"), *more),
    ]
