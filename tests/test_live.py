"""The live command on files, faulty streams, slow models and signals: its output, statistics and record."""

import io
import itertools
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from media import make_video, stream_bytes
from qwen_vl_streaming.common.clock import now
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.live import cli, options, setup
from qwen_vl_streaming.live import intake as intake_module
from qwen_vl_streaming.live.figures import figures, table
from qwen_vl_streaming.live.intake import Intake
from qwen_vl_streaming.live.options import parse, record_place
from qwen_vl_streaming.live.screen import UNFINISHED, Pieces, Screen
from qwen_vl_streaming.live.watch import Watch
from qwen_vl_streaming.model.prompts import clip_pixels, load_processor, make_template
from qwen_vl_streaming.replay import cli as replay_cli
from qwen_vl_streaming.sessions import open_session
from qwen_vl_streaming.sessions.perception_client import PerceptionClient
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.session import Session
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video import opening
from qwen_vl_streaming.video.clip_recorder import read_clips
from qwen_vl_streaming.video.opening import Source, open_source
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwen_vl_streaming.video.sources import Clip, paced_clips, synthetic_clips
from qwen_vl_streaming.video.streams import stream_clips
from safetensors.torch import save_file
from test_streams import mjpeg
from tiny import random_template, tiny_model
from waiting import SECONDS, until

SMALL = ("--min-pixels-per-frame", "3136", "--max-pixels-per-frame", "3136")
SLOW = 4
"""Clips that the source completes in each step of a slow model."""


@pytest.fixture(scope="module", autouse=True)
def one_core():
    """A model this small is slow with several threads, because the thread of the source needs the cores too."""
    threads, others = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS")
    if others is not None:
        os.environ["OMP_NUM_THREADS"] = others


@pytest.fixture
def command(made, tmp_path, monkeypatch, capsys):
    """Run a program on the tiny checkpoint: exit status, answer and statistics, messages."""

    def call(*arguments, program=cli):
        flags = ("--model", made[0], *map(str, arguments))
        if program is cli:
            flags = ("--record", tmp_path / "record.json", *SMALL, *flags)
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(program.main)
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


@pytest.fixture
def film(tmp_path):
    return make_video(tmp_path / "film.mp4", seconds=6, size=(112, 112))


def read(tmp_path):
    record = read_record(tmp_path / "record.json")
    return record, record.about["figures"]


def replays(command, tmp_path, *arguments):
    """Assert that a replay gives all tokens of the record."""
    code, out, err = command(tmp_path / "record.json", *arguments, program=replay_cli)
    assert code == 0 and "all the same" in out, out + err
    return True


@pytest.fixture
def intakes(monkeypatch):
    """Those of the sessions that were opened."""
    found = []
    monkeypatch.setattr(setup, "Intake", lambda *given, **named: found.append(Intake(*given, **named)) or found[-1])
    return found


def before_steps(monkeypatch, act):
    """Calls `act` before each step of a session."""
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda session: (act(session), step(session))[1])


@pytest.fixture
def slow(monkeypatch, intakes):
    """A slow model: before each of its steps ends, the source has completed SLOW more clips."""

    def clips_come(_):
        intake = intakes[-1]
        number = min(intake.due() + SLOW, intake.source.count)
        until(lambda: intake.due() >= number)
        until(lambda: len(intake.completed) >= number or len(intake.waiting) == intake_module.ROOM)

    before_steps(monkeypatch, clips_come)


@pytest.fixture
def quick(monkeypatch, intakes):
    """A quick model, or a slow source: each of its clips is complete once the slot of the one before has begun and has
    taken two more steps."""
    steps, slots = [], []

    def one_at_a_time(clips, **options):
        for number, clip in enumerate(synthetic_clips(clips, **{**options, "speed": 1e6})):
            until(lambda number=number: len(slots) >= number)
            yield replace(clip, completed=now())

    def next_clip(session):
        steps.append(len(session.log.visible))
        if steps.count(begun := steps[-1]) == 3 and begun:
            slots.append(begun)
            until(lambda: len(intakes[-1].completed) > begun or intakes[-1].over)

    monkeypatch.setattr(opening, "synthetic_clips", one_at_a_time)
    before_steps(monkeypatch, next_clip)


def test_a_file_is_watched_and_replayed(command, film, tmp_path):
    code, out, err = command("--source", film, "--speed", "20", "--max-new-tokens", "30")
    record, found = read(tmp_path)
    assert code == 0, err
    assert (record.variant, record.way, record.schedule) == ("group", "fused", "wait-3")
    assert record.counts == [3, 3, 3, 3, 3, 15] and record.complete
    assert (found["tokens"], found["clips"], found["source_clips"], found["clips_skipped"]) == (30, 6, 6, 0)
    assert found["deadlines"] == 5
    assert record.about["clips"] == list(range(6)) and len(record.about["completed"]) == 6
    ages = [time - record.about["completed"][slot - 1] for time, slot in zip(record.times, record.slots, strict=True)]
    assert found["age_of_newest_frame"]["worst"] == max(ages) > 0
    assert "30 tokens are written" in out and str(tmp_path / "record.json") in out
    assert replays(command, tmp_path)


