"""Videos as cameras, recorders and the web produce them: each frame is the one on screen at its time."""

import io
import struct
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from media import QUIET, make_video, picture, read_number, remux, set_matrix
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.video import frames
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.index import index_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget

SMALL = PixelBudget(min_pixels_per_frame=28 * 28 * 24, max_pixels_per_frame=28 * 28 * 24 * 4)
REORDERED = {"preset": "medium", "bf": "3"}
TENTH = Fraction(1, 10)


def numbers(path, **options):
    return [read_number(frame.numpy()) for frame in read_video(path, budget=SMALL, **options).frames]


def concatenate(target, *parts):
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target


@pytest.mark.parametrize("ending", ["ts", "mkv"])
@pytest.mark.parametrize("options", [{}, REORDERED])
def test_timestamps_that_jump_back(tmp_path, caplog, ending, options):
    """Two recordings joined: the second continues one frame after the first."""
    one = make_video(tmp_path / f"one.{ending}", seconds=4, options=options)
    two = make_video(tmp_path / f"two.{ending}", seconds=3, options=options)
    joined = concatenate(tmp_path / f"joined.{ending}", one, two)
    video = read_video(joined, budget=SMALL)
    assert [read_number(frame.numpy()) for frame in video.frames] == [
        0,
        5,
        10,
        15,
        20,
        25,
        30,
        35,
        0,
        5,
        10,
        15,
        20,
        25,
    ]
    np.testing.assert_allclose(video.timestamps, np.arange(14) / 2, atol=2e-3)
    assert sum("jump back" in record.message for record in caplog.records) == 1


def test_a_source_that_loops(tmp_path, caplog):
    part = make_video(tmp_path / "one.ts", seconds=2, options=REORDERED)
    assert numbers(concatenate(tmp_path / "joined.ts", part, part, part, part)) == [0, 5, 10, 15] * 4
    assert sum("jump back" in record.message for record in caplog.records) == 3


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_splice_in_the_middle_of_a_group_of_pictures(tmp_path, codec):
    """Frames that refer to missing frames are not shown."""
    whole = make_video(tmp_path / "whole.ts", seconds=4, options={"preset": "medium"}, codec=codec)
    for cut in range(5, 12):
        second = remux(whole, tmp_path / "second.ts", lambda number, packet, cut=cut: number >= cut)
        first = remux(whole, tmp_path / "first.ts", lambda number, packet: number < 18)
        shown = numbers(concatenate(tmp_path / "joined.ts", first, second))
        after = shown[4:]
        assert shown[:4] == [0, 5, 10, 15]
        assert all(number >= cut for number in after[1:]) and after[-1] > 30, after
        assert (np.diff(after[2:-2]) == 5).all()


def test_a_timestamp_that_jumps_ahead(tmp_path, caplog):
    """A camera sets its clock in the middle of a recording."""

    def change(number, packet):
        if number >= 22:
            packet.pts += 250 * 90_000
            packet.dts += 250 * 90_000

    whole = make_video(tmp_path / "whole.ts", seconds=4, options=REORDERED)
    leaping = remux(whole, tmp_path / "leaping.ts", change)
    assert numbers(leaping) == numbers(whole) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert sum("jump ahead by 250.1 s" in record.message for record in caplog.records) == 1


def test_a_timestamp_that_wraps_around(tmp_path):
    """MPEG-TS counts to 2^33, which is 26.5 hours."""

    def change(number, packet):
        packet.pts += 2**33 - 200_000
        packet.dts += 2**33 - 200_000

    whole = make_video(tmp_path / "whole.ts", seconds=4)
    assert numbers(remux(whole, tmp_path / "wrapped.ts", change)) == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "flv"])
