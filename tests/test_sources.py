"""Clips in real time: paced files, a synthetic scene, and HTTP and RTSP streams that are interrupted."""

import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler

import numpy as np
import pytest
import torch
from media import make_video, read_number, stream_bytes
from qwen_vl_streaming.common.clock import now
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.video import frames
from qwen_vl_streaming.video.frames import read_video, resize_frame
from qwen_vl_streaming.video.opening import open_source
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwen_vl_streaming.video.sources import paced_clips, synthetic_clips
from qwen_vl_streaming.video.streams import stream_clips
from rtsp import Camera
from serving import serving
from waiting import until

SMALL = PixelBudget(min_pixels_per_frame=28 * 28 * 24, max_pixels_per_frame=28 * 28 * 24 * 4)


def test_file_is_paced_and_equal_to_the_file(tmp_path):
    path = make_video(tmp_path / "v.mp4", seconds=3)
    begin = now()
    video = read_video(path, budget=SMALL)
    clips = list(paced_clips(video, speed=4))
    assert torch.equal(torch.cat([clip.frames for clip in clips]), video.frames)
    np.testing.assert_array_equal(np.concatenate([clip.timestamps for clip in clips]), video.timestamps)
    assert [clip.index for clip in clips] == [0, 1, 2]
    np.testing.assert_allclose(np.diff([clip.completed for clip in clips]), 0.25, atol=1e-6)
    assert begin + 2.5 / 4 <= clips[-1].completed <= now()


def test_a_file_is_decoded_as_it_is_watched(tmp_path, monkeypatch):
    """So that memory does not grow with its length. The clips are those of the file, with an odd number of frames."""
    path = make_video(tmp_path / "v.mp4", seconds=7.5)
    video, resized = read_video(path, budget=SMALL), []
    monkeypatch.setattr(frames, "resize_frame", lambda *what: resized.append(1) or resize_frame(*what))
    source = open_source(str(path), SMALL, speed=1e6)
    clips = source.clips()
    first = [next(clips), next(clips)]
    assert len(resized) == 1 + 4 and source.count == video.clips == 8 and source.size == tuple(video.frames.shape[2:])
    assert torch.equal(torch.cat([clip.frames for clip in (*first, *clips)]), video.frames)
    assert torch.equal(torch.cat([clip.frames for clip in source.clips()]), video.frames)  # it can be watched again


def test_late_consumer_learns_when_a_clip_was_due(tmp_path):
    clips = paced_clips(read_video(make_video(tmp_path / "v.mp4", seconds=3), budget=SMALL), speed=10)
    first = next(clips)
    time.sleep(0.3)
    assert next(clips).completed == pytest.approx(first.completed + 0.1)


def test_synthetic():
    clips = list(synthetic_clips(3, speed=20, size=(56, 84)))
    assert [clip.frames.shape for clip in clips] == [(2, 3, 56, 84)] * 3
    assert not torch.equal(clips[0].frames, clips[1].frames)
    np.testing.assert_allclose(np.diff([clip.completed for clip in clips]), 0.05, atol=1e-6)
    with pytest.raises(InputError, match="speed 0"):
        next(synthetic_clips(1, speed=0))


def test_http_stream_gives_the_clips_of_the_file(tmp_path, serve):
    times = [i / 10 for i in range(35)]
    url = serve([[(stream_bytes(tmp_path, times), 0)]])
    before = now()
    clips = list(stream_clips(url, budget=SMALL, reconnect_seconds=0))
    video = read_video(tmp_path / "part.ts", budget=SMALL)
    assert torch.equal(torch.cat([clip.frames for clip in clips]), video.frames)
    np.testing.assert_allclose(np.concatenate([clip.timestamps for clip in clips]), video.timestamps, atol=1e-6)
    assert all(before <= clip.completed <= now() for clip in clips)


