"""Training and evaluation read a video alike: the same frames, tensors, timing and positions, on unusual real files."""

import json

import planning
import pytest
import torch
from captioning import VideoDataset
from make_model import tiny_checkpoint
from media import make_video, rotate
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor
from qwen_vl_streaming.timeline.positions import timeline_positions
from qwen_vl_streaming.timeline.timeline import ANSWER, CLIP, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl.data import StreamingDataset
from ranks import Rank
from settings import Settings


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "plain.mp4", seconds=4.0, fps=24)
    make_video(folder / "slow.mp4", seconds=9.0, fps=1.5)  # sampled at 1.5 frames a second, since there are no more
    make_video(folder / "variable.mp4", times=[0, 0.1, 0.2, 0.9, 1.7, 1.75, 2.6, 3.3, 3.4])
    make_video(folder / "odd.mp4", seconds=2.6, size=(122, 94))
    rotate(make_video(folder / "turned.mp4", seconds=3.0), 90)
    return folder


@pytest.mark.parametrize("variant", ["origin", "group", "overlap"])
def test_training_and_evaluation_read_the_same(videos, tmp_path, variant):
    checkpoint = tiny_checkpoint(tmp_path / "model")
    processor = load_processor(checkpoint)
    names = ["plain.mp4", "slow.mp4", "variable.mp4", "odd.mp4", "turned.mp4"]
    rows = [{"video_id": name, "video_path": name, "human_caption": "The video shows a red ring."} for name in names]
    budget = PixelBudget(3136, 28 * 28 * 12)
    training = StreamingDataset(rows, videos, processor, 2, VARIANTS[variant], "wait-3", budget, 4096)
    training.templates = [training.templates[-1]] * len(QUESTIONS)  # evaluation asks the last question
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(
        variant, str(checkpoint), data=str(data), video_root=str(videos), device="cpu",
        min_pixels_per_frame=budget.min_pixels_per_frame, max_pixels_per_frame=budget.max_pixels_per_frame,
    )  # fmt: skip
    watched = VideoDataset(planning.make_plan(settings, Rank(), "cpu"), processor, 2)
    for index, name in enumerate(names):
        sample, video = training[index], watched[index].job
        assert not sample.bad and not watched[index].reason
        assert torch.equal(sample.pixel_values, video.pixels.flatten(0, 1)), name
        clips = len(video.pixels)
        assert sample.grid_thw.tolist() == [clips, 2 * video.grid[0], 2 * video.grid[1]]
        assert clips == read_video(videos / name, budget=budget).clips

        # The layout that evaluation makes of it places every token where training placed it.
        layout = video.layout
        slots = [0] * clips
        for j in range(int((sample.labels != -100).sum())):
            slots[min(j // 3, clips - 1) if VARIANTS[variant].streams else clips - 1] += 1
        timeline = make_timeline(VARIANTS[variant], layout, slots)
        assert torch.equal(timeline_positions(timeline), sample.position_ids), name
        if name == "slow.mp4" and variant == "group":
            times = sample.position_ids[0, timeline.rows.part == CLIP].unique()
            assert times.diff().tolist()[:3] == [2, 3, 3]  # two position steps a second, a clip every 4/3 seconds
            assert (timeline.rows.part == ANSWER).sum() == sum(slots)
