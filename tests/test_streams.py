"""Streams whose timestamps jump back or ahead or are missing; recordings over HTTP give the clips of their files."""

import contextlib
import io
import re
import socket
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
import torch
from media import make_video, picture, read_number, remux, set_matrix, stream_bytes
from PIL import Image
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.video import streams
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwen_vl_streaming.video.streams import stream_clips
from rtsp import Camera
from serving import Quiet, serving
from waiting import SECONDS

SMALL = PixelBudget(min_pixels_per_frame=28 * 28 * 24, max_pixels_per_frame=28 * 28 * 24 * 4)
REORDERED = {"preset": "medium", "bf": "3"}
TENTH = Fraction(1, 10)


class Files(Quiet, SimpleHTTPRequestHandler):
    pass


@pytest.fixture
def site(tmp_path):
    """The address at which the files of tmp_path are served."""
    with serving(partial(Files, directory=tmp_path)) as server:
        yield server.url


def watch(url, **options):
    return list(stream_clips(url, budget=SMALL, reconnect_seconds=0, **options))


def numbers(clips):
    return [read_number(frame.numpy()) for clip in clips for frame in clip.frames]


def joined(folder, name):
    one = make_video(folder / "one.ts", seconds=4, options=REORDERED)
    two = make_video(folder / "two.ts", seconds=3, options=REORDERED)
    (folder / name).write_bytes(one.read_bytes() + two.read_bytes())


def segments(folder, name):
    one = make_video(folder / "one.ts", seconds=4)
    two = make_video(folder / "two.ts", [4 + i / 10 for i in range(30)])
    (folder / name).write_bytes(one.read_bytes() + two.read_bytes())


def spliced(folder, name):
    whole = make_video(folder / "whole.ts", seconds=5, options={"preset": "medium"})
    first = remux(whole, folder / "first.ts", lambda number, packet: number < 18)
    second = remux(whole, folder / "second.ts", lambda number, packet: number >= 7)
    (folder / name).write_bytes(first.read_bytes() + second.read_bytes())


def playlist(folder, name):
    for number, seconds in enumerate((4, 3)):
        make_video(folder / f"{number}.ts", seconds=seconds, options=REORDERED)
    (folder / name).write_text(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:4.0,\n0.ts\n"
        "#EXT-X-DISCONTINUITY\n#EXTINF:3.0,\n1.ts\n#EXT-X-ENDLIST\n"
    )
    (folder / "whole.ts").write_bytes((folder / "0.ts").read_bytes() + (folder / "1.ts").read_bytes())


def leap(number, packet):
    if number >= 22:
        packet.pts += 250 * 90_000
        packet.dts += 250 * 90_000


def copy(folder, name, *arguments, source="ts", keywords=None, **options):
    whole = make_video(folder / f"whole.{source}", seconds=6, options=REORDERED, **(keywords or {}))
    remux(whole, folder / name, *arguments, **options)


SLOW = [float(i) for i in range(24)]
ACTION = [0, 20, *(20 + i / 10 for i in range(1, 11)), 40]
FILMS = {
    "joined.ts": joined,
    "spliced.ts": spliced,
    "playlist.m3u8": playlist,
    "leaping.ts": lambda folder, name: copy(folder, name, leap),
    "guesses.avi": lambda folder, name: make_video(folder / name, seconds=4, options=REORDERED, time_base=TENTH),
    "guesses.wmv": lambda folder, name: make_video(folder / name, seconds=4, options=REORDERED, container="asf"),
    "late.ts": lambda folder, name: copy(folder, name, lambda number, packet: number >= 5),
    "late.mkv": lambda folder, name: copy(folder, name, lambda number, packet: number >= 5),
    "slow.mp4": lambda folder, name: make_video(folder / name, SLOW, fps=1),
    "slow.mkv": lambda folder, name: make_video(folder / name, SLOW, fps=1),
    "slow.ts": lambda folder, name: make_video(folder / name, SLOW, fps=1),
    "slow.avi": lambda folder, name: make_video(folder / name, SLOW, fps=1, time_base=Fraction(1)),
    "action.mp4": lambda folder, name: make_video(folder / name, ACTION),
    "action.mkv": lambda folder, name: make_video(folder / name, ACTION),
    "two.mp4": lambda folder, name: make_video(folder / name, [0, 5]),
    "segments.ts": segments,
    "minutes.mp4": lambda folder, name: make_video(folder / name, [0, 1, 31, 31.1, 65]),
    "mirrored.mp4": lambda folder, name: set_matrix(make_video(folder / name), -1, 0, 0, 1),
    "cover.mkv": lambda folder, name: copy(folder, name, cover=True),
    "cover.mp4": lambda folder, name: copy(folder, name, cover=True),
    "sound.mkv": lambda folder, name: copy(folder, name, sound=(0, 9)),
    "even.flv": lambda folder, name: make_video(folder / name, seconds=4, options=REORDERED),
    "even.webm": lambda folder, name: make_video(
        folder / name, seconds=3, codec="libvpx-vp9", options={"cpu-used": "8"}
    ),
}