def test_frames_are_resized_as_in_training_by_default(monkeypatch):
    trained = SimpleNamespace(pixel_budget={"min_pixels_per_frame": 3136, "max_pixels_per_frame": 7056})
    for flags, budget in (((), PixelBudget(3136, 7056)), (("--max-pixels-per-frame", "6272"), PixelBudget(3136, 6272))):
        monkeypatch.setattr(sys, "argv", ["live", "--model", "m", "--source", "synthetic", *flags])
        assert PixelBudget.trained(trained, parse("")) == budget
    monkeypatch.setattr(sys, "argv", ["live", "--model", "m", "--source", "synthetic", "--budget", "stream"])
    assert PixelBudget.trained(trained, parse("")) == PixelBudget(3136, 7056, budget="stream")


@pytest.mark.parametrize("way", ["serial", "fused"])
@pytest.mark.parametrize("schedule", ["greedy", "wait-2"])
def test_synthetic(command, tmp_path, way, schedule):
    flags = ("--max-clips", 6, "--speed", 50, "--schedule", schedule, "--way", way, "--max-new-tokens", 40)
    code, _, err = command("--source", "synthetic", *flags)
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.schedule == schedule and record.way == way
    assert found["tokens"] == 40
    assert found["clips"] == 6 or schedule == "greedy"  # which may have written all before the last one came
    assert replays(command, tmp_path)


@pytest.mark.parametrize("variant", ["interleave", "batch", "overlap"])
def test_other_variants(command, film, tmp_path, variant):
    code, _, err = command("--source", film, "--speed", "100", "--variant", variant, "--max-new-tokens", "20")
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.way == ("fused" if variant == "overlap" else "serial")
    assert record.counts[0] == (0 if variant == "batch" else 3)
    assert found["first_token_after_first_clip"] > 0
    assert replays(command, tmp_path)


def test_slow_model_skips_to_the_newest(command, tmp_path, slow):
    flags = ("--max-clips", 40, "--speed", 1000, "--behind", "skip", "--max-new-tokens", 20)
    for way in ("serial", "fused"):
        code, _, err = command("--source", "synthetic", *flags, "--way", way)
        record, found = read(tmp_path)
        clips = record.about["clips"]
        assert code == 0, err
        assert clips == sorted(set(clips)) and clips[-1] == 39
        assert found["clips_skipped"] == 40 - len(clips) > 10
        assert found["missed_deadlines"] > 0
        assert "behind at" in err and "skipping to the newest" in err
        assert replays(command, tmp_path)


def test_slow_model_keeps_clips_waiting(command, tmp_path, slow):
    flags = ("--max-clips", 10, "--speed", 100, "--schedule", "wait-1", "--max-new-tokens", 12)
    code, _, err = command("--source", "synthetic", *flags)
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.about["clips"] == list(range(10)) and found["clips_skipped"] == 0
    assert found["most_clips_waiting"] > 2
    assert found["missed_deadlines"] > 0
    assert "none is skipped" in err
    assert found["age_of_newest_frame"]["worst"] > (SLOW - 1) / 100
    assert replays(command, tmp_path)


@pytest.mark.parametrize("way", ["serial", "fused"])
def test_greedy_that_keeps_up_misses_no_deadline(command, tmp_path, quick, way):
    flags = ("--max-clips", 6, "--schedule", "greedy", "--max-new-tokens", 80)
    assert command("--source", "synthetic", *flags, "--way", way)[0] == 0
    found = read(tmp_path)[1]
    assert (found["deadlines"], found["missed_deadlines"]) == (5, 0)


def test_waiting_clips_are_counted_if_the_source_is_blocked(command, tmp_path, slow, monkeypatch):
    monkeypatch.setattr(intake_module, "ROOM", 2)
    flags = ("--max-clips", 50, "--speed", 1000, "--schedule", "wait-1", "--max-new-tokens", 10)
    code, _, err = command("--source", "synthetic", *flags)
    found = read(tmp_path)[1]
    assert code == 0, err
    assert found["most_clips_waiting"] > 40 and found["clips_waiting_at_end"] > 30
    assert found["source_clips"] < 20