def test_a_frame_shown_for_minutes(tmp_path, caplog, ending):
    """A screen recording has a frame only when something changes; this is not a discontinuity."""
    times = [0, 1, 61, 61.1, 61.2, 61.3, 125]
    codec = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}} if ending == "webm" else {}
    path = make_video(tmp_path / f"v.{ending}", times, **codec)
    shown = numbers(path)
    assert shown[:4] == [0, 0, 1, 1] and shown[120:126] == [1, 1, 2, 5, 5, 5] and shown[249:251] == [5, 6]
    assert "stamps" not in caplog.text


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("v.avi", {"options": REORDERED, "time_base": TENTH}),
        ("v.avi", {"codec": "mpeg4", "options": {"bf": "2"}, "time_base": TENTH}),
        ("v.avi", {"codec": "mpeg4", "time_base": TENTH}),
        ("v.wmv", {"options": REORDERED, "container": "asf"}),
        ("v.flv", {"options": REORDERED}),
        ("v.mpg", {"codec": "mpeg2video", "options": {"bf": "2"}, "fps": 25, "time_base": Fraction(1, 25)}),
    ],
)
def test_frames_are_in_presentation_order(tmp_path, name, keywords):
    keywords = {"fps": 10, **keywords}
    path = make_video(tmp_path / name, seconds=4, **keywords)
    step = keywords["fps"] / 2
    expected = [int(step * k) for k in range(8)]
    video = read_video(path, budget=SMALL)
    assert [read_number(frame.numpy()) for frame in video.frames] == expected
    np.testing.assert_allclose(video.timestamps, np.array(expected) / keywords["fps"], atol=2e-3)


def test_guessed_timestamps_at_a_slow_rate(tmp_path):
    """FFmpeg's guesses are two frames late, here two seconds, which does not make the file truncated."""
    path = make_video(
        tmp_path / "v.avi", [float(i) for i in range(12)], options=REORDERED, fps=1, time_base=Fraction(1)
    )
    assert numbers(path) == list(range(12))


@pytest.mark.parametrize("ending", ["mkv", "webm", "flv", "wmv", "mp4", "avi", "ts"])
@pytest.mark.parametrize("sound", [(0, 9), (0, 3)])
def test_sound_that_is_longer_than_the_video(tmp_path, ending, sound):
    codec, source, container = {}, "mkv", None
    if ending == "webm":
        codec, container = {"codec": "libvpx", "options": {"cpu-used": "8", "deadline": "realtime"}}, "matroska"
    elif ending == "wmv":
        codec, source, container = {"codec": "wmv2", "time_base": Fraction(1, 1000), "container": "asf"}, "wmv", "asf"
    elif ending == "avi":
        codec, source = {"time_base": TENTH}, "avi"
    plain = make_video(tmp_path / f"plain.{source}", seconds=4, **codec)
    path = remux(plain, tmp_path / f"v.{ending}", sound=sound, container=container)
    assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize("ending", ["mkv", "flv", "mp4", "ts"])
def test_a_video_track_that_begins_late(tmp_path, ending):
    plain = make_video(tmp_path / "plain.mkv", [5 + i / 10 for i in range(40)])
    assert numbers(plain) == [0, 5, 10, 15, 20, 25, 30, 35]
    path = remux(plain, tmp_path / f"v.{ending}", sound=(0, 7))
    assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize(
    ("ending", "sound"), [*((e, s) for e in ("mkv", "flv", "mp4") for s in (None, (0, 12), (0, 9))), ("avi", None)]
)
def test_a_truncated_file(tmp_path, ending, sound):
    plain = tmp_path / f"plain.{'avi' if ending == 'avi' else 'mkv'}"
    make_video(plain, seconds=12, size=(320, 192), options={"crf": "1"}, time_base=TENTH)
    path = remux(plain, tmp_path / f"v.{ending}", sound=sound)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(InputError, match=r"is truncated .*download it again|cannot be opened|damaged"):
        read_video(path, budget=SMALL)


def test_a_rate_that_varies_with_a_low_mean(tmp_path):
    """A screen recording: one second of motion in 40 s without."""
    times = [0, 20, *(20 + i / 10 for i in range(1, 11)), 40]
    video = read_video(make_video(tmp_path / "v.mp4", times), budget=SMALL)
    assert video.fps == 2.0
    shown = [read_number(frame.numpy()) for frame in video.frames]
    assert shown[:40] == [0] * 40 and shown[40:43] == [1, 6, 11] and shown[79:81] == [11, 12]


