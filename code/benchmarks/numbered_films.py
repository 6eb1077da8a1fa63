"""Videos of twelve formats in which every frame shows its own number, and the numbers that decoded frames show."""

import contextlib
import io
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
from mutators import mutate_bytes

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
    """Draw `number` as black and white bars, lowest bit on the left; (height, width, 3) uint8."""
    bits = (number >> np.arange(BARS)) & 1
    row = np.repeat(bits, SIZE[0] // BARS).astype(np.uint8) * 255
    return np.broadcast_to(row[None, :, None], (SIZE[1], SIZE[0], 3)).copy()


def read_number(frame: np.ndarray) -> int | None:
    """Read the number of a frame (3, H, W); None if it does not show black and white bars."""
    columns = np.array_split(frame.astype(float).mean(axis=0), BARS, axis=1)
    means = np.array([column[:, column.shape[1] // 4 : -column.shape[1] // 4].mean(axis=1) for column in columns])
    light = means.mean(axis=1) > 127
    clear = np.abs(means - 255 * light[:, None]).max() < 60
    return int((light << np.arange(BARS)).sum()) if clear else None


def make_film(container: str, codec: str, pixels: str, options: dict[str, str]) -> bytes:
    """Encode a video of SECONDS seconds at FPS numbers per second."""
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


def valid_films() -> dict[str, bytes]:
    """One video of each of FILMS."""
    return {name: make_film(*settings) for name, settings in FILMS.items()}


def mutate_film(data: bytes, draw: random.Random) -> bytes:
    """Mutate the head, the tail or any bytes, or truncate the video."""
    how = draw.randrange(4)
    if how == 0:
        at = min(draw.choice([64, 512, 4096]), len(data))
        return mutate_bytes(data[:at], draw) + data[at:]
    if how == 1:
        at = max(len(data) - draw.choice([512, 2048]), 0)
        return data[:at] + mutate_bytes(data[at:], draw)
    if how == 2 and draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    return mutate_bytes(data, draw, max_changes=8)


def decoded_numbers(film: Path) -> list[tuple[float, int | None]]:
    """The time in seconds, relative to the first, and the number of each frame that FFmpeg decodes without errors."""
    import av

    found = []
    with av.open(str(film), metadata_errors="replace") as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                found += [frame for frame in packet.decode() if not (frame.is_corrupt or frame.time is None)]
    pictures = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in found]
    first = min((frame.time for frame in found), default=0)
    return [(frame.time - first, read_number(picture)) for frame, picture in zip(found, pictures, strict=True)]