def test_http_stream_is_dropped_and_reconnected(tmp_path, serve, wall, caplog):
    """The server disconnects in mid-stream; the next connection continues 1.5 s later, with a new clock."""
    first = stream_bytes(tmp_path, [i / 10 for i in range(20)])
    second = stream_bytes(tmp_path, [i / 10 for i in range(20)])
    url = serve([[(first[: len(first) * 3 // 4], 0)], [(second, lambda: wall.move(1.5))]])
    clips = list(stream_clips(url, budget=SMALL, reconnect_seconds=0.6))
    moments = np.concatenate([clip.timestamps for clip in clips])
    assert [clip.index for clip in clips] == list(range(len(clips)))
    assert (np.diff(moments) >= 0).all()
    assert 3.5 < moments[-1] < 3.8  # the second connection gives a frame 1.7 s after the first, and lasts 2 s
    numbers = [read_number(frame.numpy()) for clip in clips for frame in clip.frames]
    assert numbers[:2] == [0, 5]
    assert numbers[-1] >= 15
    assert "dropped" in caplog.text


def test_http_recording_ends_at_its_end(tmp_path, caplog):
    make_video(tmp_path / "film.mp4", seconds=4)
    with serving(partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        clips = list(stream_clips(server.url + "/film.mp4", budget=SMALL, max_clips=9))
    assert len(clips) == 4 and all(clip.film for clip in clips)
    assert "dropped" not in caplog.text


def test_http_stream_that_keeps_restarting_is_abandoned(tmp_path, serve, wall, caplog):
    """Connections shorter than the timeout do not reset it, and are retried more and more slowly."""
    data = stream_bytes(tmp_path, [i / 10 for i in range(20)])
    url = serve([[(data, 0)]] * 50)
    clips = list(stream_clips(url, budget=SMALL, reconnect_seconds=1.5))
    assert wall.waits == [0.2, 0.4, 0.8, 1.6] and caplog.text.count("dropped") == 4
    assert not clips[0].film


def test_missing_source(serve):
    with pytest.raises(InputError, match=r"127\.0\.0\.1.*cannot be opened"):
        list(stream_clips(serve([])))
    with pytest.raises(InputError, match="/dev/video99 cannot be opened"):
        list(stream_clips("/dev/video99"))


def test_reading_ends_with_its_consumer(tmp_path, serve):
    url = serve([[(stream_bytes(tmp_path, [i / 10 for i in range(60)]), 0)]])
    clips = stream_clips(url, budget=SMALL)
    next(clips)
    clips.close()
    until(lambda: not any(url in thread.name for thread in threading.enumerate()))


def test_max_clips(tmp_path, serve):
    url = serve([[(stream_bytes(tmp_path, [i / 10 for i in range(60)]), 0)]])
    assert len(list(stream_clips(url, budget=SMALL, max_clips=2))) == 2


def test_rtsp_camera_gives_its_clips_in_real_time(tmp_path, wall):
    """Over one TCP connection, which passes firewalls; the camera then disconnects for good."""
    path = make_video(tmp_path / "part.ts", [i / 10 for i in range(35)], container="mpegts")
    with Camera(path, wall) as camera:
        clips = list(stream_clips(camera.url, budget=SMALL, reconnect_seconds=0))
    numbers = [read_number(frame.numpy()) for clip in clips for frame in clip.frames]
    assert numbers[0] in (0, 1)  # FFmpeg may have no time for the first frame, which is then skipped
    assert numbers[:6] == list(range(numbers[0], 30, 5))
    np.testing.assert_allclose(np.concatenate([clip.timestamps for clip in clips])[:6], np.arange(6) / 2, atol=0.02)
    assert (np.diff([clip.completed for clip in clips[:3]]) > 0.5).all()  # not all at once when it is over
    (transport,) = [headers["transport"] for method, headers in camera.asked if method == "SETUP"]
    assert "TCP" in transport


def test_rtsp_camera_that_disconnects_is_reconnected(tmp_path, wall, caplog):
    path = make_video(tmp_path / "part.ts", [i / 10 for i in range(40)], container="mpegts")
    with Camera(path, wall, plays=2, seconds=2) as camera:
        clips = list(stream_clips(camera.url, budget=SMALL, reconnect_seconds=0.5))
        assert [method for method, _ in camera.asked].count("PLAY") == 2
    assert [clip.index for clip in clips] == list(range(len(clips)))
    assert clips[-1].timestamps[-1] > 3
    assert "dropped" in caplog.text
