"""The demo's data set: format, captions that respect wait-3, and the videos that must be dropped."""

import hashlib
import io
import json
import math
import random
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from make_data import make_dataset, preview
from PIL import Image
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.timeline.segments import TOLERANCE, check_segments, join_segments
from samples import DROPPED, DataConfig, plan
from scenes import COLOURS, QUIET, count_words, draw, make_quiet_scene, make_scene

PROGRAM = Path(__file__).parents[1] / "code" / "demo" / "make_data.py"


def small(folder: Path, **settings) -> DataConfig:
    defaults = {"train_videos": 3, "test_videos": 2, "dropped": 1, "other_openings": 1, "size": 84, "shard_videos": 6}
    return DataConfig(output=folder, **{**defaults, **settings})


def read(folder: Path) -> dict[str, tuple[bytes, dict]]:
    """All samples of a data set: id -> (MP4 file, row)."""
    files = {}
    for shard in sorted(folder.glob("*/*.tar")):
        with tarfile.open(shard) as archive:
            files |= {entry.name: archive.extractfile(entry).read() for entry in archive}
    ids = {name.split(".")[0] for name in files}
    assert len(files) == 2 * len(ids)
    return {video_id: (files[f"{video_id}.mp4"], json.loads(files[f"{video_id}.json"])) for video_id in ids}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(small(folder))
    return folder


def test_each_split_has_good_videos_and_one_of_each_kind_to_drop(dataset):
    samples = read(dataset)
    truths = [json.loads(line) for line in (dataset / "truth.jsonl").read_text().splitlines()]
    assert {row["video_id"] for row in truths} == set(samples)
    for split, ordinary in (("train", 3), ("test", 2)):
        dropped = [row["dropped"] for row in truths if row["split"] == split]
        assert dropped.count(None) == ordinary + 1  # and one with a different opening
        assert sorted(filter(None, dropped)) == sorted(DROPPED)
    assert len(list((dataset / "train").glob("*.tar"))) == 2

    for row in truths:
        video, fields = samples[row["video_id"]]
        assert fields["video_id"] == row["video_id"] and row["video_id"].isdigit()
        caption, seconds = fields["human_caption"], fields["video_duration_in_s"]
        rate = count_words(caption) / seconds
        faults = {
            "short": seconds < 5,
            "long": seconds > 30,
            "slow": 0 < rate < 3,
            "fast": rate > 5,
            "empty": caption == "",
            "broken": not decodes(video),
        }
        assert [name for name, found in faults.items() if found] == ([row["dropped"]] if row["dropped"] else [])


def decodes(video: bytes) -> bool:
    try:
        with av.open(io.BytesIO(video)) as container:
            return any(True for _ in container.decode(video=0))
    except av.FFmpegError:
        return False