def test_a_steady_slow_rate_with_a_frame_missing(tmp_path):
    times = [float(i) for i in range(40) if i != 17]
    assert read_video(make_video(tmp_path / "v.mp4", times, fps=1), budget=SMALL).fps == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("ending", ["ts", "mkv"])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", REORDERED),
        ("libx264", {"preset": "medium", "x264-params": "open-gop=1:log-level=none"}),
        ("libx264", {"preset": "medium", "x264-params": "intra-refresh=1:log-level=none"}),
        ("libx265", {"preset": "fast", "x265-params": "open-gop=1:bframes=4:log-level=none"}),
        ("mpeg2video", {"bf": "2"}),
    ],
)
def test_a_recording_that_begins_inside_a_group_of_pictures(tmp_path, ending, codec, options):
    """Time starts with the first decodable frame, and no frame is shown before."""
    rate = {"fps": 25, "time_base": Fraction(1, 25)} if codec == "mpeg2video" else {"fps": 10}
    whole = make_video(tmp_path / "whole.ts", seconds=8, codec=codec, options=options, **rate)
    path = remux(whole, tmp_path / f"v.{ending}", lambda number, packet: number >= 5)
    shown = numbers(path)
    assert shown[0] > 5
    assert len(shown) >= 6 and all(b - a in (rate["fps"] // 2, (rate["fps"] + 1) // 2) for a, b in pairwise(shown[:6]))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((-1, 0, 0, 1), lambda frames: frames.flip(3)),
        ((1, 0, 0, -1), lambda frames: frames.flip(2)),
        ((0, 1, 1, 0), lambda frames: frames.transpose(2, 3)),
        ((0, -1, -1, 0), lambda frames: frames.transpose(2, 3).flip(2, 3)),
        ((0, 1, -1, 0), lambda frames: frames.rot90(-1, dims=(2, 3))),
        ((-1, 0, 0, -1), lambda frames: frames.flip(2, 3)),
    ],
)
def test_display_matrices(tmp_path, matrix, turned, reader):
    """Frames are upright, as a viewer sees them, also if mirrored; decord, which does not mirror, is refused for
    mirrored ones."""
    size = (224, 224)
    budget = PixelBudget(224 * 224, 224 * 224)  # resized to itself: equal to the pixel
    plain = read_video(make_video(tmp_path / "plain.mp4", size=size), budget=budget).frames
    assert not torch.equal(plain, plain.flip(3))
    path = set_matrix(make_video(tmp_path / "v.mp4", size=size), *matrix)
    if reader == "decord" and matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0:
        with pytest.raises(InputError, match="decord does not mirror"):
            read_video(path, budget=budget, reader=reader)
        return
    assert torch.equal(read_video(path, budget=budget, reader=reader).frames, turned(plain))


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_cover_art_is_not_the_video(tmp_path, ending):
    path = remux(make_video(tmp_path / "plain.mp4", seconds=4), tmp_path / f"v.{ending}", cover=True)
    assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]
    with pytest.raises(InputError, match="2 video tracks"):
        read_video(path, budget=SMALL, reader="decord")


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_damaged_files_are_refused(tmp_path, reader):
    """Bytes overwritten in the picture data: refused if any frame up to the last picked one is damaged."""
    refused = 0
    for seed in range(8):
        path = make_video(tmp_path / f"{seed}.mp4", seconds=4, size=(320, 192), options={"crf": "10"})
        whole = read_video(path, budget=SMALL).frames
        data = bytearray(path.read_bytes())
        start, end = data.index(b"mdat"), data.index(b"moov")
        generator = np.random.default_rng(seed)
        for _ in range(12):
            at = int(generator.integers(start + (end - start) // 4, start + (end - start) * 3 // 4))
            data[at] = int(generator.integers(256))
        path.write_bytes(data)
        try:
            frames = read_video(path, budget=SMALL, reader=reader).frames
        except InputError as error:
            assert "damaged" in str(error) and "download it again" in str(error)
            refused += 1
        else:  # bytes that FFmpeg takes for others
            assert (frames.float() - whole.float()).abs().mean() < 8
    assert refused >= 6


def test_damaged_vp8_is_refused(tmp_path):
    """Found by fuzzing: with frame threads, FFmpeg returns damaged frames without an error."""
    path = make_video(tmp_path / "v.webm", seconds=3, size=(320, 192), codec="libvpx")
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0)]
    data, packet = path.read_bytes(), packets[12]  # a keyframe
    assert data.count(packet) == 1
    path.write_bytes(data.replace(packet, packet[:20] + bytes(len(packet) - 20)))
    with pytest.raises(InputError, match=r"is damaged.*download it again"):
        read_video(path, budget=SMALL)