def test_records_have_unique_names(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["live", "--model", "m", "--source", "synthetic"])
    asked = parse("")
    first = record_place(asked, VARIANTS["group"])
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert first != record_place(asked, VARIANTS["group"])
    monkeypatch.undo()

    def meanwhile(path):
        (tmp_path / "record.json").write_text("another one's")
        return read_record(path)

    monkeypatch.setattr(cli, "read_record", meanwhile)
    code, _, err = command("--source", "synthetic", "--speed", 50, "--max-clips", 2, "--max-new-tokens", 5)
    assert code == 0, err
    assert read(tmp_path)[1]["tokens"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_output_paths_are_checked_without_changing_them(tmp_path):
    (tmp_path / "record.json").write_text("an earlier one")
    asked = SimpleNamespace(record=tmp_path / "record.json", keep=tmp_path / "new/folder/kept", source="synthetic")
    assert record_place(asked, VARIANTS["group"]) == asked.record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert asked.record.read_text() == "an earlier one"


def test_deadline_may_be_set(command, tmp_path):
    flags = ("--max-clips", 5, "--speed", 20, "--max-new-tokens", 20)
    for deadline, missed in ((1e-6, 4), (1000, 0)):
        assert command("--source", "synthetic", *flags, "--deadline", deadline)[0] == 0
        found = read(tmp_path)[1]
        assert (found["deadlines"], found["missed_deadlines"], found["deadline"]) == (4, missed, deadline)


def test_max_clips_end_a_file(command, film, tmp_path, monkeypatch, intakes):
    def one_at_a_time(video, speed):
        for clip in paced_clips(video, speed):
            until(lambda clip=clip: clip.index == 0 or not intakes[-1].waiting or intakes[-1]._stopped)
            yield clip

    monkeypatch.setattr(opening, "paced_clips", one_at_a_time)
    for behind in ("wait", "skip"):
        code, _, err = command("--source", film, "--max-clips", 2, "--speed", 50, "--behind", behind)
        record, _ = read(tmp_path)
        assert code == 0 and len(record.about["clips"]) == 2 and record.complete
        assert "see max_clips" in err
        assert replays(command, tmp_path)


def test_an_endless_stream_with_a_window(command, tmp_path):
    """It continues past the default limits of clips and tokens, until it is stopped."""
    flags = ("--window", 3, 8, "--speed", 200, "--schedule", "wait-2", "--max-new-tokens", 70)
    code, _, err = command("--source", "synthetic", *flags)
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.window == [3, 8] and not record.complete and found["clips"] == 35
    assert replays(command, tmp_path)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("schedule, tokens", [("wait-3", 3 * 3 + 7), ("greedy", None)])
def test_with_a_window_the_answer_ends_after_the_source(command, tmp_path, monkeypatch, known, schedule, tokens):
    """Whether the last clip is known as such or not."""

    def four(clips, **options):
        for clip in synthetic_clips(4, **options):
            yield replace(clip, last=clip.last and known)

    monkeypatch.setattr(opening, "synthetic_clips", four)
    monkeypatch.setattr(setup, "TOKENS_AFTER_END", 7)
    code, _, err = command("--source", "synthetic", "--window", 3, 8, "--speed", 20, "--schedule", schedule)
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.complete and record.end == "max_new_tokens" and found["clips"] == 4
    assert len(record.tokens) == record.max_new_tokens and (not known or tokens in (None, len(record.tokens)))
    assert replays(command, tmp_path)


def test_the_answer_may_end_before_the_source(command, tmp_path, monkeypatch):
    flags = ("--source", "synthetic", "--max-clips", 30, "--speed", "100")
    command(*flags, "--max-new-tokens", 20)
    tokens = read(tmp_path)[0].tokens
    end = tokens[4]
    monkeypatch.setattr(setup, "make_template", lambda *what: replace(make_template(*what), end=end))
    code, out, err = command(*flags)
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.end == "ended" and record.tokens == tokens[: tokens.index(end) + 1]
    assert found["clips"] < 30 and "the answer has ended, before the source ended" in out


# Sources that misbehave


def broken_stream(path, broken=(), other_size_from=None):
    """Matroska in which the frames `broken` have no picture, and frames are larger from one frame on."""
    make_video(path, seconds=6, codec="mjpeg", pixels="yuvj420p", container="matroska", size=(112, 112))
    if other_size_from is not None:
        larger = make_video(path.with_name("l.mkv"), seconds=6, codec="mjpeg", pixels="yuvj420p", size=(168, 140))
        with av.open(str(larger)) as file:
            others = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    out_path = path.with_name("broken.mkv")
    with av.open(str(path)) as file, av.open(str(out_path), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        packets = (packet for packet in file.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            data = bytes(packet)
            if other_size_from is not None and number >= other_size_from:
                data = others[number]
            new = av.Packet(bytes(len(data)) if number in broken else data)
            new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
            new.is_keyframe, new.stream = True, stream
            out.mux(new)
    return out_path.read_bytes()


@pytest.mark.parametrize(
    "fault", [{"broken": (7, 8, 31)}, {"other_size_from": 25}], ids=["broken frames", "another size"]
)
def test_stream_with_a_fault_in_the_middle(command, tmp_path, serve, fault):
    url = serve([[(broken_stream(tmp_path / "v.mkv", **fault), 0)]])
    kept = tmp_path / "kept.safetensors"
    code, _, err = command("--source", url, "--reconnect-seconds", 0, "--max-new-tokens", 30, "--keep", kept)
    record, found = read(tmp_path)
    assert code == 0, err
    assert found["broken_frames"] == len(fault.get("broken", ()))
    assert found["source_clips"] == 6 and record.complete and len(record.tokens) == 30
    assert replays(command, tmp_path, "--clips", kept)
    code, _, err = command(tmp_path / "record.json", program=replay_cli)
    assert code == 2 and "--clips" in err


def test_stream_in_two_bursts_with_a_drop_between(command, tmp_path, serve):
    """All data at once, then nothing for a while, then all at once from a new connection; then the stream ends."""
    data = stream_bytes(tmp_path, [i / 10 for i in range(30)])
    kept = tmp_path / "kept.safetensors"
    for behind in ("wait", "skip"):
        url = serve([[(data, 0)], [(data, 0.5)]])
        flags = ("--reconnect-seconds", 1, "--behind", behind, "--max-new-tokens", 40, "--keep", kept)
        code, _, err = command("--source", url, *flags)
        record, found = read(tmp_path)
        assert code == 0, err
        assert "dropped" in err
        assert record.complete and found["tokens"] == 40
        assert found["source_clips"] >= 4
        left_out = found["clips_skipped"] + found["clips_before_start"]
        assert left_out + len(record.about["clips"]) == found["source_clips"]
        assert found["clips_skipped"] == 0 or behind == "skip"
        assert replays(command, tmp_path, "--clips", kept)


def test_watching_starts_with_the_newest_clip(command, tmp_path, serve, monkeypatch, intakes):
    data, ready = stream_bytes(tmp_path, [i / 10 for i in range(80)]), threading.Event()
    url = serve([[(data[: len(data) // 2], 0), (data[len(data) // 2 :], lambda: ready.wait(SECONDS))]])

    def ready_late(*what, **options):
        until(lambda: len(intakes[-1].completed) > 2)
        opened = open_session(*what, **options)
        ready.set()
        return opened

    monkeypatch.setattr(setup, "open_session", ready_late)
    kept = tmp_path / "kept.safetensors"
    code, out, err = command("--source", url, "--reconnect-seconds", 0, "--max-new-tokens", 40, "--keep", kept)
    record, found = read(tmp_path)
    before = found["clips_before_start"]
    assert code == 0, err
    assert before > 1 and f"clips before the start    {before}\n" in out
    assert record.about["clips"] == list(range(before, found["source_clips"]))
    assert found["clips_skipped"] == 0 and replays(command, tmp_path, "--clips", kept)


@pytest.mark.parametrize("known", [0, 1, 3])
def test_source_that_is_lost(command, tmp_path, monkeypatch, known):
    def lost(clips, **options):
        for clip in synthetic_clips(known, **options):
            yield replace(clip, last=False)
        raise OSError("the cable was pulled")

    monkeypatch.setattr(opening, "synthetic_clips", lost)
    code, _, err = command("--source", "synthetic", "--speed", 50, "--max-clips", 9, "--max-new-tokens", 20)
    record, found = read(tmp_path)
    if not known:
        assert code == 2 and "error: source synthetic gave no clip (the cable was pulled): " in err
        assert record.end == "cancelled" and found["clips"] == 0
        return
    assert code == 0, err
    assert "the cable was pulled" in err
    assert record.complete and len(record.tokens) == 20
    assert record.about["clips"] == list(range(known))
    assert found["source_clips"] == found["clips"] == known
    assert replays(command, tmp_path)


@pytest.mark.parametrize("fault, status, message", [
    (KeyError("bug"), 1, "error: source synthetic has failed (KeyError: 'bug')"),
    (InputError("clip 3 is damaged"), 2, "error: clip 3 is damaged"),
])  # fmt: skip
def test_a_source_that_fails(command, tmp_path, monkeypatch, fault, status, message):
    """The answer is finished and recorded, then the error is reported."""

    def failing(clips, **options):
        for clip in synthetic_clips(3, **options):
            yield replace(clip, last=False)
        raise fault

    monkeypatch.setattr(opening, "synthetic_clips", failing)
    code, _, err = command("--source", "synthetic", "--speed", 50, "--max-clips", 9, "--max-new-tokens", 20)
    record, _ = read(tmp_path)
    assert (code, err.splitlines()[-1]) == (status, message)
    assert record.complete and len(record.tokens) == 20 and replays(command, tmp_path)


def test_a_file_that_is_damaged(command, tmp_path):
    """The damage is reported once the answer about what comes before it is written."""
    path = make_video(tmp_path / "v.mp4", seconds=8, size=(320, 192), options={"crf": "10"}, keyframe_every=10)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat") + (data.index(b"moov") - data.index(b"mdat")) * 8 // 10
    data[place : place + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    code, _, err = command("--source", path, "--speed", 20, "--max-new-tokens", 40)
    record, found = read(tmp_path)
    assert code == 2 and re.search(r"error: video .*v\.mp4 is damaged.*download it again", err.splitlines()[-1])
    assert record.complete and 3 <= found["clips"] < 8 and len(record.tokens) == 40


def test_invalid_sources(command, tmp_path, serve, film):
    before = film.read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    for arguments, match in (
        (("--source", tmp_path / "none.mp4"), "none.mp4 does not exist"),
        (("--source", tmp_path / "text.mp4"), "cannot be opened"),
        (("--source", "/dev/video99"), "/dev/video99 does not exist"),
        (("--source", serve([])), "cannot be opened"),
        (("--source", "http://127.0.0.1:1/a", "--speed", 2), "speed 2"),
        (("--source", "synthetic", "--speed", 0), "--speed 0"),
        (("--source", "synthetic", "--schedule", "wait-0"), "wait-0"),
        (("--source", "synthetic", "--variant", "origin", "--way", "fused"), "cannot run fused"),
        (("--source", "synthetic", "--max-clips", 0), "--max-clips"),
        (("--source", "synthetic", "--behind", "hurry"), "hurry"),
        (("--source", "synthetic", "--record", tmp_path), "cannot be written"),
        (("--source", "synthetic", "--record", "/dev/null"), "/dev/null cannot be written"),
        (("--source", "synthetic", "--keep", "/dev/null"), "/dev/null cannot be written"),
        (("--source", "synthetic", "--record", "/proc/x/y.json"), "/proc/x/y.json cannot be written"),
        (("--source", "synthetic", "--keep", "/proc/y.st"), "/proc/y.st cannot be written"),
        (("--source", "synthetic", "--record", tmp_path / ("long" * 60)), "cannot be written (File name too long)"),
        (("--source", "synthetic", "--record", tmp_path / "text.mp4/y.json"), "cannot be written (Not a directory)"),
        (("--source", film, "--record", film.parent / "." / film.name), "is the source"),
        (("--source", film, "--keep", film), "is the source"),
        (("--source", "synthetic", "--keep", tmp_path / "record.json"), "are both"),
        (("--source", "synthetic", "--device", "foo"), "foo is neither cpu nor cuda"),
        (("--source", "synthetic", "--device", "meta"), "meta is neither cpu nor cuda"),
        (("--source", "synthetic", "--device", "cuda:99"), "device cuda:99: "),
        (("--source", "synthetic", "--fps", "inf"), "--fps inf"),
        (("--source", "synthetic", "--fps", "1e-9"), "--fps 1e-09"),
        (("--source", "synthetic", "--max-clips", 10**9), "--max-clips 1000000000"),
        (("--source", "synthetic", "--max-new-tokens", 10**11), "--max-new-tokens"),
        (("--source", "synthetic", "--window", 10**12, 5), "--window 1000000000000"),
        (("--source", "synthetic", "--penalty", "nan"), "--penalty nan"),
        (("--source", "synthetic", "--penalty", "inf"), "--penalty inf"),
        (("--source", "synthetic", "--deadline", "inf"), "--deadline inf"),
        (("--source", "synthetic", "--reconnect-seconds", "nan"), "--reconnect-seconds nan"),
        (("--source", "synthetic", "--model", tmp_path / "nowhere"), "nowhere"),
        (("--source", "synthetic", "--max-pixels-per-frame", 5), "max_pixels_per_frame 5"),
    ):
        code, out, err = command(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and match in lines[0] and not out, err
    assert not (tmp_path / "record.json").exists() and film.read_bytes() == before


# Signals and faults, at every stage


def at_step(monkeypatch, number, act):
    """Calls `act` in the step of this number of a session."""
    steps = itertools.count(1)
    before_steps(monkeypatch, lambda session: act(session) if next(steps) == number else None)


@pytest.mark.parametrize("number", [1, 2, 6, 12, 30])
def test_ctrl_c_at_any_step(command, tmp_path, monkeypatch, number):
    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, number, lambda _: os.kill(os.getpid(), signal.SIGINT))
    code, out, err = command("--source", "synthetic", "--speed", 50, "--max-clips", 6, "--max-new-tokens", 60)
    record, found = read(tmp_path)
    assert code == 130, err
    assert record.end == "cancelled" and "stopped by SIGINT" in out
    assert found["tokens"] == len(record.tokens) < 60
    assert replays(command, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_before_the_first_clip(command, tmp_path, monkeypatch):
    stopped, ask = threading.Event(), Watch.ask_to_stop

    def silent(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.wait(SECONDS)
        yield from ()

    monkeypatch.setattr(opening, "synthetic_clips", silent)
    monkeypatch.setattr(Watch, "ask_to_stop", lambda watch: (ask(watch), stopped.set()))
    assert command("--source", "synthetic")[0] == 143
    record, found = read(tmp_path)
    assert record.end == "cancelled" and found["clips"] == 0
    assert found["age_of_newest_frame"] is None


def test_sigterm_while_the_model_loads(command, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, out, _ = command("--source", "synthetic")
    assert code == 143 and not out
    assert not (tmp_path / "record.json").exists()


def test_a_process_that_is_stopped(command, made, tmp_path):
    path = tmp_path / "record.json"
    watching = subprocess.Popen(
        [sys.executable, "-m", "qwen_vl_streaming.live", "--model", made[0], "--source", "synthetic", "--speed", "10",
         "--record", path, *SMALL],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in watching.stdout:
        if " s  " in line:
            break
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == 130, err
    assert "stopped by SIGINT" in out and "Traceback" not in err
    record, found = read(tmp_path)
    assert record.end == "cancelled" and 0 < found["clips"] < 300 and found["tokens"] > 0
    assert replays(command, tmp_path)


@pytest.mark.parametrize("lines", [0, 2])
def test_a_closed_output_ends_it(made, tmp_path, lines):
    flags = ("--source", "synthetic", "--speed", "10", "--record", tmp_path / "record.json", *SMALL)
    watching = subprocess.Popen(
        [sys.executable, "-m", "qwen_vl_streaming.live", "--model", made[0], *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(lines):
        watching.stdout.readline()
    watching.stdout.close()
    err = watching.stderr.read()
    assert watching.wait(60) == 141, err
    assert "Traceback" not in err and "Exception" not in err and err.count("Broken pipe") == 1
    shown = err[err.index("Broken pipe") :]
    assert "group, fused, wait-3" in shown and "stopped by SIGPIPE" in shown
    assert re.search(rf"^tokens .*\n(.*\n)*record +{re.escape(str(tmp_path / 'record.json'))}$", shown, re.M)
    record, found = read(tmp_path)
    assert record.end == "cancelled" and 0 < found["clips"] < 300 and found["tokens"] > 0


@pytest.mark.parametrize("number", [0, 1, 7])
@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (
            torch.OutOfMemoryError,
            "CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation",
            "out of GPU memory (CUDA out of memory. Tried to allocate 2 GiB)",
        ),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory", "out of memory (DefaultCPUAllocator: can't"),
    ],
)
def test_no_memory_left(command, tmp_path, monkeypatch, number, kind, text, said):
    def exhaust(*_, **__):
        raise kind(text)

    if number:
        at_step(monkeypatch, number, lambda session: monkeypatch.setattr(session.runner, "step", exhaust))
    else:
        monkeypatch.setattr(setup, "open_session", exhaust)
    code, out, err = command("--source", "synthetic", "--speed", 50, "--max-clips", 6)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    assert said in lines[0] and "--max-clips" in lines[0]
    if number:
        record, found = read(tmp_path)
        assert record.end == f"failed: {text.splitlines()[0]}" and record.end in out
        assert found["tokens"] == len(record.tokens)
        assert replays(command, tmp_path)


def test_the_loss_of_one_of_two_processes(command, tmp_path, monkeypatch):
    flags = ("--source", "synthetic", "--speed", 20, "--max-clips", 5, "--max-new-tokens", 20, "--way", "pipelined")
    clients = []
    monkeypatch.setattr(setup, "PerceptionClient", lambda load: clients.append(PerceptionClient(load)) or clients[-1])
    code, _, err = command(*flags)
    record, found = read(tmp_path)
    assert code == 0, err
    assert record.way == "pipelined" and (found["clips"], found["tokens"]) == (5, 20)
    assert replays(command, tmp_path)
    at_step(monkeypatch, 3, lambda _: (clients[-1].process.kill(), clients[-1].process.join()))
    code, out, err = command(*flags)
    record, found = read(tmp_path)
    assert code == 1 and "was killed by SIGKILL" in err.splitlines()[-1] and "Traceback" not in err
    assert record.end.startswith("failed: ") and record.end in out
    assert not any(client.process.is_alive() for client in clients)


# The parts


class Script(Intake):
    """Clips that arrive when the program waits for them, a given number each time."""

    def __init__(self, clips, batches, processor, skip):
        super().__init__(Source(lambda: iter(()), 1.0), processor, skip)
        self.left, self.batches = list(clips), list(batches)

    def begin(self):
        pass

    def wait(self):
        for _ in range(self.batches.pop(0) if self.batches else 1):
            if self.left:
                self.add(self.left.pop(0))
        if not self.left:
            self.end()


@pytest.mark.parametrize("skip", [False, True])
def test_falling_behind_and_catching_up_are_reported_once(skip, made, caplog):
    model, variant = tiny_model(), VARIANTS["group"]
    template = replace(random_template(random.Random(0)), end=199)
    frames = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    clips = [Clip(i, frames, np.zeros(2), time.time(), last=i == 19) for i in range(20)]
    intake = Script(clips, [1, 8], load_processor(made[0]), skip)
    kept = []
    session = open_session(
        model, variant, template, template.layout((1, 1), 2.0), schedule="wait-1", max_clips=20, max_new_tokens=25,
        about={"a": 1},
    )  # fmt: skip
    watch = Watch(session, intake, Pieces(str), 1.0, None, skip, kept.append)
    with session:
        assert [*watch.texts()]
    said = caplog.messages
    assert len(said) == 2 and said[0].startswith("behind at") and said[1].startswith("caught up at"), said
    assert watch.clips == ([*range(20)] if not skip else [0, 8, *range(9, 20)])
    assert watch.skipped == (7 if skip else 0)
    assert len(kept) == len(watch.clips)


class Arrivals(Intake):
    """A camera: clips come while the model is prepared, and then one each time the program waits for it."""

    def __init__(self, clips, processor, skip):
        self.arrivals = queue.SimpleQueue()
        super().__init__(Source(lambda: iter(self.arrivals.get, None), 1.0, live=True), processor, skip)
        self.left = list(clips)

    def arrive(self):
        come = len(self.completed)
        self.arrivals.put(self.left.pop(0) if self.left else None)
        while len(self.completed) == come and not self.over:
            super().wait()

    def wait(self):
        self.arrive()


@pytest.mark.parametrize("skip", [False, True])
def test_clips_from_before_the_start_do_not_count_as_falling_behind(skip, made, caplog):
    template = replace(random_template(random.Random(0)), end=199)
    frames = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    clips = [Clip(i, frames, np.zeros(2), time.time(), last=i == 9) for i in range(10)]
    intake = Arrivals(clips, load_processor(made[0]), skip)
    session = open_session(
        tiny_model(), VARIANTS["group"], template, template.layout((1, 1), 2.0), schedule="wait-1", max_clips=20,
        max_new_tokens=12,
    )  # fmt: skip
    intake.start()
    for _ in range(4):
        intake.arrive()
    watch = Watch(session, intake, Pieces(str), 1.0, None, skip)
    with session:
        assert [*watch.texts()]
    assert watch.clips == [*range(3, 10)] and intake.before == 3
    assert (watch.skipped, watch.most_waiting) == (0, 1) and caplog.messages == []


def test_characters_are_printed_whole(made):
    tokenizer = load_processor(made[0]).tokenizer
    text = "The naïve 漢字 🙂👩‍👩‍👧 ring, Ελληνικά"
    tokens = tokenizer(text).input_ids
    assert len(tokens) > len(text)  # single bytes, most of them
    pieces = Pieces(tokenizer.decode)
    out = [pieces.add(token) for token in tokens]
    assert "".join(out) == text and pieces.rest() == ""
    assert not any(UNFINISHED in piece for piece in out)
    cut = Pieces(tokenizer.decode)
    broken = tokenizer("a 🙂").input_ids[:-1]
    assert "".join(cut.add(token) for token in broken) == "a "
    assert cut.rest() != "" and cut.rest() == ""


def test_screen():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for kind, lines in ((io.StringIO, ["      1 s  The ring", "     12 s  turns"]), (Terminal, None)):
        out, notes = kind(), io.StringIO()
        screen = Screen(out, notes)
        screen.say(" The", 1)
        assert (out.getvalue() == "") == (lines is not None)
        screen.note("behind")
        screen.say(" ring", 1)
        screen.say("", 2)
        screen.say(" turns\x1b", 12)
        screen.end_line()
        assert notes.getvalue() == "behind\n"
        # On a terminal the message would be in the middle of a line, so the text continues on a new one.
        expected = lines or ["      1 s  The", "      1 s  ring", "     12 s  turns"]
        assert [line.rstrip() for line in out.getvalue().splitlines()] == expected


def test_figures():
    record = SimpleNamespace(
        visible=[10.1, 12.1, 13.5],
        tokens=[7] * 6,
        slots=[1, 1, 2, 2, 3, 3],
        times=[10.2, 11.5, 12.2, 12.3, 13.6, 14.5],
        complete=True,
        schedule="wait-2",
        template=SimpleNamespace(end_of_slot=None),
    )

    def of(deadline=None, **changed):
        other = SimpleNamespace(**{**vars(record), **changed})
        return figures(other, [10.0, 11.0, 12.0, 13.0], [0, 2, 3], deadline)

    found = of()
    assert found["age_of_newest_frame"]["worst"] == pytest.approx(1.5)
    assert found["age_of_newest_frame"]["median"] == pytest.approx(0.45)
    assert found["age_of_newest_frame_before_last_slot"]["worst"] == pytest.approx(1.5)
    early = of(times=[10.2, 10.5, 12.2, 12.3, 13.6, 15.5])
    assert early["age_of_newest_frame_before_last_slot"]["worst"] == pytest.approx(0.5)
    assert (found["deadlines"], found["missed_deadlines"]) == (2, 1)  # slot 1 wrote after clip 2 had come
    assert of(deadline=0.25)["missed_deadlines"] == 2
    assert found["clips_per_second"] == pytest.approx(2 / 3.4)
    assert found["frames_per_second"] == pytest.approx(4 / 3.4)
    assert found["source_clips_per_second"] == pytest.approx(1.0)
    assert found["tokens_per_second"] == pytest.approx(5 / 4.3)
    assert found["first_token_after_first_clip"] == pytest.approx(0.2)
    nowhere = {"visible": [], "tokens": [], "slots": [], "times": [], "complete": False}
    empty = SimpleNamespace(**{**vars(record), **nowhere})
    nothing = figures(empty, [], [])
    assert nothing["age_of_newest_frame"] is nothing["tokens_per_second"] is None and nothing["clips"] == 0
    late = {"times": [10.2, 12.09, 12.2, 13.4, 13.6, 14.5]}  # each slot writes until the next one begins
    assert of(**late)["missed_deadlines"] == 2
    assert of(**late, schedule="greedy")["missed_deadlines"] == 0
    behind = of(**late, schedule="greedy", visible=[10.1, 13.1, 13.5])
    assert (behind["deadlines"], behind["missed_deadlines"]) == (2, 1)
    counted = {"clips_skipped": 1, "most_clips_waiting": 2, "clips_waiting_at_end": 0, "broken_frames": 3}
    counted["clips_before_start"] = 4
    for some in (found, nothing):
        assert json.dumps(some)
    assert table({**found, **counted}).splitlines() == [
        "age of the newest frame   median 0.450 s   95th percentile 1.500 s   maximum 1.500 s",
        "  before the last slot    median 0.250 s   95th percentile 1.320 s   maximum 1.500 s",
        "first token               0.200 s after the first clip",
        "tokens                    6, 1.16/s",
        "clips                     3, 0.59/s, 1.2 frames/s",
        "clips of the source       4, 1.00/s",
        "missed deadlines          1 of 2 slots, each due when the next clip arrived",
        "clips skipped             1",
        "clips before the start    4",
        "clips waiting             2 at most",
        "broken frames             3",
    ]
    none = dict.fromkeys(counted, 0)
    assert table({**nothing, **none}).splitlines() == [
        f"{name:<26}0" for name in ("tokens", "clips", "clips of the source")
    ]


def test_intake_does_not_block_and_wakes_up(made):
    """A source without data does not delay the end; a full intake blocks only the source."""
    processor = load_processor(made[0])
    intake = Intake(
        Source(lambda: synthetic_clips(2000, speed=1e6, size=(28, 28)), 1.0, pace=1e-6, count=2000), processor
    )
    intake.begin()
    intake.wait()
    clip, pixels = intake.take()
    assert clip.index == 0 and torch.equal(pixels, clip_pixels(processor, clip.frames)[0][0])
    until(lambda: len(intake.waiting) == intake_module.ROOM)
    assert len(intake.completed) == intake_module.ROOM + 1 and intake.due() == 2000
    intake.wake()
    intake.stop()
    intake.wait()
    until(lambda: not intake._thread.is_alive())


def test_a_camera_is_closed_when_reading_stops(made, serve, caplog):
    """So that it can be opened again at once: many cameras serve one client at a time."""
    still = SimpleNamespace(move=lambda *_: None)
    url = serve([[(data, 0.1) for data, _ in mjpeg(100, 10, still)]], "multipart/x-mixed-replace; boundary=frame")
    intake = Intake(Source(lambda: stream_clips(url), 1.0, live=True), load_processor(made[0]))
    intake.measure()
    intake.stop()
    assert not intake._thread.is_alive() and not any(url in thread.name for thread in threading.enumerate())
    assert caplog.messages == []  # the connection was not lost


def test_intake_that_skips_does_not_block_the_source(made, monkeypatch):
    """Only the newest clip waits, and only clips that are taken, or arrive when none waits, are converted to pixels."""
    made_ready = []
    monkeypatch.setattr(intake_module, "clip_pixels", lambda *what: made_ready.append(1) or clip_pixels(*what))
    intake = Intake(
        Source(lambda: synthetic_clips(500, speed=1e6, size=(28, 28)), 1.0), load_processor(made[0]), skip=True
    )
    intake.begin()
    until(lambda: intake.over)
    assert len(intake.waiting) == 1 and intake.due() == len(intake.completed) == 500
    assert intake.take()[0].index == 499
    assert len(made_ready) == 2


@pytest.mark.parametrize("live, film", [(True, False), (True, True), (False, False)])
def test_clips_that_arrive_before_the_start(made, live, film):
    """Only the newest of a live source is kept; a recording can wait."""
    clips = [replace(clip, film=film) for clip in synthetic_clips(9, speed=1e6, size=(28, 28))]
    intake = Intake(Source(lambda: iter(clips), 1.0, live=live), load_processor(made[0]))
    intake.start()
    until(lambda: intake.over)
    intake.begin()
    assert intake.before == (0 if film or not live else 8)
    assert [clip.index for clip, _ in intake.waiting] == [*range(intake.before, 9)]


@pytest.mark.parametrize("skip", [False, True])
def test_a_source_may_fill_the_same_memory_again(made, skip):
    """Also for clips that wait: their pixels, and their frames, are those with which they came."""
    buffer, processor = torch.zeros(2, 3, 56, 84, dtype=torch.uint8), load_processor(made[0])

    def clips():
        for index in range(4):
            yield Clip(index, buffer.fill_(60 * index), np.array([index, index + 0.5]), 0.0)
        buffer.fill_(255)

    intake = Intake(Source(clips, 1.0), processor, skip)
    intake.begin()
    until(lambda: intake.over)
    taken = [intake.take() for _ in range(len(intake.waiting))]
    assert [clip.index for clip, _ in taken] == ([3] if skip else [0, 1, 2, 3])
    for clip, pixels in taken:
        frames = torch.full_like(buffer, 60 * clip.index)
        assert torch.equal(clip.frames, frames) and torch.equal(pixels, clip_pixels(processor, frames)[0][0])


def test_invalid_files_of_kept_clips(tmp_path):
    (tmp_path / "text").write_bytes(b"text")
    save_file({"frames": torch.zeros(3)}, tmp_path / "other")
    for name in ("none", "text", "other"):
        with pytest.raises(InputError, match=f"{name} .*--keep"):
            read_clips(tmp_path / name)


def test_a_password_is_neither_shown_nor_saved(command, tmp_path, serve):
    data = stream_bytes(tmp_path, [i / 10 for i in range(30)])
    url = serve([[(data, 0)], [(data, 0.1)]]).replace("//", "//admin:hunter2@") + "?pwd=hunter2"
    flags = ("--max-new-tokens", 10, "--keep", tmp_path / "kept.safetensors")
    for code in (0, 2):  # the second time the server is gone
        ended, out, err = command("--source", url, "--reconnect-seconds", 0.5, *flags)
        assert ended == code and "admin:***@127.0.0.1" in err, err
        assert "hunter2" not in out + err
        assert not [path for path in tmp_path.iterdir() if b"hunter2" in path.read_bytes()]
    assert read(tmp_path)[0].about["source"].startswith("http://admin:***@127.0.0.1:")


@pytest.mark.parametrize(
    "source", ["file:///etc/passwd", "concat://a.mp4|b.mp4", "fd://0", "data://x", "foo://a:hunter2@b"]
)
def test_addresses_that_are_not_streams(source, made, monkeypatch):
    monkeypatch.setattr("sys.argv", ["live", "--model", str(made[0]), "--source", source, "--device", "cpu"])
    with pytest.raises(InputError, match="is not a stream: give rtsp,") as error:
        open_source(options.parse("").source, PixelBudget())
    assert "hunter2" not in str(error.value)
