"""Rows with times in training and evaluation: the schedule is the data's, the forward pass of training equals streaming
with it, bad rows are skipped and counted, and words that are late are reported."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from captioning import VideoDataset, make_row
from planning import read_data
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import clip_pixels, load_processor
from qwen_vl_streaming.reference import caption
from qwen_vl_streaming.stream import Caption
from qwen_vl_streaming.timeline.attention import make_mask
from qwen_vl_streaming.timeline.segments import row_caption
from qwen_vl_streaming.timeline.timeline import Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl import prescan
from qwenvl.arguments import ModelArguments
from qwenvl.data import IGNORED, StreamingDataset
from qwenvl.rows import read_rows
from schedules import Schedules
from tasks import TASKS
from test_reference import Forced

TEXTS = ("A red ring appears on the left.", "It turns blue.", "It", "moves", "The blue ring leaves.")


@pytest.fixture(scope="module")
def loaded(made):
    return load_processor(made[0]), load_model(made[0], "sdpa", torch.float32).eval()


def segment(start: float, end: float, text: str = "A ring.") -> dict:
    return {"start": start, "end": end, "text": text}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def timed_rows(made, path, change=lambda number, row: None):
    """The rows of `made` with random segments; the first also keeps its human_caption."""
    draw, found = random.Random(0), []
    for number, row in enumerate(map(json.loads, made[1].read_text().splitlines())):
        times = sorted(draw.uniform(0, row["video_duration_in_s"]) for _ in range(10))
        texts = [segment(a, b, draw.choice(TEXTS)) for a, b in zip(times[::2], times[1::2], strict=True)]
        row = {**row, "segments": texts, "segment_time": draw.choice(["end", "start", "spread"])}
        if number:
            row.pop("human_caption")
        change(number, row)
        found.append(row)
    return write(path, found)


def dataset(made, data, variant="group", **changes):
    arguments = {"budget": PixelBudget(3136, 3136), "max_length": 4096, **changes}
    processor = load_processor(made[0])
    return StreamingDataset(read_rows(data), data.parent, processor, 2, VARIANTS[variant], "wait-3", **arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_streaming_with_the_schedule_of_the_data(made, loaded, tmp_path, variant):
    """The logits of training's forward pass, whose slots may be silent, are those of a stream."""
    processor, model = loaded
    samples = dataset(made, timed_rows(made, tmp_path / "timed.jsonl"), variant, max_tokens_per_slot=3)
    silent = 0
    for index in (0, 3):
        sample, video, template = samples[index], samples._video(index), samples.template(index)
        slots = samples.slots(index, video.clips, video.seconds_per_clip)
        counts, answer = list(map(len, slots)), [token for slot in slots for token in slot]
        assert processor.tokenizer.decode(answer) == row_caption({"segments": samples.rows[index]["segments"]}) + (
            "<|im_end|>"
        )
        assert max(counts[:-1]) <= (3 if VARIANTS[variant].streams else 0)
        silent += counts.count(0)
        pixels, grid = clip_pixels(processor, video.frames)
        layout = template.layout(grid, 2 * video.seconds_per_clip)
        flags = sample.visual[None], sample.text[None]
        with torch.no_grad():
            logits = model(
                input_ids=sample.input_ids[None],
                position_ids=sample.position_ids[:, None],
                attention_mask=make_mask(*flags, VARIANTS[variant].parallel, "sdpa"),
                pixel_values_videos=sample.pixel_values,
                video_grid_thw=sample.grid_thw[None],
            ).logits[0]
            visual = model.perceive(pixels, grid)
        streams = Forced(model, VARIANTS[variant], [template], [layout], answers=[answer])
        (streamed,) = caption(streams, [visual], [Schedule(tuple(counts[:-1]))])
        assert streamed.tokens == answer and streamed.schedule == counts
        trained = logits[sample.labels != IGNORED]
        assert sample.labels[sample.labels != IGNORED].tolist() == answer
        assert (trained - torch.stack(streams.produced[0])).abs().max() < 1e-4
    assert silent