def test_damage_after_the_last_picked_frame(tmp_path):
    path = make_video(tmp_path / "v.mp4", seconds=8, size=(320, 192), options={"crf": "10"}, keyframe_every=10)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat") + (data.index(b"moov") - data.index(b"mdat")) * 8 // 10
    data[place : place + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    assert numbers(path, end=4) == [0, 5, 10, 15, 20, 25, 30, 35]
    with pytest.raises(InputError, match=r"is damaged.*download it again"):
        read_video(path, budget=SMALL)


def test_packets_lost_from_a_transport_stream(tmp_path):
    path = make_video(tmp_path / "v.ts", seconds=4, size=(320, 192), options={"crf": "10"}, keyframe_every=100)
    data = path.read_bytes()
    lost = len(data) // 188 // 2
    path.write_bytes(data[: 188 * lost] + data[188 * (lost + 5) :])
    with pytest.raises(InputError, match=r"is damaged.*download it again"):
        read_video(path, budget=SMALL)


@pytest.mark.parametrize("reader", [None, "decord"])
def test_a_codec_without_a_decoder(tmp_path, reader):
    path = make_video(tmp_path / "v.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(InputError, match="no decoder"):
        read_video(path, reader=reader)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_last_frame_with_a_duration_of_months(tmp_path, ending):
    plain = make_video(tmp_path / "plain.mkv", seconds=4, options={"bf": "0"})

    def change(number, packet):
        if number == 39:
            packet.duration = 2_000_000_000 if ending == "mkv" else 5_000

    path = remux(plain, tmp_path / f"v.{ending}", change)
    if ending == "mp4":
        data = bytearray(path.read_bytes())
        at = data.index(b"stts") + 8
        assert struct.unpack(">III", data[at : at + 12])[:2] == (2, 39)
        data[at + 16 : at + 20] = b"\x70\0\0\0"
        path.write_bytes(data)
    assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert index_video(path).duration == pytest.approx(4, abs=0.01)


def test_more_clips_than_supported(tmp_path, monkeypatch):
    path = make_video(tmp_path / "v.mp4", seconds=8)
    assert len(numbers(path, max_clips=8)) == 16
    monkeypatch.setitem(frames.READERS, "pyav", None)  # nothing is decoded
    with pytest.raises(InputError, match="has 8 clips, more than the 7"):
        read_video(path, max_clips=7)


@pytest.mark.parametrize("ending", ["h264", "mjpeg"])
def test_formats_without_timestamps(tmp_path, ending):
    """FFmpeg would invent 25 frames per second."""
    codec = {"codec": "mjpeg", "pixels": "yuvj420p", "time_base": TENTH} if ending == "mjpeg" else {}
    path = make_video(tmp_path / f"v.{ending}", container=ending, **codec)
    with pytest.raises(InputError, match=r"without timestamps.*rewrite it as MP4"):
        read_video(path)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("v.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
        ("v.webm", {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}}),
        ("v.mp4", {"codec": "libsvtav1", "options": {"preset": "10"}}),
        ("v.mkv", {"codec": "ffv1", "time_base": TENTH}),
        ("v.mov", {"codec": "prores_ks", "pixels": "yuv422p10le", "time_base": TENTH}),
        ("v.gif", {"codec": "gif", "pixels": "rgb8", "time_base": Fraction(1, 100)}),
        ("v.avi", {"codec": "mjpeg", "pixels": "yuvj420p", "time_base": TENTH}),
    ],
)
def test_other_codecs(tmp_path, name, keywords):
    path = make_video(tmp_path / name, seconds=4, **keywords)
    assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert picture(5).shape == (96, 160, 3)


def test_vp8_frames_that_are_not_shown(tmp_path):
    """Others refer to them; the previous frame stays on screen."""
    path = make_video(tmp_path / "v.webm", seconds=4, codec="libvpx", options={"cpu-used": "8"})
    with av.open(str(path)) as film:
        packets = [bytes(packet) for packet in film.demux(video=0) if packet.size]
    data = path.read_bytes()
    for number in (5, 20):
        packet = packets[number]
        path.write_bytes(data := data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:]))
    assert numbers(path) == [0, 4, 10, 15, 19, 25, 30, 35]
    assert len(index_video(path).times) == 38


