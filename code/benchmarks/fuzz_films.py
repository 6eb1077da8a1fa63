"""Feeds mutated films of ten containers and codecs to `read_video`, by both readers, and over HTTP to `stream_clips`.

    python code/benchmarks/fuzz_films.py                # 3,000 films and 1,000 streams, some minutes on a core

Every frame of the films shows its own number. A finding is an exception that is not a plain line, no answer within 60
seconds, a process that dies, as of memory, anything written or started, times that go back or lie outside the film,
more clips than its length has room for, or two readers that give different frames. Where only pictures were damaged and
not their times, frames that show another number than their time has are counted apart: a decoder that takes a damaged
picture for a sound one cannot be told. Every input follows from --seed and its number.
"""

import argparse
import io
import random
import sys
import tempfile
import threading
from contextlib import closing
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from fuzzing import Try, fuzz, mutate_bytes
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run

FPS, SECONDS, SIZE, BARS = 5, 6, (96, 64), 8
FILMS = {
    "mp4, H.264": ("mp4", "libx264", "yuv420p", {}),
    "mov, H.264 with B-frames": ("mov", "libx264", "yuv420p", {"bf": "2", "g": "10"}),
    "mp4, HEVC": ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "mkv, VP9": ("matroska", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "webm, VP8": ("webm", "libvpx", "yuv420p", {"deadline": "realtime"}),
    "avi, MPEG-4": ("avi", "mpeg4", "yuv420p", {}),
    "avi, MJPEG": ("avi", "mjpeg", "yuvj420p", {}),
    "flv, H.264": ("flv", "libx264", "yuv420p", {}),
    "ts, MPEG-2": ("mpegts", "mpeg2video", "yuv420p", {}),
    "wmv": ("asf", "wmv2", "yuv420p", {}),
    "mkv, AV1": ("matroska", "libsvtav1", "yuv420p", {"preset": "12"}),
    "gif": ("gif", "gif", "rgb8", {}),
}


def picture(number: int) -> np.ndarray:
    """(height, width, 3) uint8: `number` as bars, the lowest bit on the left."""
    bits = (number >> np.arange(BARS)) & 1
    row = np.repeat(bits, SIZE[0] // BARS).astype(np.uint8) * 255
    return np.broadcast_to(row[None, :, None], (SIZE[1], SIZE[0], 3)).copy()


def read_number(frame: np.ndarray) -> int | None:
    """The number in a frame (3, H, W); None where it is not black and white bars."""
    columns = np.array_split(frame.astype(float).mean(axis=0), BARS, axis=1)
    means = np.array([column[:, column.shape[1] // 4 : -column.shape[1] // 4].mean(axis=1) for column in columns])
    light = means.mean(axis=1) > 127
    sound = np.abs(means - 255 * light[:, None]).max() < 60
    return int((light << np.arange(BARS)).sum()) if sound else None


def film(container: str, codec: str, pixels: str, options: dict[str, str]) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        rate = 25 if codec == "mpeg2video" else FPS
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, pixels
        for number in range(SECONDS * rate):
            frame = av.VideoFrame.from_ndarray(picture(number * FPS // rate), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            out.mux(stream.encode(frame.reformat(format=pixels)))
        out.mux(stream.encode())
    return file.getvalue()


def sound_films() -> dict[str, bytes]:
    return {name: film(*how) for name, how in FILMS.items()}


def mutate_film(data: bytes, draw: random.Random) -> bytes:
    """The head, the tail, anywhere, or the film cut short."""
    how = draw.randrange(4)
    if how == 0:
        at = min(draw.choice([64, 512, 4096]), len(data))
        return mutate_bytes(data[:at], draw) + data[at:]
    if how == 1:
        at = max(len(data) - draw.choice([512, 2048]), 0)
        return data[:at] + mutate_bytes(data[at:], draw)
    if how == 2 and draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    return mutate_bytes(data, draw, most=8)


def check_times(times: np.ndarray, most: float) -> None:
    """Raise AssertionError for times that go back, or lie outside 0 … `most` seconds."""
    assert np.isfinite(times).all() and (np.diff(times) >= 0).all(), f"times go back: {times}"
    assert len(times) == 0 or (times[0] >= 0 and times[-1] <= most + 1e-6), f"times outside 0 … {most}: {times}"


def films(folder: Path) -> Try:
    """Tries mutated films by both readers."""
    from qwen_vl_streaming.video.frames import PixelBudget, index_video, read_video

    sound, path, budget = sound_films(), folder / "case/film", PixelBudget(28 * 28, 28 * 28 * 12)
    times = {}
    for name, data in sound.items():
        path.write_bytes(data)
        times[name] = index_video(path).times
        numbers = [read_number(frame) for frame in read_video(path, budget=budget, reader="pyav").frames.numpy()]
        if name != "gif" and numbers[:4] != [0, 2, 5, 7]:
            raise AssertionError(f"{name}: frames {numbers[:6]}")

    def try_one(draw: random.Random) -> str:
        name = draw.choice([*sound])
        path.write_bytes(mutate_film(sound[name], draw))
        told, read = [], {}
        for reader in ("pyav", "decord"):
            try:
                index = index_video(path)
                video = read[reader] = read_video(path, budget=budget, reader=reader, max_clips=600)
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, f"not one short line: {error!s:.500}"
                told.append(f"{reader} refuses")
                continue
            check_times(video.timestamps, index.duration)
            assert video.clips <= index.duration / video.seconds_per_clip + 2, (video.clips, index.duration)
            same = len(index.times) == len(times[name]) and np.allclose(index.times, times[name])
            shown = [read_number(frame) for frame in video.frames.numpy()] if same else []
            late = [
                n for n, t in zip(shown, video.timestamps, strict=False) if n is not None and abs(n / FPS - t) > 0.1
            ]
            told.append(f"{reader} reads" + (" with another frame in a frame's place" if late else ""))
        if len(read) == 2:
            one, two = read.values()
            assert np.array_equal(one.timestamps, two.timestamps), "the readers' times differ"
        return ", ".join(told)

    return try_one


def streams(folder: Path) -> Try:
    """Tries mutated films over HTTP on the loopback, with and without their length."""
    from qwen_vl_streaming.video import sources
    from qwen_vl_streaming.video.frames import PixelBudget

    try:
        from qwen_vl_streaming.video.streams import stream_clips
    except ImportError:
        stream_clips = sources.stream_clips
    sound, budget = sound_films(), PixelBudget(28 * 28, 28 * 28 * 12)
    served = {"data": b"", "length": True}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if served["length"]:
                self.send_header("Content-Length", str(len(served["data"])))
            self.end_headers()
            try:
                self.wfile.write(served["data"])
            except OSError:
                return

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def try_one(draw: random.Random) -> str:
        name = draw.choice([*sound])
        served.update(data=mutate_film(sound[name], draw), length=draw.random() < 0.8)
        address = f"http://127.0.0.1:{server.server_port}/film"
        clips = []
        try:
            with closing(stream_clips(address, budget=budget, reconnect_seconds=0.2)) as source:
                for clip in source:
                    clips.append(clip)
                    assert len(clips) <= 600, "more clips than the film has room for"
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, f"not one short line: {error!s:.500}"
            return "refused"
        return "no clip" if not clips else "clips"

    return try_one


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=3_000, help="default: %(default)s")
    parser.add_argument("--streams", type=int, default=1_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", type=int, help="try this one input of each kind that is asked for")
    arguments = parser.parse_args()
    findings = 0
    with tempfile.TemporaryDirectory() as name:
        for what, count in (("films", arguments.films), ("streams", arguments.streams)):
            if count:
                prepare = f"fuzz_films:{what}"
                findings += fuzz(prepare, count, arguments.seed, Path(name) / what, what, arguments.only)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    run(main)