def test_a_flag_chooses_between_times_and_captions(made, tmp_path):
    """Rows without segments keep wait-K."""
    data = timed_rows(made, tmp_path / "timed.jsonl")
    plain = dataset(made, made[1])
    timed, untimed = dataset(made, data), dataset(made, data, uses_times=False)
    for index in (0, 1):
        row, decode = timed.rows[index], timed.processor.tokenizer.decode
        text = row_caption({"segments": row["segments"]})
        wanted = [text, row_caption(row)]
        for samples, expected in zip((timed, untimed), wanted, strict=True):
            labels = samples[index].labels
            assert decode(labels[labels != IGNORED]) == expected + "<|im_end|>"
    assert torch.equal(untimed[0].input_ids, plain[0].input_ids)
    both = write(tmp_path / "both.jsonl", [*data.read_text().splitlines()[:1], *made[1].read_text().splitlines()[1:]])
    both.write_text("\n".join(json.loads(line) for line in both.read_text().splitlines()))
    mixed = dataset(made, both)
    assert torch.equal(mixed[0].input_ids, timed[0].input_ids) and torch.equal(mixed[1].input_ids, plain[1].input_ids)
    assert ModelArguments(str(made[0])).uses_times and not ModelArguments(str(made[0]), schedule="wait").uses_times
    for name, value in (("schedule", "wait-3"), ("max_tokens_per_slot", 0), ("max_tokens_per_slot", 10**6)):
        with pytest.raises(InputError, match=f"--{name} {value}: "):
            ModelArguments(str(made[0]), **{name: value})


BAD = {
    1: ([segment(1, 3), segment(0, 2)], "segment 2 (0 to 2 s) "),
    2: ([segment(-1, 2)], "segment 1 (-1 to 2 s) starts before 0"),
    3: ([segment(1, 90)], "segment 1 (1 to 90 s) ends after the video, at "),
    4: ([segment(1, float("nan"))], "segment 1 (1 to nan s) has a time that is not a finite number"),
    5: ([], "it has no segments"),
}


def test_bad_rows_are_skipped_and_late_words_reported(made, tmp_path):
    """Before a model loads, and again when a sample is read."""

    def change(number, row):
        row |= {"segments": BAD[number][0]} if number in BAD else {}
        if number == 6:  # most slots are silent
            row |= {"segments": [segment(4, 5, "ring")], "segment_time": "start"}
        if number == 0:
            row |= {"segments": [segment(0, 1, "ring " * 20), segment(1, 2, "end")], "segment_time": "start"}

    data = timed_rows(made, tmp_path / "timed.jsonl", change)
    samples = dataset(made, data, max_tokens_per_slot=8)
    found = prescan.scan(samples)
    assert list(found.bad) == list(BAD)
    for index, (_, reason) in BAD.items():
        assert found.bad[index].startswith(f"{data}, line {index + 1}: {reason}"), found.bad[index]
        assert samples[index].bad == (str(samples.rows[index]["video_id"]), found.bad[index])
    labels = samples[6].labels
    assert samples.processor.tokenizer.decode(labels[labels != IGNORED]) == "ring<|im_end|>"
    # All of the first row is due in slot 1. That holds 8 tokens, as does slot 2, and the rest is in slot 3.
    assert str(found.captions) == "" and found.late.seconds[1.0] >= 8 and found.late.seconds[2.0] >= 4


def test_lateness_in_one_line():
    words = prescan.LateWords(most=8)
    assert str(words) == ""
    words.add([0.0] * 1000)
    assert str(words) == "times: each of 1,000 words is written in the first slot after its time"
    words.add([1.0] * 60 + [2.0] * 35 + [7.0] * 5)
    assert str(words) == (
        "times: 100 of 1,100 words are late, since a slot has at most 8 tokens: by 1.0 s (median), 2.0 s (95%), 7.0 s "
        '(maximum): see "Captions with times" in docs/data.md'
    )


def test_evaluation_scores_against_the_text_and_keeps_the_times(made, loaded, tmp_path):
    data = timed_rows(
        made, tmp_path / "timed.jsonl", lambda n, row: row.update(segments=BAD[n][0]) if n in (2, 3) else 0
    )
    source = list(map(json.loads, data.read_text().splitlines()))
    rows = read_data(data, None, TASKS["description"])
    assert [row["annotation"] for row in rows] == [row_caption(row) for row in source]
    assert rows[0]["annotation"] == source[0]["human_caption"] and rows[1]["segments"] == source[1]["segments"]
    work = SimpleNamespace(
        rows=rows,
        end_of_slot=None,
        root=data.parent,
        video_root=None,
        max_clips=None,
        variant=VARIANTS["group"],
        budget=PixelBudget(3136, 3136),
        reader=None,
        schedules=Schedules("wait-3", VARIANTS["group"]),
        dtype="float32",
    )
    videos = VideoDataset(work, loaded[0], 2)
    assert videos[1].job and videos[2].reason.startswith(f"{data}, line 3: segment 1 (-1 to 2 s) starts before 0")
    assert videos[3].reason.startswith(f"{data}, line 4: segment 1 (1 to 90 s) ends after the video, at ")
    written = make_row(rows[1], "A ring.", Caption([1, 2], [1, 1], [2]), VARIANTS["group"], 0.5)
    assert list(written)[-1] == "segments" and written["segments"] == source[1]["segments"]
    plain = read_data(made[1], None, TASKS["description"])[0]
    assert "segments" not in make_row(plain, "A ring.", Caption([1], [1], [1]), VARIANTS["group"], 0.5)
