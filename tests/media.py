"""Creates small real videos and tar shards, valid and damaged, for tests.

Each frame of a video shows its own number as eight black or white bars. They survive encoding and resizing, so that a
test can identify a frame.
"""

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

BARS = 8
QUIET = {
    "libx264": {"preset": "ultrafast", "x264-params": "log-level=none"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
}


def make_video(
    path: Path | io.BytesIO,
    times: Sequence[float] | None = None,
    *,
    seconds: float = 3.0,
    fps: float = 10.0,
    size: tuple[int, int] = (160, 96),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    container: str | None = None,
    keyframe_every: int = 12,
    options: dict[str, str] | None = None,
    time_base: Fraction = Fraction(1, 90_000),
) -> Path | io.BytesIO:
    """Write a video whose frame i is shown from times[i] seconds on (default: `seconds` at a constant `fps`)."""
    times = [i / fps for i in range(round(seconds * fps))] if times is None else times
    quiet = QUIET.get(codec, {})
    file = str(path) if isinstance(path, Path) else path
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.thread_count = 1
        stream.options = {**quiet, **(options or {})}
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts, frame.time_base = round(time / time_base), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def stream_bytes(folder: Path, times: Sequence[float]) -> bytes:
    """MPEG-TS in memory of the frames at `times`; `folder` keeps it as part.ts."""
    return make_video(folder / "part.ts", times, container="mpegts").read_bytes()


def picture(number: int, size: tuple[int, int] = (160, 96)) -> np.ndarray:
    """An image (height, width, 3), uint8, that shows `number`, below 256, as bars. The lowest bit is on the left."""
    width, height = size
    bits = (number >> np.arange(BARS)) & 1
    row = np.repeat(bits, -(-width // BARS))[:width].astype(np.uint8) * 255
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_number(image: np.ndarray) -> int:
    """The number that a frame, (H, W, 3) or (3, H, W), shows, read at the centre of each bar."""
    image = np.asarray(image)
    image = image.transpose(1, 2, 0) if image.shape[0] == 3 else image
    middle = image[image.shape[0] // 2].mean(axis=-1)
    width = -(-image.shape[1] // BARS)
    return sum(int(middle[min(bar * width + width // 2, len(middle) - 1)] > 127) << bar for bar in range(BARS))


def rotate(path: Path, degrees: int) -> Path:
    """Rotate an MP4 clockwise by `degrees`, in its header only, as phones do."""
    return set_matrix(path, *{90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees])


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Set the display matrix in the header of an MP4: a pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    start += 4 + (32 if data[start] else 20) + 16
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def remux(
    source: Path,
    target: Path,
    change: Callable[[int, av.Packet], bool | None] = lambda number, packet: None,
    *,
    container: str | None = None,
    sound: tuple[float, float] | None = None,
    cover: bool = False,
) -> Path:
    """Copy the video packets of a file into another container. `change` may modify the timestamps of each packet, given
    its number; a packet for which it returns False is dropped. `sound` adds a silent track between two times in
    seconds. `cover` adds a cover image that shows 255, as the first stream."""
    with av.open(str(source)) as film, av.open(str(target), "w", format=container) as out:
        if cover:
            art = out.add_stream("mjpeg", rate=25)
            art.width, art.height, art.pix_fmt, art.codec_context.time_base = 160, 96, "yuvj420p", Fraction(1, 25)
            art.disposition = av.stream.Disposition.attached_pic
        track = out.add_stream_from_template(film.streams.video[0])
        audio = out.add_stream("libmp3lame", rate=44_100) if sound else None
        packets = []
        if cover:
            frame = av.VideoFrame.from_ndarray(picture(255), format="rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            packets += art.encode(frame) + art.encode()
        for number, packet in enumerate(film.demux(film.streams.video[0])):
            if packet.size and change(number, packet) is not False:
                packet.stream = track
                packets.append(packet)
        if audio:
            frame_size = (
                1152 if audio.codec_context.name.startswith("libmp3") or "mp3" in audio.codec_context.name else 1024
            )
            for start in range(int(sound[0] * 44_100), int(sound[1] * 44_100), frame_size):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, frame_size), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 44_100, start, Fraction(1, 44_100)
                packets += audio.encode(frame)
            packets += audio.encode()
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            out.mux(packet)
    return target


def video_bytes(**keywords) -> bytes:
    """A small MP4 in memory."""
    return make_video(io.BytesIO(), container="mp4", **keywords).getvalue()


def sound_bytes() -> bytes:
    """An MP4 in memory with an audio track and no video track."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def sample_json(words: int, seconds: object = 10.0, **fields) -> bytes:
    """JSON of a sample with a caption of `words` words, each of which is one token of `make_tokenizer`. A field that is
    None is omitted."""
    data = {"category": "test", "video_duration_in_s": seconds, "human_caption": " ".join(["word"] * words), **fields}
    return json.dumps({key: value for key, value in data.items() if value is not None}).encode()


def make_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """Write a tar file of (name, data) in the given order. A TarInfo in place of a name is used as the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write `files`, which maps names to bytes, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as file:
            file.write(data)
    return folder


def make_tokenizer(folder: Path) -> Path:
    """Write a tokenizer for which every word is one token to `folder`."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(r"\s+"), "removed")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