def test_an_absurd_number_of_frames(tmp_path):
    """Refused before memory is allocated for any of them."""
    path = make_video(tmp_path / "v.mkv", [0, 1, 2, 40_000])
    with pytest.raises(InputError, match=r"more than 10000000: give a smaller end, or rewrite the video"):
        read_video(path, fps=1000)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_joined_recordings_with_continuous_timestamps(tmp_path, codec):
    """As `ffmpeg -f segment` splits them: the continuity counter restarts, and FFmpeg flags the packets before."""
    one = make_video(tmp_path / "one.ts", seconds=2, codec=codec)
    for ahead in (-0.15, -0.05, 0, 0.1, 1.0):

        def change(number, packet, ahead=ahead):
            packet.pts += round((2 + ahead) * 90_000)
            packet.dts += round((2 + ahead) * 90_000)

        path = concatenate(tmp_path / f"{ahead}.ts", one, remux(one, tmp_path / "two.ts", change))
        times = index_video(path).times
        assert len(times) == 40
        targets = np.arange(int(np.ceil((times[-1] + 0.1 - 2e-3) * 2))) / 2
        on_screen = np.searchsorted(times, targets + 2e-3, side="right") - 1
        assert numbers(path)[: len(targets)] == (on_screen % 20).tolist()


def test_a_recording_in_many_segments(tmp_path):
    whole = make_video(tmp_path / "whole.mkv", seconds=8, options=REORDERED)
    with (
        av.open(str(whole)) as film,
        av.open(
            str(tmp_path / "%02d.ts"), "w", format="segment", options={"segment_time": "1", "segment_format": "mpegts"}
        ) as out,
    ):
        track = out.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = track
                out.mux(packet)
    parts = sorted(tmp_path.glob("??.ts"))
    assert len(parts) > 4
    for padding in (0, 4):  # plain, and as M2TS
        data = b"".join(part.read_bytes() for part in parts)
        packets = [bytes(padding) + data[at : at + 188] for at in range(0, len(data), 188)]
        (tmp_path / "joined.ts").write_bytes(b"".join(packets))
        assert numbers(tmp_path / "joined.ts") == numbers(whole)
        index = index_video(io.BytesIO(b"".join(packets)), "in memory")
        assert len(index.times) == 80 and not index.damaged


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_packets_lost_right_before_a_join_or_a_keyframe(tmp_path, codec):
    """The rest of the frame decodes, and H.265 does not report that it is only a part."""
    noise = np.random.default_rng(0)

    def film(path, begin):
        with av.open(str(path), "w") as out:
            track = out.add_stream(codec, rate=10)
            track.width, track.height, track.codec_context.gop_size = 320, 192, 12
            track.options = {**QUIET[codec], "crf": "10"}
            track.codec_context.time_base = TENTH
            for number in range(10):
                frame = av.VideoFrame.from_ndarray(noise.integers(0, 255, (192, 320, 3), np.uint8), format="rgb24")
                frame.pts = begin + number
                out.mux(track.encode(frame))
            out.mux(track.encode())
        return path.read_bytes()

    one, two = film(tmp_path / "one.ts", 0), film(tmp_path / "two.ts", 20)
    path = tmp_path / "joined.ts"
    path.write_bytes(one + two)
    assert read_video(path, budget=SMALL).clips == 3
    for first, behind in ((3, 0), (5, 3), (60, 55)):
        path.write_bytes(one[: len(one) - 188 * first] + one[len(one) - 188 * behind :] + two)
        with pytest.raises(InputError, match=r"is damaged.*download it again"):
            read_video(path, budget=SMALL, fps=10)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_recording_that_ends_within_a_frame_before_another(tmp_path, codec):
    """The partial frame is not shown."""
    part = make_video(tmp_path / "part.ts", seconds=2, codec=codec, size=(640, 480), options={"crf": "1"})
    data = part.read_bytes()
    frames = []
    for lost in range(1, 6):
        path = tmp_path / f"{lost}.ts"
        path.write_bytes(data[: -188 * lost] + data)
        frames.append(len(index_video(path).times))
    assert sum(36 <= count < 40 for count in frames) >= 4  # in one of 16 cases the counter continues by chance
    path.write_bytes(data[: -188 * (1 + frames.index(min(frames)))] + data)
    assert numbers(path)[:4] == [0, 5, 10, 15] and numbers(path)[-1] >= 15


@pytest.mark.parametrize("second", ["libx265", "mpeg2video"])
def test_a_transport_stream_that_changes_its_codec(tmp_path, second):
    rate = {"fps": 25, "time_base": Fraction(1, 25)} if second == "mpeg2video" else {}
    one, two = make_video(tmp_path / "one.ts"), make_video(tmp_path / "two.ts", codec=second, **rate)
    for parts in ((one, two), (two, one)):
        with pytest.raises(InputError, match=r"changes from \w+ to \w+ where recordings were joined"):
            numbers(concatenate(tmp_path / "joined.ts", *parts))


