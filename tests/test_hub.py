"""Streaming shards from a local hub: only kept videos are downloaded, and a failing hub is not a bad sample."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hubs import Hub
from media import make_tar, make_tokenizer, sample_json, video_bytes

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "facebook/PE-Video"


class FakeHub(Hub):
    """Serves the endpoints of the hub's API that streaming needs, for the files of one folder."""

    def __init__(self, folder: Path):
        super().__init__(COMMIT)
        self.folder, self.sent, self.ranges, self.broken_after = folder, 0, 0, None

    def answer(self, request, path):
        if path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}/"):
            split = path.rsplit("/", 1)[1]
            entries = [self.entry(file) for file in sorted((self.folder / split).glob("*"))]
            return self.send(request, 200, entries) if entries else self.send(request, 404, {}, "EntryNotFound")
        if path.startswith(f"/api/datasets/{NAME}"):
            return self.send(request, 200, {"id": NAME, "sha": COMMIT})
        if not path.startswith(f"/datasets/{NAME}/resolve/{COMMIT}/"):
            return self.send(request, 404, {}, "EntryNotFound")
        data = (self.folder / path.split(COMMIT + "/")[1]).read_bytes()
        if request.command == "HEAD":
            return self.send(request, 200, data)
        self.ranges += 1
        if self.broken_after is not None and self.ranges > self.broken_after:
            return self.send(request, 403, b"")
        start, end = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[start : end + 1]
        self.sent += len(part)
        return self.send(request, 206, part)

    def entry(self, file):
        name = f"{file.parent.name}/{file.name}"
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}


@pytest.fixture
def hub(tmp_path):
    kept = video_bytes(seconds=6, fps=5, size=(64, 48)) + b"\0\x10\0\0free" + bytes((1 << 20) - 8)
    for k in range(2):
        members = []
        for i in range(6):
            words = 24 if i == 0 else 3
            members += [(f"{k}{i}.mp4", kept), (f"{k}{i}.json", sample_json(words, 6.0))]
        make_tar(tmp_path / f"hub/train/{k:06d}.tar", members)
    with FakeHub(tmp_path / "hub") as hub:
        yield hub


def mani_data(tmp_path, hub):
    make_tokenizer(tmp_path / "tokenizer")
    environ = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    where = ["--dataset-root", str(tmp_path / "dataset"), "--tokenizer-model-id", str(tmp_path / "tokenizer")]
    arguments = [sys.executable, str(ROOT / "mani_data.py"), *where, "--workers", "1"]
    return subprocess.run(arguments, capture_output=True, text=True, env=environ)


def ids(tmp_path):
    return [json.loads(line)["video_id"] for line in (tmp_path / "dataset/train_3_5.jsonl").read_text().splitlines()]


def test_only_kept_videos_are_downloaded(tmp_path, hub):
    result = mani_data(tmp_path, hub)
    assert result.returncode == 0, result.stderr
    assert ids(tmp_path) == ["00", "10"]
    videos = tmp_path / "dataset/PE-Video/videos/train"
    assert sorted(path.name for path in videos.iterdir()) == ["00.mp4", "10.mp4"]
    assert (videos / "00.mp4").stat().st_size > 1 << 20
    total = sum(file.stat().st_size for file in (tmp_path / "hub").rglob("*.tar"))
    assert hub.sent < total / 2  # two of twelve videos, headers, and some bytes past the end of each
    assert not list((tmp_path / "home").rglob("*.tar"))


def test_a_failing_hub_ends_the_run_and_the_next_run_resumes(tmp_path, hub):
    hub.broken_after = 9
    result = mani_data(tmp_path, hub)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: http://127.0.0.1")
    assert "run the same command again later to resume" in result.stderr
    hub.broken_after = None
    result = mani_data(tmp_path, hub)
    assert result.returncode == 0, result.stderr
    assert "resuming: 1 of 2 shards" in result.stderr
    assert ids(tmp_path) == ["00", "10"]
    assert (tmp_path / "dataset/skipped.jsonl").read_text() == ""


def test_missing_access_reports_what_to_download(tmp_path, hub):
    hub.folder = tmp_path / "nothing"
    result = mani_data(tmp_path, hub)
    assert result.returncode == 2
    assert "hf download facebook/PE-Video" in result.stderr.splitlines()[-1]