def test_a_video_is_h264_with_its_duration_and_shows_its_first_shape(dataset):
    for line in (dataset / "truth.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["dropped"]:
            continue
        video, fields = read(dataset)[row["video_id"]]
        with av.open(io.BytesIO(video)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.codec_context.name == "h264" and stream.average_rate == fields["fps"]
        assert len(frames) == round(fields["video_duration_in_s"] * fields["fps"])
        assert frames[0].shape == (fields["height"], fields["width"], 3)
        distance = np.abs(frames[0].astype(int) - COLOURS[row["events"][0]["colour"]]).max(-1)
        assert (distance < 40).mean() > 0.02


def test_captions_describe_events_a_full_second_after_they_happen():
    for number in range(300):
        rng = random.Random(number)
        scene = make_scene(rng, rng.uniform(5, 12), (3.1, 4.4))
        words, clips = count_words(scene.caption), int(scene.seconds)
        assert scene.caption.startswith("The video shows a ")
        assert 3.1 <= words / scene.seconds <= 4.4
        assert [event.second for event in scene.events] == sorted({event.second for event in scene.events})
        for event in scene.events:
            slot = min(event.word // 3 + 1, clips)
            assert event.second + 1 <= slot
        # The sentence about the first shape is complete before anything else happens.
        assert all(event.second >= 3 for event in scene.events[1:])


def test_quiet_scenes_have_a_long_stretch_without_events():
    for number in range(300):
        rng = random.Random(number)
        scene = make_quiet_scene(rng, rng.uniform(10, 18))
        seconds = [event.second for event in scene.events]
        gaps = [b - a for a, b in pairwise([*seconds, math.ceil(scene.seconds)])]
        assert max(gaps) >= QUIET and len(seconds) >= 2 and seconds == sorted(set(seconds))
        assert math.ceil(scene.seconds) <= count_words(scene.caption) < 5 * scene.seconds
        segments = scene.segments()
        check_segments(segments, int(scene.seconds) - TOLERANCE)
        assert join_segments(segments).text == scene.caption
        for event, segment in zip(scene.events, segments, strict=True):
            assert (segment["start"], segment["end"]) == (event.second, event.second + 1)
            assert event.event in segment["text"] or event.second == 0


def test_without_the_options_for_times_the_data_are_as_before(dataset):
    """The hash is of the rows, the truth and the settings that were written before there were these options."""
    found = hashlib.sha256()
    for shard in sorted(dataset.glob("*/*.tar")):
        with tarfile.open(shard) as archive:
            for entry in archive:
                if entry.name.endswith("json"):
                    found.update(archive.extractfile(entry).read())
    found.update((dataset / "truth.jsonl").read_bytes() + (dataset / "make_data.json").read_bytes())
    assert found.hexdigest() == "82d02547a75b77ef9324f86a324c5b665790d00a05f0617e3620e2be45ef50cc"


def test_rows_with_times(tmp_path):
    make_dataset(small(tmp_path, segments=True, quiet=True, size=56, other_openings=0))
    truths = {row["video_id"]: row for row in map(json.loads, (tmp_path / "truth.jsonl").read_text().splitlines())}
    timed = 0
    for video_id, (_, row) in read(tmp_path).items():
        if "segments" in row:
            timed += 1
            assert [s["start"] for s in row["segments"]] == [event["second"] for event in truths[video_id]["events"]]
            assert join_segments(row["segments"]).text == row["human_caption"]
            assert truths[video_id]["dropped"] or 10 <= row["video_duration_in_s"] <= 18
    assert timed >= 5
    assert json.loads((tmp_path / "make_data.json").read_text())["quiet"] is True


def test_frames_change_exactly_when_an_event_starts():
    for number in range(30):
        scene = make_scene(random.Random(number), 9.0, (3.1, 4.4))
        for event in scene.events[1:]:
            before, after = (draw(scene, event.second + step, 84) for step in (-0.01, 0.9))
            assert before != after
        quiet = set(range(1, 9)) - {event.second + step for event in scene.events for step in (0, 1)}
        assert all(draw(scene, second - 0.01, 84) == draw(scene, second, 84) for second in quiet)


def test_the_number_of_workers_does_not_change_the_bytes(dataset, tmp_path):
    make_dataset(small(tmp_path), workers=2)
    written = {path.relative_to(dataset): path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == again
    assert plan(small(tmp_path, seed=1)) != plan(small(tmp_path))


def test_running_again_creates_only_missing_shards(tmp_path, monkeypatch):
    config = small(tmp_path, dropped=0, other_openings=0, shard_videos=2)
    make_dataset(config)
    first, second = sorted((tmp_path / "train").glob("*.tar"))
    kept, content = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    make_dataset(config)
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == content

    second.unlink()
    monkeypatch.setattr("make_data.encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_dataset(config)
    assert not second.exists() and not list(tmp_path.rglob("*.part"))
    with pytest.raises(InputError, match="other settings"):
        make_dataset(small(tmp_path))


def test_preview_is_one_png(tmp_path):
    preview(small(tmp_path), tmp_path / "preview.png")
    assert Image.open(tmp_path / "preview.png").size == (12 * 90, 2 * 112)
    assert not (tmp_path / "test").exists()


def test_invalid_settings_are_one_line():
    done = subprocess.run([sys.executable, PROGRAM, "--output", "x", "--size", "33"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "error: --size is 33: it must be even and 56 or more"