@pytest.mark.parametrize("name", FILMS)
def test_a_recording_gives_the_clips_of_its_file(tmp_path, site, name):
    FILMS[name](tmp_path, name)
    file = "whole.ts" if name == "playlist.m3u8" else name  # a playlist on this machine is not opened
    video, clips = read_video(tmp_path / file, budget=SMALL), watch(f"{site}/{name}")
    assert all(clip.film for clip in clips)
    assert numbers(clips) == [read_number(frame.numpy()) for frame in video.frames]
    np.testing.assert_allclose(np.concatenate([clip.timestamps for clip in clips]), video.timestamps, atol=2e-3)
    assert clips[0].seconds == (pytest.approx(video.seconds_per_clip, rel=1e-3) if video.fps < 2 else None)
    if name == "mirrored.mp4":
        plain = read_video(make_video(tmp_path / "plain.mp4"), budget=SMALL).frames[: len(clips) * 2]
        shown = torch.cat([clip.frames for clip in clips])
        assert (shown.float() - plain.flip(3).float()).abs().mean() < 3


def test_an_encoder_that_is_restarted(tmp_path, serve, wall, caplog):
    """Its timestamps start again; the timeline continues with the elapsed time."""
    part = stream_bytes(tmp_path, [i / 10 for i in range(40)])
    clips = watch(serve([[(part, 0), (part, lambda: wall.move(3, packets=38))]]))
    shown, moments = numbers(clips), np.concatenate([clip.timestamps for clip in clips])
    assert shown[:8] == list(range(0, 40, 5)) and shown[-1] >= 35
    assert len(clips) == 11 and np.diff(moments).max() > 2.5  # the picture stood still for three seconds
    assert sum("jump back" in record.message for record in caplog.records) == 1


def test_a_stream_whose_timestamps_jump_ahead(tmp_path, serve, caplog):
    copy(tmp_path, "leaping.ts", leap)
    clips = watch(serve([[((tmp_path / "leaping.ts").read_bytes(), 0)]]))
    assert numbers(clips) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]
    assert sum("jump ahead" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("clock", "note"),
    [
        (lambda moment: moment + 100 * (moment > 3), "jump ahead"),
        (lambda moment: 1000 + moment - 5 * (moment > 3), "have not changed|jump back"),
        (lambda moment: min(moment, 3.0), "have not changed"),
    ],
)
def test_a_camera_that_sets_its_clock(tmp_path, wall, caplog, clock, note):
    path = make_video(tmp_path / "part.ts", [i / 10 for i in range(60)], container="mpegts")
    with Camera(path, wall, clock=clock) as camera:
        clips = watch(camera.url)
    assert 5 <= len(clips) <= 7
    moments = np.concatenate([clip.timestamps for clip in clips])
    assert (np.diff(moments) >= 0).all() and moments[-1] < 7
    assert numbers(clips)[-1] > 35  # if timestamps do not change, a new frame is shown each second
    assert re.search(note, caplog.text)


def mjpeg(count, fps, wall):
    """A camera's MJPEG over HTTP: each picture at its time of `wall`, once FFmpeg has seen enough to open it."""
    parts = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(picture(number)).save(file, "JPEG")
        data = file.getvalue()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        parts.append((head + data + b"\r\n", partial(wall.move, 1 / fps, number - 1 if number > 4 else 0)))
    return parts


def test_mjpeg_is_shown_as_it_arrives(serve, wall):
    url = serve([mjpeg(30, 5, wall)], "multipart/x-mixed-replace; boundary=frame")
    clips = watch(url)
    assert 5 <= len(clips) <= 6
    shown = numbers(clips)
    gaps = np.diff(shown[1:10])  # a picture may be read some time after it was sent
    assert gaps.min() > 0 and gaps.max() < 8 and abs(gaps.mean() - 2.5) <= 1
    np.testing.assert_allclose(np.concatenate([c.timestamps for c in clips])[:10], np.arange(10) / 2, atol=0.35)


def test_raw_h264(tmp_path, site, serve, wall):
    """Refused as a recording, because it has no timestamps; live, it is shown as it arrives."""
    data = make_video(tmp_path / "v.h264", seconds=4, container="h264").read_bytes()
    with pytest.raises(InputError, match=r"without timestamps \(h264\): rewrite it as MP4"):
        watch(f"{site}/v.h264")
    data = make_video(tmp_path / "v.h264", seconds=20, container="h264").read_bytes()
    size = len(data) // 200
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    before = [0.002 if i < 160 else partial(wall.move, 0.05, i - 15) for i in range(len(parts))]  # FFmpeg probes first
    assert 2 <= len(watch(serve([[*zip(parts, before, strict=True)]], "video/h264"))) <= 3


