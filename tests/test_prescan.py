"""Bad samples are found from captions and headers before a model loads, and excluded from training."""

import json
import random
import time
from dataclasses import replace

import pytest
from media import make_video, rotate, sound_bytes
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl import headers, prescan
from qwenvl.data import StreamingDataset
from training import finish, flags, history, spoil, start, start_two

SEED = time.time_ns() % 100_000
CAPTION = "The video shows a red ring on the left. A blue cross appears. It turns green and moves up."


def dataset(checkpoint, rows, root, variant="group", **changes):
    given = {"budget": PixelBudget(3136, 28 * 28 * 12, 28 * 28 * 60), "max_length": 4096, **changes}
    rows = [{"video_id": row["video_path"], "human_caption": CAPTION, "question": None, **row} for row in rows]
    return StreamingDataset(rows, root, load_processor(checkpoint), 2, VARIANTS[variant], "wait-3", **given)


def test_lengths_are_known_without_decoding(made, tmp_path, monkeypatch):
    """Each random video is bad for a maximum length one below its own, and only then."""
    draw = random.Random(SEED)
    print("seed", SEED)
    rows = [{"video_path": "variable.mp4"}, {"video_path": "turned.mp4"}]
    make_video(tmp_path / "variable.mp4", times=[0, 0.1, 0.2, 0.9, 1.7, 1.75, 2.6, 3.3, 3.4])
    rotate(make_video(tmp_path / "turned.mp4", seconds=3.0), 90)
    for number in range(8):
        size = (2 * draw.randint(20, 120), 2 * draw.randint(20, 120))
        seconds, fps = draw.uniform(2.0, 9.0), draw.choice([1.5, 5, 24, 29.97])
        make_video(tmp_path / f"{number}.mp4", seconds=seconds, fps=fps, size=size)
        rows.append({"video_path": f"{number}.mp4"})
    samples = dataset(made[0], rows, tmp_path)
    lengths = [len(samples[index].input_ids) for index in range(len(rows))]
    assert not any(samples[index].bad for index in range(len(rows))) and len(set(lengths)) > 2
    monkeypatch.setattr(StreamingDataset, "_video", None)
    assert prescan.scan(samples).bad == {}
    for index, length in enumerate(lengths):
        for room in (0, 1):
            samples.max_length = length - 1 + room
            expected = [i for i, other in enumerate(lengths) if other > samples.max_length]
            bad = prescan.scan(samples).bad
            assert list(bad) == expected, (index, room)
            assert room or f"its {length} tokens exceed the maximum length {length - 1}" in bad[index]


def test_timestamps_of_good_videos_are_not_read(made, tmp_path, monkeypatch):
    make_video(tmp_path / "some.mp4", seconds=5)
    samples = dataset(made[0], [{"video_path": "some.mp4"}], tmp_path, max_length=300)
    monkeypatch.setattr(headers, "index_video", None)
    assert prescan.scan(samples).bad == {}


def test_a_video_that_begins_late(made, tmp_path):
    """Its header states its end as its length."""
    late = make_video(tmp_path / "late.mkv", [20 + i / 10 for i in range(40)])
    samples = dataset(made[0], [{"video_path": "late.mkv"}], tmp_path)
    samples.max_length = len(samples[0].input_ids)
    assert late.exists() and headers.read_header(samples, 0).clips in ((), (3, 4, 5))
    assert prescan.scan(samples).bad == {}


