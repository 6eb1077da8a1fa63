"""The library from a notebook: `Captioner` writes what `live` writes, from files, streams and custom sources."""

import inspect
import json
import math
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qwen_vl_streaming
import torch
from media import make_video
from qwen_vl_streaming import Captioner, Clip, InputError, Source, open_session
from qwen_vl_streaming.common.clock import now
from qwen_vl_streaming.devices import Devices
from qwen_vl_streaming.live import cli
from qwen_vl_streaming.live.setup import warm_up
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, make_template
from qwen_vl_streaming.replay import check_clips, replay, video_clips
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.opening import open_source
from qwen_vl_streaming.video.pixel_budget import PixelBudget

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "code/qwen-vl-utils"


@pytest.fixture(scope="module")
def captioner(made):
    return Captioner(made[0], device="cpu")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", seconds=4, size=(84, 56))


def test_it_writes_what_live_writes(captioner, made, film, tmp_path, monkeypatch, capsys):
    pieces = [*captioner.watch(film, speed=10, max_new_tokens=12)]
    tokens = [token.token for token in captioner.session.written]
    assert tokens and "".join(piece.text for piece in pieces) == captioner.processor.decode(
        tokens, skip_special_tokens=True
    )
    flags = ["--model", made[0], "--source", film, "--speed", "10", "--max-new-tokens", "12", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["live", *map(str, flags), "--record", str(tmp_path / "record.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert read_record(tmp_path / "record.json").tokens == tokens


def test_text_arrives_while_the_video_plays(captioner, film):
    began = time.monotonic()
    options = {"speed": 4, "max_new_tokens": 40}
    arrived = [(piece.second, 4 * (time.monotonic() - began)) for piece in captioner.watch(film, **options)]
    seconds = [second for second, _ in arrived]
    assert seconds == sorted(seconds) and len(set(seconds)) > 2
    # A clip of a second is there once its second frame is, half a second before its end.
    assert all(when >= second - 0.6 for second, when in arrived)


def test_the_example_of_a_custom_source(captioner, monkeypatch, capsys):
    """That of `help(Source)`, with frames."""
    example = inspect.getdoc(Source).partition("Example::\n")[2]
    monkeypatch.setattr(qwen_vl_streaming, "Captioner", lambda model: captioner)
    exec(textwrap.dedent(example), {"batches": [torch.zeros(2, 3, 56, 56, dtype=torch.uint8)] * 3})
    assert capsys.readouterr().out.startswith("1.0 ")


def test_a_custom_frame_source(captioner, film, tmp_path):
    """As CONTRIBUTING shows: a function that yields clips. Its session is recorded and replayed like any other."""
    video = read_video(film, budget=PixelBudget())

    def clips():
        for index in range(video.clips):
            rows = slice(2 * index, 2 * index + 2)
            yield Clip(index, video.frames[rows], video.timestamps[rows], now())

    own = [*captioner.watch(Source(clips, seconds_per_clip=1.0), record=tmp_path / "record.json", max_new_tokens=9)]
    assert own == [*captioner.watch(film, speed=10, max_new_tokens=9)]
    record = read_record(tmp_path / "record.json")
    seen = [clip_pixels(captioner.processor, clip.frames)[0][0] for clip in clips()]
    assert all(difference.tie for difference in replay(record, captioner.model, seen))


def still(count, shape=(2, 3, 56, 84), kind=torch.uint8, fault=None):
    """A custom source: `count` clips, then an error."""

    def clips():
        for index in range(count):
            yield Clip(index, torch.zeros(shape, dtype=kind), np.zeros(2), now())
        if fault:
            raise fault

    return Source(clips, 1.0)


@pytest.mark.parametrize(
    "shape, kind",
    [
        ((4, 3, 56, 84), torch.uint8),
        ((3, 3, 56, 84), torch.uint8),
        ((2, 56, 84, 3), torch.uint8),
        ((2, 1, 56, 84), torch.uint8),
        ((2, 3, 100, 100), torch.uint8),
        ((2, 3, 0, 56), torch.uint8),
        ((3, 56, 84), torch.uint8),
        ((2, 3, 56, 84), torch.float32),
        ((2, 3, 56, 84), torch.int64),
    ],
)
def test_clips_of_a_wrong_shape_or_type(captioner, shape, kind):
    message = f"clip 1 of the source is a Tensor of shape {shape} and type {kind}: give a torch.uint8 tensor"
    with pytest.raises(InputError, match=re.escape(message)):
        next(captioner.watch(still(3, shape, kind)))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("fault", [KeyError("bug"), InputError("wrong"), RuntimeError("disk on fire")])
def test_an_error_in_a_custom_source_is_raised(captioner, count, fault):
    """Once the answer for the clips before it is written."""
    pieces = []
    with pytest.raises(type(fault)) as error:
        for piece in captioner.watch(still(count, fault=fault), max_new_tokens=20):
            pieces.append(piece)
    assert error.value is fault and bool(pieces) == bool(count)
    assert not count or (captioner.session.done and len(captioner.session.log.arrived) == count)


@pytest.mark.parametrize("fault", [InputError("moved"), OSError("unplugged")])
def test_a_camera_that_is_lost_raises_nothing(captioner, fault):
    source = replace(still(3, fault=fault), live=True)
    assert [*captioner.watch(source, max_new_tokens=20)] and captioner.session.done


def test_a_source_of_other_things_than_clips(captioner):
    with pytest.raises(InputError, match="the source gave a Tensor: give a Clip"):
        next(captioner.watch(Source(lambda: iter(torch.zeros(3, 2, 3, 56, 84)), 1.0)))


def test_a_clip_of_a_numpy_array(captioner):
    clip = Clip(0, np.zeros((2, 3, 56, 84), np.uint8), np.zeros(2), now())
    with pytest.raises(InputError, match=r"clip 1 of the source is a ndarray of shape .2, 3, 56, 84. and type uint8"):
        next(captioner.watch(Source(lambda: iter([clip]), 1.0)))


@pytest.mark.parametrize(
    "clips, message",
    [
        ([{"index": 0}, {"index": 0}], "gave a Clip whose index, after 0, 0 must be at least 1"),
        ([{"index": 0}, {"index": 4}, {"index": 2}], "whose index, after 4, 2 must be at least 5"),
        ([{"index": -1}], "gave a Clip whose index -1 must be at least 0"),
        ([{"index": 0.0}], r"whose index 0.0 must be a whole number"),
        ([{"index": None}], "whose index None must be a whole number"),
        ([{"completed": None}], "clip 1 of the source: completed None must be a number"),
        ([{"completed": math.nan}], "completed nan must be"),
        ([{"broken": -1}], "broken -1 must be at least 0"),
        ([{"seconds": 0}], "seconds 0 must be above 0"),
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_clips_with_wrong_numbers(captioner, clips, message, live):
    frames = torch.zeros((2, 3, 56, 84), dtype=torch.uint8)
    made = [Clip(**{"index": 0, "frames": frames, "timestamps": np.zeros(2), "completed": now(), **c}) for c in clips]
    with pytest.raises(InputError, match=message):
        for _ in captioner.watch(Source(lambda: iter(made), 1.0, live=live), max_new_tokens=3):
            pass


def test_clips_may_be_left_out(captioner):
    frames = torch.zeros((2, 3, 56, 84), dtype=torch.uint8)
    clips = [Clip(index, frames, np.zeros(2), now()) for index in (3, 4, 9)]
    assert [*captioner.watch(Source(lambda: iter(clips), 1.0), max_new_tokens=30)]
    assert captioner.session.log.about["clips"] == [3, 4, 9]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seconds_per_clip": "1"}, "seconds_per_clip '1' must be a number"),
        ({"seconds_per_clip": True}, "seconds_per_clip True must be a number"),
        ({"seconds_per_clip": 10**30}, "at most 1e.12"),
        ({"size": (56.0, 84)}, r"size \(56.0, 84\) must be \(height, width\)"),
        ({"size": (56, 85)}, "divisible by 28"),
        ({"size": 56}, "size 56 must be"),
        ({"pace": 0}, "pace 0 must be above 0"),
        ({"count": 2.5}, r"count 2.5 must be a whole number"),
    ],
)
def test_sources_with_wrong_numbers(given, message):
    with pytest.raises(InputError, match=message):
        Source(**{"clips": lambda: iter(()), "seconds_per_clip": 1.0, **given})


@pytest.mark.parametrize("source", ["film", "synthetic"])
def test_a_record_names_the_clips_that_were_fed(captioner, film, tmp_path, source):
    options = {"speed": 1000, "skip": True, "max_clips": 40 if source == "synthetic" else None, "max_new_tokens": 9}
    path = tmp_path / "record.json"
    assert [*captioner.watch(film if source == "film" else source, record=path, **options)]
    record = read_record(path)
    assert len(record.about["clips"]) == len(record.arrived)
    check_clips(record, video_clips(record, captioner.processor))


def test_a_record_of_a_wrong_synthetic_scene(captioner, tmp_path):
    """Only the frames of the clips that were fed are made, however late they came."""
    path = tmp_path / "record.json"
    assert [*captioner.watch("synthetic", speed=100, max_clips=2, max_new_tokens=4, record=path)]
    good = json.loads(path.read_text())
    height, width = good["about"]["synthetic"]["size"]
    for about, message in (
        ({"clips": [0, 10**12]}, "clip 2 differs from the recorded one"),
        ({"clips": [0, 10**400]}, "does not describe its source"),
        ({"clips": [0, -1]}, "does not describe its source"),
        ({"clips": [0]}, "is of 2 clips, but only 1"),
        ({"clips": []}, "is of 2 clips, but only 0"),
        ({"synthetic": {"fps": 0, "size": [height, width]}}, "fps 0 must be above 0"),
        ({"synthetic": {"fps": 2.0, "size": [height, 0]}}, "size 0 must be at least 1"),
        ({"synthetic": {"fps": 2.0, "size": [height, width + 1]}}, "does not describe its source"),
        ({"synthetic": {"fps": 2.0, "size": [28 * 10**7, 28 * 10**7]}}, "does not describe its source"),
        ({"synthetic": {"fps": 2.0, "size": [height]}}, "does not describe its source"),
    ):
        path.write_text(json.dumps({**good, "about": {**good["about"], **about}}))
        record = read_record(path)
        with pytest.raises(InputError, match=message):
            check_clips(record, video_clips(record, captioner.processor))


def test_a_password_is_not_shown(captioner):
    with pytest.raises(InputError, match=r"admin:\*\*\*@127.0.0.1") as error:
        next(captioner.watch("http://admin:hunter2@127.0.0.1:1/hunter2"))
    assert "hunter2" not in str(error.value)


def test_a_watch_can_be_abandoned_and_another_started(captioner, film):
    for _ in range(2):
        for piece in captioner.watch(film, speed=10):
            assert piece.text
            break
    assert [*captioner.watch(film, speed=10, max_new_tokens=3)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "missing.mp4"}, "missing.mp4"),
        ({"source": "foo://x"}, "is not a stream"),
        (
            {"source": iter(())},
            "the source is a tuple_iterator: give a path, an address, or for your own clips a Source",
        ),
        ({"source": None}, "the source is a NoneType"),
        ({"schedule": "wait-x"}, "wait-x"),
        ({"mode": "parallel"}, "unknown execution mode 'parallel'"),
        ({"max_clips": -1}, "-1"),
        ({"max_clips": 0}, "max_clips 0 must be at least 1"),
        ({"max_clips": 2.5}, r"max_clips 2.5 must be a whole number"),
        ({"max_clips": True}, "max_clips True must be a whole number"),
        ({"max_clips": 10**400}, "max_clips with thousands of digits|must be at most"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens 2.5 must be a whole number"),
        ({"max_new_tokens": "3"}, "max_new_tokens '3' must be a whole number"),
        ({"max_new_tokens": 10**30}, "must be at most"),
        ({"schedule": 3}, "unknown schedule 3: give wait-K"),
        ({"mode": ["fused"]}, "unknown execution mode"),
        ({"question": 3}, "question 3 must be a string"),
        ({"window": (True, 3)}, "must be two integers"),
        ({"window": (5, 10**30)}, "window: each size 1000"),
        ({"speed": "fast"}, "speed 'fast' must be a number"),
        ({"speed": 10**400}, "must be above 0 and at most"),
        ({"fps": True}, "fps True must be a number"),
        ({"fps": None}, "fps None must be a number"),
        ({"mode": ""}, "unknown execution mode ''"),
        ({"schedule": ""}, "schedule"),
        ({"window": (0, 5)}, "window"),
        ({"window": (5,)}, r"window \(5,\) must be two integers"),
        ({"window": 5}, "window 5 must be two integers"),
        ({"window": (5.5, 20)}, "must be two integers"),
        ({"speed": 0}, "speed 0 must be above 0"),
        ({"speed": math.inf}, "speed inf must be above 0 and at most 1e.12"),
        ({"speed": math.nan}, "speed nan"),
        ({"source": "synthetic", "speed": -1}, "speed -1"),
        ({"fps": 0}, "fps 0 must be above 0"),
        ({"source": "synthetic", "fps": -2.0}, "fps -2.0"),
        ({"source": "/dev/video0", "fps": math.nan}, "fps nan"),
        ({"question": "caf\udce9?"}, r"question 'caf\\udce9\?' is not valid Unicode"),
    ],
)
def test_user_errors_are_input_errors(captioner, film, options, message):
    with pytest.raises(InputError, match=message):
        next(captioner.watch(**{"source": film, **options}))


@pytest.mark.parametrize("opened", [False, True])
def test_a_record_never_replaces_its_source(captioner, film, tmp_path, opened):
    source = open_source(str(film), PixelBudget(), speed=10) if opened else film
    before, link = film.read_bytes(), tmp_path / "link.json"
    link.symlink_to(film)
    for record in (film, str(film), link):
        with pytest.raises(InputError, match="is the source, which would be overwritten"):
            next(captioner.watch(source, record=record))
    assert film.read_bytes() == before


def test_an_unwritable_record_is_reported_before_the_source_is_read(captioner, tmp_path):
    def clips():
        raise AssertionError("the source was read")

    for record in (tmp_path, "/proc/record.json"):
        with pytest.raises(InputError, match="cannot be written"):
            next(captioner.watch(Source(clips, 1.0), record=record))


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_the_length_of_a_clip_is_above_0(seconds):
    with pytest.raises(InputError, match=r"must be above 0 and at most 1e.12"):
        Source(lambda: iter(()), seconds)


def test_the_default_question(captioner, film, tmp_path):
    record = tmp_path / "record.json"
    assert [*captioner.watch(film, question=None, speed=10, max_new_tokens=3, record=record)]
    assert read_record(record).about["question"] == QUESTIONS[-1]


@pytest.mark.parametrize("device", [torch.device("cpu"), None])
def test_how_a_device_is_given(made, device, monkeypatch):
    monkeypatch.setattr("qwen_vl_streaming.captioner.look", lambda _: Devices(none="no GPU"))
    assert Captioner(made[0], device=device).model.device.type == "cpu"


def test_a_missing_model(tmp_path):
    with pytest.raises(InputError, match="missing"):
        Captioner(tmp_path / "missing", device="cpu")


def test_the_public_names():
    for name in qwen_vl_streaming.__all__:
        assert getattr(qwen_vl_streaming, name).__doc__ or name == "VARIANTS"
    assert sorted(qwen_vl_streaming._HOMES) == sorted(qwen_vl_streaming.__all__)
    with pytest.raises(AttributeError, match="Captoiner"):
        qwen_vl_streaming.Captoiner  # noqa: B018
    light = "import sys, qwen_vl_streaming; from qwen_vl_streaming import InputError; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True).stdout == "False\n"


def test_a_wheel_of_the_library_works_alone(made, film, tmp_path):
    """Built without a network, unpacked, and used from another folder."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", LIBRARY, source], check=True)
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "qwen_vl_streaming/py.typed" in archive.namelist()
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"qwen_vl_streaming"}
        (text,) = [archive.read(name) for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert text == (ROOT / "LICENSE").read_bytes()
        archive.extractall(tmp_path / "site")
    program = (
        "import sys, qwen_vl_streaming as q\n"
        "assert q.__file__.startswith(sys.argv[1]), q.__file__\n"
        "captioner = q.Captioner(sys.argv[2], device='cpu')\n"
        "print(*(piece.text for piece in captioner.watch(sys.argv[3], speed=10, max_new_tokens=5)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site"), str(made[0]), str(film)],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize("max_clips", [1, 2])
def test_the_runner_warm_up_respects_max_clips(captioner, max_clips):
    """Before a session on a GPU."""
    pixels, grid = clip_pixels(captioner.processor, torch.zeros(2, 3, 56, 84, dtype=torch.uint8))
    template = make_template(captioner.processor, "What?")
    layout = template.layout(grid, 2.0)
    session = open_session(captioner.model, captioner.variant, template, layout, mode="fused", max_clips=max_clips)
    warm_up(session, pixels[0])
    assert session.closed and len(session.log.arrived) == max_clips
