"""Sampling real files: which frames are returned, when they were shown, their sizes, and what is refused."""

import logging
import math
import os
import random
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from media import make_video, read_number, rotate
from PIL import Image
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.video.frames import choose_reader, read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwen_vl_utils import vision_process

SEED = time.time_ns() % 100_000
SMALL = PixelBudget(min_pixels_per_frame=28 * 28 * 24, max_pixels_per_frame=28 * 28 * 24 * 4)
VARIABLE = np.cumsum([0] + [1 / 30] * 40 + [1 / 10] * 10 + [0.9] + [1 / 60] * 30 + [1 / 15] * 20).tolist()


def numbers(video):
    return [read_number(frame.numpy()) for frame in video.frames]


def on_screen(times, targets):
    """The simple rule: the number of the newest frame that is not later than each target."""
    return [max(i for i, time in enumerate(times) if time <= target + 1e-3) for target in targets]


def check_both(path, times, targets):
    """Both readers give the frames that were on screen at `targets`, with their times, and the same pixels."""
    videos = [read_video(path, budget=SMALL, reader=reader) for reader in ("decord", "pyav")]
    expected = on_screen(times, targets)
    for video in videos:
        assert numbers(video)[: len(expected)] == expected
        np.testing.assert_allclose(
            video.timestamps[: len(expected)], [times[i] - times[0] for i in expected], atol=2e-3
        )
    assert len(videos[0].frames) == len(expected) + len(expected) % 2
    assert torch.equal(videos[0].frames, videos[1].frames)
    np.testing.assert_array_equal(videos[0].timestamps, videos[1].timestamps)
    return videos[0]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_steady_rate(tmp_path, codec, ending):
    times = [i / 10 for i in range(40)]
    video = check_both(make_video(tmp_path / f"v.{ending}", times, codec=codec), times, np.arange(8) / 2)
    assert (video.fps, video.clips, video.seconds_per_clip) == (2.0, 4, 1.0)
    assert video.frames.dtype == torch.uint8
    assert video.timestamps.dtype == np.float64


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"preset": "medium", "bf": "3"}),
        ("libx264", {"preset": "medium", "x264-params": "open-gop=1:log-level=none"}),
        ("libx265", {"preset": "fast", "x265-params": "open-gop=1:bframes=4:log-level=none"}),
    ],
)
def test_frames_that_refer_to_later_ones(tmp_path, codec, options):
    times = [i / 30 for i in range(120)]
    path = make_video(tmp_path / "v.mp4", times, codec=codec, fps=30, options=options)
    check_both(path, times, np.arange(8) / 2)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_rate(tmp_path, ending):
    path = make_video(tmp_path / f"v.{ending}", VARIABLE, fps=30)
    video = check_both(path, VARIABLE, np.arange(11) / 2)
    assert video.fps == 2.0
    assert (video.timestamps <= np.arange(12) / 2 + 2e-3).all()  # none from the future


def test_odd_last_frame_is_repeated(tmp_path):
    times = [i / 10 for i in range(33)]
    video = check_both(make_video(tmp_path / "v.mp4", times), times, np.arange(7) / 2)
    assert len(video.frames) == 8
    assert torch.equal(video.frames[6], video.frames[7])
    assert video.timestamps[6] == video.timestamps[7] == 3.0


def test_whole_seconds_give_whole_clips(tmp_path):
    for fps in (24, 25, 30):
        times = [i / fps for i in range(round(3 * fps))]
        assert read_video(make_video(tmp_path / "v.mp4", times, fps=fps), budget=SMALL).clips == 3


def test_time_counts_from_the_first_frame(tmp_path):
    times = [3 + i / 10 for i in range(40)]
    check_both(make_video(tmp_path / "v.mp4", times), times, 3 + np.arange(8) / 2)


def test_slow_video_is_sampled_at_its_own_rate(tmp_path):
    times = [float(i) for i in range(8)]
    video = check_both(make_video(tmp_path / "v.mp4", times, fps=1), times, times)
    assert (video.fps, video.clips, video.seconds_per_clip) == (1.0, 4, 2.0)


