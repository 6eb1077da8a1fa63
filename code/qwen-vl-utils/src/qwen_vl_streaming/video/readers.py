"""Decodes the frames of a video file with PyAV or decord. Does not depend on sampling, clips or frame sizes.

PyAV is the default: it takes no more processor time than decord and, unlike decord, reports which frames are damaged.
decord is available on request.
"""

import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError

from ..common.errors import InputError
from .container import demux, film_track, open_film
from .index import FrameIndex

SLICE_THREADS = "vp7", "vp8"
"""FFmpeg decoders that report damage only with slice threads. With frame threads, or without threads, they return a
damaged frame without an error."""


class ReaderError(Exception):
    """Raised if a reader cannot read a file."""


def check_first_frame(source: str | Path | BinaryIO, name: str) -> None:
    """Decode one frame. Raises InputError with the `name` of the video if this fails."""
    try:
        with open_film(source) as container:
            if next(container.decode(film_track(container, f"video {name}")), None) is None:
                raise InputError(f"video {name} has no frame that can be decoded: download it again or skip it")
    except (FFmpegError, OSError) as error:
        raise InputError(f"video {name} cannot be decoded ({error.strerror}): download it again or skip it") from error


def decoded(path: str | Path, index: FrameIndex, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield the frames of a file up to position `last`, each with its position in `index`. Raises ReaderError if the
    file cannot be read, and InputError if it is damaged."""
    places = None if index.numbers is None else {number: place for place, number in enumerate(index.numbers.tolist())}
    place = -1
    for number, frame in _frames(path, index):
        if places is None:
            place += 1
        elif number in places:
            place = places[number]
        else:
            continue
        if frame.is_corrupt or number in index.damaged:
            raise InputError(
                f"video {path} is damaged: the frame at {index.times[place]:.2f} s is corrupt: "
                "download it again or skip it"
            )
        yield place, frame
        if place >= last:
            return


def _frames(path: str | Path, index: FrameIndex) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """Yield all frames from the decoder, each with the number of its packet."""
    try:
        with open_film(path) as container:
            track = film_track(container, f"video {path}")
            track.thread_type = "SLICE" if track.codec_context.name in SLICE_THREADS else "AUTO"
            delay = track.codec_context.thread_count + 1  # the decoder reports an error at most this many packets late
            skipped = -delay
            for number, packet in enumerate(demux(container, track)):
                if number in index.anew:
                    for frame in track.codec_context.decode(None):
                        yield frame.pts, frame
                    track.codec_context.flush_buffers()
                packet.pts = number  # copied to the frame; `opaque` is meant for this, but deadlocks threaded decoders
                if number in index.skipped:
                    skipped = number
                try:
                    frames = packet.decode()
                except FFmpegError as error:
                    if number - skipped <= delay:
                        continue
                    raise InputError(
                        f"video {path} is damaged ({error.strerror}): download it again or skip it"
                    ) from error
                for frame in frames:
                    yield frame.pts, frame
    except (FFmpegError, OSError) as error:
        raise ReaderError(error.strerror) from error


def read_with_pyav(path: str | Path, index: FrameIndex, picked: np.ndarray) -> Generator[np.ndarray, None, None]:
    """Yield each distinct picked frame once, in order: (H, W, 3) uint8. Raises ReaderError if the file cannot be read,
    and InputError if it is damaged."""
    wanted = sorted(set(picked.tolist()), reverse=True)
    for place, frame in decoded(path, index, wanted[0]):
        if place == wanted[-1]:
            wanted.pop()
            yield upright(frame)
        elif place > wanted[-1]:
            break
    if wanted:
        raise ReaderError(f"the frame at {index.times[wanted[-1]]:.2f} s cannot be decoded")


def read_with_decord(path: str | Path, index: FrameIndex, picked: np.ndarray) -> Generator[np.ndarray, None, None]:
    """Like read_with_pyav, with decord. decord does not report damaged or mirrored frames, so PyAV first decodes the
    file up to the last picked frame to check for them. Raises ReaderError also if decord would give other frames than a
    viewer sees, and InputError if the file is damaged."""
    try:
        import decord
    except ImportError as error:
        raise ReaderError("decord is not installed") from error
    if index.odd:
        raise ReaderError(f"decord cannot read a file with {index.odd}")
    last = int(picked[-1])
    for place, frame in decoded(path, index, last):
        if place == 0 and mirrored(frame):
            raise ReaderError("decord does not mirror frames")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(os.path.abspath(path))
        if len(video) != len(index.times):
            raise ReaderError(f"decord finds {len(video)} of {len(index.times)} frames")
        # decord seeks and skips to wrong frames in open GOPs and some H.264; sequential reading is correct
        wanted = set(picked.tolist())
        for position in range(last + 1):
            image = video.next()
            if position in wanted:
                frame = image.asnumpy()
                if frame.shape[2:] != (3,):  # seen in videos 16, 24, 48 and 72 pixels wide
                    raise ReaderError(f"decord returns frames with {frame.shape[2]} channels")
                yield frame
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration, OSError) as error:
        raise ReaderError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB. Rotates it to the nearest right angle, and mirrors it, as its
    display matrix specifies."""
    image = frame.to_ndarray(format="rgb24")
    a, b, c, d = _matrix(frame)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        right, down = a, d
    else:
        image, right, down = image.transpose(1, 0, 2), c, b
    return image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def mirrored(frame: av.VideoFrame) -> bool:
    a, b, c, d = _matrix(frame)
    return a * d - b * c < 0


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the display matrix: the pixel (x, y) is shown at (ax + cy, bx + dy). The identity if there is
    none."""
    with contextlib.suppress(KeyError):
        side_data: Any = frame.side_data  # a mapping, of which PyAV declares one key
        a, b, c, d = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)[[0, 1, 3, 4]].tolist()
        return a, b, c, d
    return 1, 0, 0, 1


READERS = {"pyav": read_with_pyav, "decord": read_with_decord}
