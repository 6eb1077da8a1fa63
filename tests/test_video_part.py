"""Rows that name a part of their video: training, evaluation and data preparation read the same seconds of it, and a
part that is not there is reported."""

import json
from functools import partial

import planning
import pytest
import torch
from captioning import VideoDataset, make_row
from media import make_video
from metrics.timing import measure_file, read_points, times_of
from preparation.rules import BAD, Rules, Sample, apply_rules
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.video_part import part_seconds, video_part
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.stream import Caption
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl import headers, prescan
from qwenvl.data import StreamingDataset
from qwenvl.rows import read_rows
from ranks import Rank
from settings import Settings

import mani_data

BUDGET = PixelBudget(3136, 28 * 28 * 12)
ROW = {"video_path": "film.mp4", "human_caption": "A red ring turns blue and moves up, and then it is gone for good."}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    folder = tmp_path_factory.mktemp("film")
    make_video(folder / "film.mp4", seconds=8.0, fps=12)
    return folder


def write(folder, *parts):
    data = folder / "rows.jsonl"
    rows = [{"video_id": f"r{number}", **ROW, **part} for number, part in enumerate(parts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_the_fields_of_a_row():
    assert video_part({}) == {} == video_part({"video_start": None, "video_end": None})
    assert video_part({"video_start": 0, "video_end": 2.5}) == {"start": 0.0, "end": 2.5}
    assert part_seconds("a.mp4", {}, 8.0) == 8.0 and part_seconds("a.mp4", {"start": 2.0}, 8.0) == 6.0
    assert part_seconds("a.mp4", {"start": 2.0, "end": 8.9}, 8.0) == 6.0  # published times are rounded
    for part in ({"start": 8.0}, {"end": 9.1}, {"start": 1.0, "end": 20.0}):
        with pytest.raises(InputError, match=r"video a.mp4 lasts 8.00 s, but its row names the part from \d s"):
            part_seconds("a.mp4", part, 8.0)


@pytest.mark.parametrize(
    "part, says",
    [
        ({"video_start": -1}, "has the video_start -1, which is not a time"),
        ({"video_end": "00:10"}, "has the video_end '00:10', which is not a time"),
        ({"video_end": float("nan")}, "has the video_end nan, which is not a time"),
        ({"video_end": 10**400}, "has the video_end 1000000000000000000000000000000000000000, which is not a time"),
        ({"video_start": True}, "has the video_start True, which is not a time"),
        ({"video_start": 3, "video_end": 3}, "has the video_end 3, which is not after the start at 3 s"),
        ({"video_end": 0}, "has the video_end 0, which is not after the start at 0 s"),
    ],
)
def test_invalid_fields_are_named_with_their_line(tmp_path, part, says):
    with pytest.raises(InputError) as error:
        list(read_data_rows(write(tmp_path, {}, part)))
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: {says}")


def test_all_programs_read_the_same_part(film, made):
    parts = [{}, {"video_start": 2, "video_end": 5.5}, {"video_start": 6.5}, {"video_end": 2}]
    data = write(film, *parts)
    processor = load_processor(made[0])
    training = StreamingDataset(read_rows(str(data)), film, processor, 2, VARIANTS["group"], "wait-3", BUDGET, 4096)
    settings = Settings(
        "group", str(made[0]), data=str(data), video_root=str(film), device="cpu",
        min_pixels_per_frame=BUDGET.min_pixels_per_frame, max_pixels_per_frame=BUDGET.max_pixels_per_frame,
    )  # fmt: skip
    plan = planning.make_plan(settings, Rank(), "cpu")
    watched = VideoDataset(plan, processor, 2)
    assert [read_video(film / "film.mp4", part=video_part(part)).clips for part in parts] == [8, 4, 2, 2]
    assert planning.select(plan, ["r1", "r2"], 1).rows[0]["video_id"] == "r1"  # the longest first
    for index, part in enumerate(parts):
        sample, job = training[index], watched[index].job
        assert not sample.bad and not watched[index].reason
        assert torch.equal(sample.pixel_values, job.pixels.flatten(0, 1))
        video = read_video(film / "film.mp4", budget=BUDGET, start=part.get("video_start"), end=part.get("video_end"))
        assert len(job.pixels) == video.clips
    assert not torch.equal(watched[1].job.pixels[0], watched[0].job.pixels[0])
    assert torch.equal(watched[3].job.pixels[1], read_clip(processor, film, 1.0))
    assert prescan.scan(training).bad == {}
    counted = [headers.count_clips(training, index, headers.Header()) for index in range(4)]
    assert [header.clips for header in counted] == [(8,), (4,), (2,), (2,)]
    assert [header.seconds for header in counted] == [8.0, 3.5, 1.5, 2.0]
    lengths = [len(training[index].input_ids) for index in range(4)]
    training.max_length = lengths[1]
    assert list(prescan.scan(training).bad) == [i for i, length in enumerate(lengths) if length > lengths[1]] != []


def read_clip(processor, film, start):
    from qwen_vl_streaming.model.prompts import clip_pixels

    return clip_pixels(processor, read_video(film / "film.mp4", budget=BUDGET, start=start, end=start + 1).frames)[0][0]


def test_times_count_from_the_start_of_the_part(film, made, tmp_path, monkeypatch):
    """Of a part from 2 to 5.5 s, clip 2 has arrived at 2 s, and the last, clip 4, is half a second long."""
    words = [{"start": 0.5, "end": 1.5, "text": "red"}, {"start": 2.5, "end": 3.0, "text": "blue"}]
    late = [*words, {"start": 4.0, "end": 5.2, "text": "gone"}]  # within the video, but not within the part
    part = {"human_caption": None, "video_start": 2, "video_end": 5.5, "segments": words}
    data = write(film, part, {**part, "segments": late})
    processor = load_processor(made[0])
    training = StreamingDataset(read_rows(str(data)), film, processor, 2, VARIANTS["group"], "wait-3", BUDGET, 4096)
    red, blue, end = (processor.tokenizer(text).input_ids for text in ("red", " blue", "<|im_end|>"))
    assert training.slots(0, 4, 1.0) == [[], red, blue, end] and not training[0].bad
    after = "segment 3 (4 to 5.2 s) ends after the video, at"
    assert list(prescan.scan(training).bad) == [1] and after in training[1].bad[1]

    settings = Settings("group", str(made[0]), data=str(data), video_root=str(film), device="cpu")
    plan = planning.make_plan(settings, Rank(), "cpu")
    watched = VideoDataset(plan, processor, 2)
    assert watched[0].job and after in watched[1].reason
    counts = [0, len(red), len(blue), 1]
    caption = Caption([*red, *blue, *end], [2] * len(red) + [3] * len(blue) + [4], counts)
    rows = [make_row(plan.rows[0], "red blue", caption, VARIANTS["group"], 0.1)]
    result, decode = tmp_path / "group_infer.json", partial(processor.tokenizer.decode, skip_special_tokens=True)
    measure_file(rows, result, times_of(rows, result, None), decode)
    assert read_points(result) == [(0.5, 2.0, False), (2.5, 3.0, False)]

    flags = f"--dataset jsonl --input {data} --output {tmp_path}/kept.jsonl --video-root {film} --workers 1"
    flags += f" --tokenizer-model-id {made[0]} --min-seconds 3.4 --max-seconds 3.6 --min-tokens-per-second 0"
    monkeypatch.setattr("sys.argv", ["mani_data.py", *flags.split()])
    mani_data.main()
    (kept,) = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    assert kept == {**json.loads(data.read_text().splitlines()[0]), "video_duration_in_s": 8.0}
    (gone,) = map(json.loads, (tmp_path / "kept_skipped.jsonl").read_text().splitlines())
    assert gone["reason"].startswith(f"segments are not valid: {after} 3.5 s")


def test_a_part_that_is_not_there_is_a_bad_sample(film, made):
    parts = [{"video_start": 20}, {"video_start": 2, "video_end": 30}, {"video_start": 2, "video_end": 2.2}]
    data = write(film, *parts)
    processor = load_processor(made[0])
    training = StreamingDataset(read_rows(str(data)), film, processor, 2, VARIANTS["group"], "wait-3", BUDGET, 4096)
    bad = prescan.scan(training).bad
    for index, says in enumerate(("from 20 s:", "from 2 s to 30 s:", "less than one clip")):
        assert says in bad[index] and says in training[index].bad[1] + ":", (bad, training[index].bad)


def test_preparation_filters_by_the_length_of_the_part():
    rules = Rules(min_seconds=2, max_seconds=4, min_tokens_per_second=3, max_tokens_per_second=5)
    row = {"human_caption": "x", "video_duration_in_s": 60}
    parts = [{"video_start": 50, "video_end": 53}, {"video_end": 5}, {"video_start": 61}, {"video_start": "x"}, {}]
    samples = [Sample("a", "a", json.dumps({**row, **part}).encode(), "a.mp4", "a.mp4") for part in parts]
    kept, long, gone, wrong, whole = (decision for _, decision in apply_rules(samples, rules, lambda texts: [12]))
    assert (kept.outcome, kept.seconds, kept.video_seconds) == ("kept", 3.0, 60.0)
    assert json.loads(kept.row)["video_duration_in_s"] == 60 and json.loads(kept.row)["video_start"] == 50
    assert long.outcome == whole.outcome == "too long" and gone.outcome == wrong.outcome == BAD
    assert "part of the video is missing: video a.mp4 lasts 60.00 s" in gone.reason
    assert "part of the video is not valid: has the video_start 'x'" in wrong.reason