def test_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr(streams, "STALLED_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/live.ts"
        with pytest.raises(InputError, match=r"cannot be opened \(no data for 0.5 s\)"):
            watch(url)


def test_a_stream_that_falls_silent(tmp_path, serve, monkeypatch, caplog):
    part, opened = stream_bytes(tmp_path, [i / 10 for i in range(40)]), av.open
    monkeypatch.setattr(streams, "STALLED_SECONDS", 0.5)
    # To open it may take longer, if the machine pauses.
    monkeypatch.setattr(av, "open", lambda *what, **options: opened(*what, **options | {"timeout": (SECONDS, 0.5)}))
    clips = list(stream_clips(serve([[(part, 0), (b"", 3)]]), budget=SMALL, reconnect_seconds=0.3))
    assert len(clips) >= 4
    assert "no data for 0.5 s" in caplog.text


def test_damaged_frames_are_skipped_and_counted(tmp_path, site):
    path = make_video(tmp_path / "v.mp4", seconds=6, size=(320, 192), options={"crf": "10"})
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat"), data.index(b"moov")
    for place in range(start + (end - start) // 3, start + (end - start) // 2, 40):
        data[place] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        read_video(path, budget=SMALL)
    clips = watch(f"{site}/v.mp4")
    assert len(clips) == 6 and clips[-1].broken > 2


def test_what_comes_before_the_first_keyframe_is_not_counted_as_broken(tmp_path, serve):
    copy(tmp_path, "late.ts", lambda number, packet: number >= 5)
    assert watch(serve([[((tmp_path / "late.ts").read_bytes(), 0)]]))[-1].broken == 0


def test_a_recording_without_a_decoder(tmp_path, site):
    path = make_video(tmp_path / "v.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(InputError, match=r"source .*no decoder"):
        watch(f"{site}/v.mp4")


class Breaking(Files):
    """Interrupts the first transfer of each file at two thirds, or does not report a size."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        data = (Path(self.directory) / self.path.split("?")[0].lstrip("/")).read_bytes()
        self.asked.append(self.path)
        self.send_response(200)
        if "nosize" not in self.path:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        breaks = "breaks" in self.path and self.asked.count(self.path) == 1
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[: len(data) * 2 // 3] if breaks else data)


@pytest.mark.parametrize("ending", ["mkv", "flv", "mp4"])
@pytest.mark.parametrize("how", ["breaks", "nosize"])
def test_a_recording_that_is_interrupted_or_has_no_size(tmp_path, ending, how, caplog):
    """Each clip comes once, with its time in the video; a recording without a size is downloaded once."""
    whole = make_video(tmp_path / "whole.mkv", seconds=12, size=(320, 192))
    flags = {"movflags": "faststart"} if ending == "mp4" else {}
    with av.open(str(whole)) as film, av.open(str(tmp_path / f"v.{ending}"), "w", options=flags) as out:
        track = out.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = track
                out.mux(packet)
    video = read_video(tmp_path / f"v.{ending}", budget=SMALL)
    with serving(partial(Breaking, directory=tmp_path)) as server:
        name = f"/v.{ending}?{how}"
        Breaking.asked.clear()
        clips = list(stream_clips(server.url + name, budget=SMALL, reconnect_seconds=2))
    assert numbers(clips) == [read_number(frame.numpy()) for frame in video.frames]
    np.testing.assert_allclose(np.concatenate([clip.timestamps for clip in clips]), video.timestamps, atol=2e-3)
    assert ("dropped" in caplog.text) == (how == "breaks")
    assert Breaking.asked == [name] * (1 + (how == "breaks"))


def without_stamps(folder, name):
    """FFmpeg gives no timestamps to frames of Matroska before 0."""

    def change(number, packet):
        packet.pts -= 2000
        packet.dts -= 2000

    whole = make_video(folder / "whole.mkv", seconds=4)
    with (
        av.open(str(whole)) as film,
        av.open(str(folder / name), "w", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        track = out.add_stream_from_template(film.streams.video[0])
        for number, packet in enumerate(film.demux(video=0)):
            if packet.size:
                change(number, packet)
                packet.stream = track
                out.mux(packet)


def changing(folder, name):
    one, two = make_video(folder / "one.ts"), make_video(folder / "two.ts", codec="libx265")
    (folder / name).write_bytes(one.read_bytes() + two.read_bytes())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("v.mkv", without_stamps, "has frames without timestamps"),
        ("v.mpg", lambda folder, name: make_video(folder / name, seconds=4), "has frames without timestamps"),
        ("codecs.ts", changing, "changes from h264 to hevc"),
        ("one.mkv", lambda folder, name: make_video(folder / name, [0.0]), "less than one clip of 1.00 s"),
        ("gap.ts", lambda folder, name: make_video(folder / name, [0, 0.1, 0.2, 60]), "less than one clip of"),
    ],
)
def test_a_recording_is_refused_like_its_file(tmp_path, site, name, make, message):
    make(tmp_path, name)
    with pytest.raises(InputError, match=message):
        read_video(tmp_path / name, budget=SMALL)
    with pytest.raises(InputError, match=message):
        watch(f"{site}/{name}")
