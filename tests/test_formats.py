"""A file of a data set is a video, or is refused. None refers to another file or address, whatever its name or text."""

import http.server
import io
from functools import partial

import PIL.Image
import pytest
from media import make_video, read_number
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.index import index_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwen_vl_streaming.video.streams import stream_clips
from serving import serving

SMALL = PixelBudget(min_pixels_per_frame=28 * 28 * 24, max_pixels_per_frame=28 * 28 * 96)
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n"


@pytest.fixture
def folder(tmp_path):
    make_video(tmp_path / "secret.mp4", seconds=2)
    make_video(tmp_path / "secret.ts", seconds=2)
    return tmp_path


@pytest.fixture
def site(folder):
    """Serves a folder; `asked` has the requested paths."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            server.asked.append(self.path)

    with serving(partial(Handler, directory=folder)) as server:
        server.asked = []
        yield server


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("a.mp4", "ffconcat version 1.0\nfile {folder}/secret.mp4\n"),
        ("a.mp4", "ffconcat version 1.0\nfile {url}/secret.mp4\n"),
        ("a.m3u8", HLS.format("secret.ts")),
        ("a.m3u8", HLS.format("file://{folder}/secret.ts")),
        ("a.m3u8", HLS.format("{url}/secret.ts")),
        ("a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 15004 RTP/AVP 96\n"),
        ("a.srt", "1\n00:00:00,000 --> 00:00:10,000\nHello\n\n"),
    ],
)
def test_files_that_refer_to_others(folder, site, name, text):
    path = folder / name
    path.write_text(text.format(folder=folder, url=site.url))
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(InputError, match=r"cannot be opened \((its format has no video|Invalid data)") as error:
            index_video(source, name)
        assert name in str(error.value)
    assert not site.asked


def test_a_name_that_is_a_pattern(folder):
    for name in ("seq1.jpg", "seq2.jpg", "seq3.jpg", "seq%d.jpg"):
        PIL.Image.new("RGB", (160, 96)).save(folder / name)
    with pytest.raises(InputError, match="its format has no video"):
        read_video(folder / "seq%d.jpg")


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("name", ["concat:secret.mp4", "http:x.mp4", "cache:x.mp4", "file:secret.mp4", "pct%d.mp4"])
def test_names_are_not_addresses(folder, monkeypatch, name, reader):
    if reader == "decord":
        pytest.importorskip("decord")
    make_video(folder / "own.mp4", [100 + i / 10 for i in range(20)]).rename(folder / name)
    monkeypatch.chdir(folder)
    shown = [read_number(frame.numpy()) for frame in read_video(name, budget=SMALL, reader=reader).frames]
    assert shown == [read_number(frame.numpy()) for frame in read_video(folder / name, budget=SMALL).frames]


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile secret.mp4\n", HLS.format("file://{folder}/secret.ts")])
def test_streams_that_refer_to_files(folder, site, text):
    (folder / "live").write_text(text.format(folder=folder))
    (folder / "live.m3u8").write_text(text.format(folder=folder))
    for name in ("live", "live.m3u8"):
        with pytest.raises(InputError):
            list(stream_clips(f"{site.url}/{name}", budget=SMALL, reconnect_seconds=0))
    assert not any("secret" in path for path in site.asked)