def fragmented(source, target, flags="dash+delay_moov+frag_keyframe"):
    with av.open(str(source)) as film, av.open(str(target), "w", options={"movflags": flags}) as out:
        track = out.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = track
                out.mux(packet)
    return target


@pytest.mark.parametrize("flags", ["dash+delay_moov+frag_keyframe", "frag_keyframe+empty_moov"])
def test_a_fragmented_mp4_that_begins_late(tmp_path, flags):
    """As in a recording of HLS or DASH: its length is its end on the time axis."""
    late = make_video(tmp_path / "late.mkv", [5 + i / 10 for i in range(40)], options=REORDERED)
    assert numbers(fragmented(late, tmp_path / "v.mp4", flags)) == [0, 5, 10, 15, 20, 25, 30, 35]


def test_a_fragmented_mp4_and_an_avi_that_are_slightly_truncated(tmp_path):
    """By less than a second: the stated size reveals it."""
    plain = make_video(tmp_path / "plain.mkv", seconds=4)
    avi = make_video(tmp_path / "v.avi", seconds=4, codec="mpeg4", time_base=TENTH)
    for path in (fragmented(plain, tmp_path / "v.mp4", "empty_moov+frag_keyframe+skip_trailer"), avi):
        data = path.read_bytes()
        assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]
        for cut in (3, 40, 200):
            path.write_bytes(data[:-cut])
            with pytest.raises(InputError, match=r"is truncated \(\d+ of \d+ bytes\)"):
                numbers(path)


@pytest.mark.parametrize(
    ("ending", "keywords"),
    [
        ("flv", {}),
        ("nut", {}),
        ("wmv", {"container": "asf"}),
        ("mov", {}),
        ("mp4", {}),
        ("ivf", {"codec": "libvpx", "options": {"cpu-used": "8", "deadline": "realtime"}}),
    ],
)
def test_joined_files_of_which_only_the_first_can_be_read(tmp_path, ending, keywords):
    one = make_video(tmp_path / f"one.{ending}", seconds=3, **keywords)
    assert numbers(one) == [0, 5, 10, 15, 20, 25]
    with pytest.raises(
        InputError, match=rf"of several joined files \(the second starts at byte {len(one.read_bytes())}\)"
    ):
        numbers(concatenate(tmp_path / f"joined.{ending}", one, one))


@pytest.mark.parametrize("ending", ["avi", "gif"])
def test_joined_files_that_can_be_read(tmp_path, ending):
    keywords = (
        {"codec": "gif", "pixels": "rgb8", "time_base": Fraction(1, 100)}
        if ending == "gif"
        else {"time_base": TENTH, "codec": "mpeg4"}
    )
    one = make_video(tmp_path / f"one.{ending}", seconds=3, **keywords)
    assert numbers(concatenate(tmp_path / f"joined.{ending}", one, one)) == [0, 5, 10, 15, 20, 25] * 2


def test_timestamps_that_are_the_time_of_day(tmp_path):
    """decord would crash the process."""

    def change(number, packet):
        packet.pts += 1_700_000_000_000
        packet.dts += 1_700_000_000_000

    path = remux(make_video(tmp_path / "plain.mkv", seconds=4), tmp_path / "v.mkv", change)
    assert numbers(path) == [0, 5, 10, 15, 20, 25, 30, 35]
    with pytest.raises(InputError, match=r"decord cannot read .* hours late.*FORCE_QWENVL_VIDEO_READER=pyav"):
        numbers(path, reader="decord")


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_one_gap_is_not_a_rate(tmp_path, ending):
    shown = numbers(make_video(tmp_path / f"v.{ending}", [0, 5]))
    assert shown[:12] == [0] * 10 + [1, 1]


@pytest.mark.parametrize("options", [{}, REORDERED])
def test_no_frame_of_an_asf_is_lost(tmp_path, options):
    path = make_video(tmp_path / "v.asf", seconds=4, options=options)
    assert numbers(path, fps=10) == list(range(40))


def test_a_warning_about_a_file_appears_once(tmp_path, caplog):
    part = make_video(tmp_path / "one.ts", seconds=2)
    path = concatenate(tmp_path / "joined.ts", part, part)
    assert numbers(path) == numbers(path)
    assert caplog.text.count("jump back") == 1


def test_a_name_that_cannot_be_printed():
    with pytest.raises(InputError, match=r"^video 'a\\x00b\\n.mp4' ") as caught:
        index_video("a\0b\n.mp4")
    assert str(caught.value).isprintable()