def test_kinds_of_bad_samples(made, tmp_path):
    whole = make_video(tmp_path / "whole.mp4", seconds=6)
    data = whole.read_bytes()
    for name, content in (
        ("empty", b""),
        ("half", data[: len(data) // 2]),
        ("text", b"no video at all"),
        ("sound", sound_bytes()),
    ):
        (tmp_path / f"{name}.mp4").write_bytes(content)
    make_video(tmp_path / "short.mp4", seconds=0.5)
    make_video(tmp_path / "ribbon.mp4", seconds=3, size=(2002, 8))
    (tmp_path / "coded.mp4").write_bytes(data.replace(b"avc1", b"zzz1"))
    make_video(tmp_path / "action.mp4", [0, 5, 5.1, 5.2, 29])
    spoil(whole, tmp_path / "spoilt.mp4")
    five = "A red ring turns blue"
    rows = [
        {"video_path": "missing.mp4", "says": "does not exist"},
        {"video_path": "long" * 100, "says": "cannot be read (File name too long)"},
        {"video_path": "empty.mp4", "says": "is empty"},
        {"video_path": "half.mp4", "says": "half.mp4"},
        {"video_path": "text.mp4", "says": "cannot be opened"},
        {"video_path": "sound.mp4", "says": "no video stream"},
        {"video_path": "short.mp4", "says": "less than one clip of 1.00 s"},
        {"video_path": "ribbon.mp4", "says": "ribbon.mp4 has frames of 2002 x 8 pixels, more than 200 times as long"},
        {"video_path": "whole.mp4", "human_caption": " ", "says": "no tokens"},
        {"video_path": "whole.mp4", "human_caption": five, "says": "its caption has 5 tokens for 6 clips"},
        {"video_path": "whole.mp4", "human_caption": f"{five} now", "says": None},
        {"video_path": "spoilt.mp4", "says": None},  # found only by decoding
        {"video_path": "coded.mp4", "says": "no decoder"},
        {"video_path": "action.mp4", "says": "tokens for 30 clips"},
    ]
    samples = dataset(made[0], rows, tmp_path)
    bad = prescan.scan(samples).bad
    for index, row in enumerate(rows):
        assert (row["says"] in bad[index]) if row["says"] else (index not in bad), row
    assert len(prescan.scan(samples, enough=2).bad) == 3
    # Training gives the same reasons when it reads them; offline variants have no slots that could be empty.
    for index in (0, 1, 5, 7, 8, 9, 12, 13):
        assert samples[index].bad[1] == bad[index]
    assert samples[11].bad and not samples[10].bad
    offline = prescan.scan(dataset(made[0], rows, tmp_path, "batch")).bad
    assert offline.keys() == bad.keys() - {9, 13}


def test_clips_that_reach_the_text_positions_of_gap(made, tmp_path):
    """Known from headers alone, and for a slow video from its own rate, as in training."""
    make_video(tmp_path / "long.mp4", seconds=20)
    make_video(tmp_path / "slow.mp4", [float(i) for i in range(12)], fps=1)  # 6 clips of 2 s
    rows = [{"video_path": name, "human_caption": 5 * CAPTION} for name in ("long.mp4", "slow.mp4")]
    samples = dataset(made[0], rows, tmp_path, "gap")
    around = max(len(t.prompt) + len(t.tail) for t in samples.templates)
    for clips, bad in ((4, [0, 1]), (16, [0]), (23, [])):  # of a second each
        samples.variant = replace(VARIANTS["gap"], text_start=around + 2 * clips)
        found = prescan.scan(samples).bad
        assert list(found) == bad, (clips, found)
        for index in range(2):
            said = (samples[index].bad or ("", ""))[1]
            assert said == found.get(index, ""), (clips, index)
            assert not said or "too many for gap" in said


def rows_of(made):
    return [json.loads(line) for line in made[1].read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_excluded_samples_stay_excluded_when_a_run_resumes(made, tmp_path):
    """One video is missing and one cannot be decoded; the missing one is restored before the run resumes."""
    rows = rows_of(made)
    returns = tmp_path / "returns.mp4"
    spoilt = spoil(made[1].parent / "videos" / f"{rows[5]['video_id']}.mp4", tmp_path / "spoilt.mp4")
    there, rows[2]["video_path"], rows[5]["video_path"] = rows[2]["video_path"], str(returns), str(spoilt)
    data = write(tmp_path / "train.jsonl", rows)

    def run(name, status=0, *act):
        out = tmp_path / name
        log = tmp_path / f"{name}.log"
        changes = {"max_bad_share": 0.3, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "save_steps": 3}
        arguments = flags(made, out, train_data=data, **changes)
        finish(start(arguments, log, *act), status)
        return out, log.read_text()

    undisturbed, said = run("undisturbed")
    # 7 samples per epoch, one of them blank; the missing one is found before training.
    assert len(history(undisturbed)) == 7
    assert said.index("skipped " + rows[2]["video_id"]) < said.index("7 samples; training") < said.index(spoilt.name)
    assert [row["video_id"] for row in lines(undisturbed / "skipped.jsonl")] == [
        rows[2]["video_id"],
        rows[5]["video_id"],
    ]
    assert json.loads((undisturbed / "run.json").read_text())["data"]["left_out"] == [3]

    run("halted", 143, "SIGTERM", 4)
    returns.write_bytes((made[1].parent / there).read_bytes())
    halted, _ = run("halted")
    before, after = history(undisturbed), history(halted)
    assert before.keys() == after.keys()
    for step in before:
        assert after[step] == pytest.approx(before[step], abs=1e-5), step
    assert lines(halted / "skipped.jsonl") == lines(undisturbed / "skipped.jsonl")


def test_too_many_bad_samples_end_the_run_before_a_model_loads(made, tmp_path):
    """In two processes, each of which checks half of the data, with one line that names the file of all reasons."""
    broken = tmp_path / "model"
    broken.mkdir()
    for path in made[0].iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    out, log = tmp_path / "out", tmp_path / "log"
    rows = rows_of(made)
    data = write(tmp_path / "train.jsonl", [{**row, "human_caption": "A ring"} for row in rows[:3]] + rows[3:])
    arguments = flags(made, out, model_name_or_path=broken, train_data=data)
    for process in start_two(arguments, log):
        finish(process, 2)
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert (
        "3 of 8 samples are bad" in error and str(out / "skipped.jsonl") in error and "Traceback" not in log.read_text()
    )
    assert [row["video_id"] for row in lines(out / "skipped.jsonl")] == [row["video_id"] for row in rows[:3]]
    assert sorted(path.name for path in out.iterdir()) == [".lock", "skipped.jsonl"]