def test_start_and_end(tmp_path):
    path = make_video(tmp_path / "v.mp4", seconds=6)
    for reader in ("decord", "pyav"):
        video = read_video(path, start=1.2, end=3.2, budget=SMALL, reader=reader)
        assert numbers(video) == [12, 17, 22, 27]
        np.testing.assert_allclose(video.timestamps, [1.2, 1.7, 2.2, 2.7], atol=1e-6)
    assert read_video(path, start=4, end=99, budget=SMALL).clips == 2
    with pytest.raises(InputError, match="end 1 s must be after start 2"):
        read_video(path, start=2, end=1)
    with pytest.raises(InputError, match="less than one clip"):
        read_video(path, start=5.5)
    with pytest.raises(InputError, match="start -1 must be"):
        read_video(path, start=-1)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated(tmp_path, degrees):
    """A phone's video is rotated by its header; frames must be upright, as a viewer sees them."""
    plain = read_video(make_video(tmp_path / "plain.mp4"), budget=SMALL, reader="pyav")
    turned = rotate(make_video(tmp_path / "turned.mp4"), degrees)
    for reader in ("decord", "pyav"):
        video = read_video(turned, budget=SMALL, reader=reader)
        expected = torch.rot90(plain.frames, -degrees // 90, dims=(2, 3))
        assert video.frames.shape == expected.shape
        if degrees == 180:  # resized along the same axes: equal but for the filter's rounding
            assert (video.frames.int() - expected.int()).abs().max() <= 2
        else:
            assert (video.frames.float() - expected.float()).abs().mean() < 8


def test_odd_sizes(tmp_path):
    times = [i / 10 for i in range(20)]
    for size, pixels in (((162, 98), "yuv420p"), ((161, 97), "yuv444p")):
        video = check_both(make_video(tmp_path / "v.mp4", times, size=size, pixels=pixels), times, np.arange(4) / 2)
        assert all(side % 28 == 0 for side in video.frames.shape[2:])


def test_mpegts_is_not_read_with_decord(tmp_path):
    """decord silently loses the first frames of a transport stream."""
    times = [i / 10 for i in range(40)]
    path = make_video(tmp_path / "v.ts", times)
    assert numbers(read_video(path, budget=SMALL)) == on_screen(times, np.arange(8) / 2)
    with pytest.raises(InputError, match=r"decord cannot read a file with MPEG-TS.*FORCE_QWENVL_VIDEO_READER=pyav"):
        read_video(path, budget=SMALL, reader="decord")


def test_log_names_each_reader_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("qwen_vl_streaming.video.frames._announced", set())
    path = make_video(tmp_path / "v.mp4")
    with caplog.at_level(logging.INFO):
        for reader in (None, "decord", "pyav"):
            read_video(path, budget=SMALL, reader=reader)
    assert [record.message for record in caplog.records] == [f"{path}: read with {name}" for name in ("pyav", "decord")]


def test_choose_reader():
    assert choose_reader({}) is None
    assert choose_reader({"FORCE_QWENVL_VIDEO_READER": ""}) is None
    assert choose_reader({"FORCE_QWENVL_VIDEO_READER": "PyAV"}) == "pyav"
    with pytest.raises(InputError, match=r"torchcodec.*pyav or decord"):
        choose_reader({"FORCE_QWENVL_VIDEO_READER": "torchcodec"})


def test_pixels_are_resized_as_the_processor_does(tmp_path):
    """Bicubic with antialiasing: the same as Pillow's, which Qwen's own image processor uses."""
    path = make_video(tmp_path / "v.mp4", size=(640, 360))
    full = read_video(path, budget=PixelBudget(28 * 28 * 200, 28 * 28 * 400), reader="pyav").frames[1]
    small = read_video(path, budget=SMALL, reader="pyav").frames[1]
    _, height, width = small.shape
    assert full.shape[1:] == (364, 644) and (height, width) != (364, 644)
    pillow = Image.fromarray(full.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(pillow).astype(int) - small.permute(1, 2, 0).numpy()).mean() < 3


@pytest.mark.parametrize("height", [97, 360, 480, 720, 1080, 2160])
@pytest.mark.parametrize("ratio", [1, 4 / 3, 16 / 9, 9 / 16, 2.39])
@pytest.mark.parametrize("frames", [2, 10, 20, 60, 600])
def test_pixel_budget(height, ratio, frames):
    budget = PixelBudget()
    tall, wide = budget.size(height, round(height * ratio), frames)
    assert tall % 28 == wide % 28 == 0
    assert tall * wide >= budget.min_pixels_per_frame * 0.75  # sides are rounded down to whole tokens
    share = max(budget.max_pixels_per_video / frames, budget.min_pixels_per_frame * 1.25)  # rounded up to whole tokens
    assert tall * wide <= min(budget.max_pixels_per_frame, share)


PUBLISHED = {"min_pixels": 78_400, "total_pixels": 2_408_448}
"""VIDEO_MIN_PIXELS and VIDEO_MAX_PIXELS in the published training script."""


def test_no_usual_frame_of_a_stream_exceeds_the_largest_grid():
    """A server reserves memory by it. Frames smaller than the minimum are enlarged beyond it, most of all."""
    print("seed", SEED)
    draw = random.Random(SEED)
    budgets = [PixelBudget(), PixelBudget(budget="stream"), PixelBudget(3136, 7056), PixelBudget(71_344, 71_344)]
    for number in range(40):
        least = draw.randint(784, 200_000) if number % 2 else 784 * draw.choice([108, 144, 196, 256, 288])
        most = draw.randint(least, 4 * least)
        budgets.append(PixelBudget(least, most, draw.randint(least, 90 * most), draw.choice(["video", "stream"])))
    for budget in budgets:
        largest = math.prod(budget.largest_grid)
        found = []
        for _ in range(300):
            side = math.exp(draw.uniform(math.log(20), math.log(3000)))
            ratio = draw.choice([draw.uniform(1, 4), 1, 2, 3, 4])
            short, long = max(1, round(side)), max(1, int(round(side) * ratio))
            size = draw.sample([short, long], 2)
            found.append(math.prod(budget.size(*size, frames=0)) // 28**2)
        assert max(found) <= largest <= 2 * max(found), budget
    assert PixelBudget().size(144, 176, frames=0) == (280, 336)
    assert 10 * 12 <= math.prod(PixelBudget().largest_grid) < 130


@pytest.mark.parametrize("frames, tokens", [(10, 594), (20, 299), (40, 144), (60, 91), (120, 91)])
def test_frames_have_the_published_sizes(monkeypatch, frames, tokens):
    """The published code sizes frames as qwen_vl_utils does."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {frames}")
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "blank")
    for height, width in ((720, 1280), *((draw.randint(60, 2000), draw.randint(60, 2000)) for _ in range(50))):
        blank = torch.zeros(1, dtype=torch.uint8).expand(frames, 3, height, width)
        monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "blank", lambda _, blank=blank: (blank, {}, 2.0))
        monkeypatch.setattr(vision_process.transforms.functional, "resize", lambda _, size, **__: torch.zeros(size))
        theirs = tuple(vision_process.fetch_video({"video": "blank", **PUBLISHED}).shape)
        if 0 not in theirs:  # a narrow frame, which they cannot resize
            assert PixelBudget().size(height, width, frames) == theirs
    assert math.prod(PixelBudget().size(720, 1280, frames)) == tokens * 28 * 28


@pytest.mark.parametrize("height, width", [(720, 1280), (1080, 1920), (480, 640), (1280, 720)])
def test_a_stream_is_sized_as_the_longest_video(height, width):
    """The published budget gives a short video larger frames, so their size reveals its length."""
    published, stream = PixelBudget(), PixelBudget(budget="stream")
    longest = published.size(height, width, 60)
    assert {stream.size(height, width, frames) for frames in (0, 2, 10, 60, 600)} == {longest}
    assert published.size(height, width, 0) == longest != published.size(height, width, 10)
    with pytest.raises(InputError, match="--budget film: choose video or stream"):
        PixelBudget(budget="film")


def test_frames_of_a_longer_video_begin_with_those_of_a_shorter_one(tmp_path):
    """Bitwise with `stream`, but not with the published budget."""
    sizes = {"size": (320, 240), "options": {"bf": "0", "x264-params": "rc-lookahead=0:log-level=none", "qp": "20"}}
    short, long = (make_video(tmp_path / f"{n}.mp4", seconds=n, **sizes) for n in (3, 6))
    pixels = 28 * 28 * 4, 28 * 28 * 90, 28 * 28 * 200
    for reader in ("decord", "pyav"):
        for way, same in (("stream", True), ("video", False)):
            frames = [read_video(p, budget=PixelBudget(*pixels, way), reader=reader).frames for p in (short, long)]
            assert (frames[0].shape[1:] == frames[1].shape[1:]) == same
            assert not same or torch.equal(frames[0], frames[1][: len(frames[0])])


def test_a_narrow_frame_keeps_a_row_of_tokens():
    assert PixelBudget(3136, 3136).size(44, 210, 8) == (28, 112)
    assert PixelBudget(3136, 3136).size(210, 44, 8) == (112, 28)


def test_pixel_budget_refuses_invalid_values():
    with pytest.raises(InputError, match="max_pixels_per_frame 5000"):
        PixelBudget(max_pixels_per_frame=5000)
    with pytest.raises(InputError, match="max_pixels_per_video 1000"):
        PixelBudget(max_pixels_per_video=1000)


def cut_in_half(tmp_path):
    """The index of the file is complete and states 6 s; the second half of the data is missing."""
    path = make_video(tmp_path / "v.mp4", seconds=6, size=(320, 240), options={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


BROKEN = {
    "missing": (lambda folder: folder / "none.mp4", "does not exist"),
    "a folder": (lambda folder: folder, "is a folder: give a video file"),
    "a pipe": (lambda folder: pipe(folder / "v.mp4"), "is a pipe, a socket or a device: write"),
    "empty": (lambda folder: write(folder / "v.mp4", b""), "is empty"),
    "no video": (lambda folder: write(folder / "v.mp4", b"no video at all" * 99), "cannot be opened"),
    "one frame": (lambda folder: make_video(folder / "v.mp4", [0.0]), "less than one clip"),
    "too short": (lambda folder: make_video(folder / "v.mp4", seconds=0.6), "less than one clip"),
    "cut": (cut_in_half, "cannot be opened|truncated|cannot be decoded"),
}


def write(path, data):
    path.write_bytes(data)
    return path


def pipe(path):
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("reader", [None, "decord", "pyav"])
@pytest.mark.parametrize("kind", BROKEN)
def test_refused_with_one_line_that_names_the_file(tmp_path, kind, reader):
    make, message = BROKEN[kind]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_video(path, reader=reader)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_same_tensors_again(tmp_path):
    """Training and evaluation call the same function: its result must not depend on the process or on earlier calls."""
    path = make_video(tmp_path / "v.mp4", VARIABLE, fps=30)
    first, second = read_video(path), read_video(path)
    assert torch.equal(first.frames, second.frames)
    np.testing.assert_array_equal(first.timestamps, second.timestamps)


def test_timestamps_ascend(tmp_path):
    video = read_video(make_video(tmp_path / "v.mp4", VARIABLE, fps=30), budget=SMALL)
    assert all(a <= b for a, b in pairwise(video.timestamps))


@pytest.mark.parametrize("columns", [16, 24, 48, 72])
def test_narrow_videos_whose_frames_decord_gives_wrong_channels(tmp_path, columns):
    path = make_video(tmp_path / "narrow.mp4", size=(columns, 64))
    video = read_video(path, budget=SMALL)
    assert video.frames.shape[1] == 3 and len(video.frames) > 1
