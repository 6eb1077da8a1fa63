"""Decoded frames of a video file, by PyAV or decord. Knows nothing about sampling, clips or sizes.

PyAV is the default. It takes no more processor time than decord and, unlike it, says which frames are damaged; decord
is there for who asks for it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from ..common.errors import InputError
from .index import FrameIndex, demux, film_track, open_film

SLICE_THREADS = "vp7", "vp8"
"""Decoders of FFmpeg that report damage only with slice threads: with frame threads, or none, they give a damaged
picture as a sound one."""


class ReaderError(Exception):
    """A reader cannot read a file."""


def check_first_frame(source: str | Path | BinaryIO, name: str) -> None:
    """Decode one frame. Raises InputError, calling the video `name`, where that fails."""
    try:
        with open_film(source) as container:
            if next(container.decode(film_track(container, f"video {name}")), None) is None:
                raise InputError(f"video {name} has no frame that decodes: download it again or leave it out")
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"video {name} cannot be decoded ({error.strerror}): download it again or leave it out"
        ) from error


def decoded(path: str | Path, index: FrameIndex, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of a file up to the `last`, each with its position in `index`. Raises ReaderError, InputError for
    damage."""
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
                f"video {path} is damaged: its frame at {index.times[place]:.2f} s is corrupt: "
                "download it again or leave it out"
            )
        yield place, frame
        if place >= last:
            return


def _frames(path: str | Path, index: FrameIndex) -> Iterator[tuple[int, av.VideoFrame]]:
    """All frames that the decoder gives, each with the number of its packet."""
    try:
        with open_film(path) as container:
            track = film_track(container, f"video {path}")
            track.thread_type = "SLICE" if track.codec_context.name in SLICE_THREADS else "AUTO"
            delay = track.codec_context.thread_count + 1  # packets after which an error is reported at most
            skipped = -delay
            for number, packet in enumerate(demux(container, track)):
                if number in index.anew:
                    for frame in track.codec_context.decode(None):
                        yield frame.pts, frame
                    track.codec_context.flush_buffers()
                packet.pts = number  # handed on to its frame; `opaque`, made for this, locks up decoders with threads
                if number in index.skipped:
                    skipped = number
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if number - skipped <= delay:
                        continue
                    raise InputError(
                        f"video {path} is damaged ({error.strerror}): download it again or leave it out"
                    ) from error
                for frame in frames:
                    yield frame.pts, frame
    except (av.FFmpegError, OSError) as error:
        raise ReaderError(error.strerror) from error


def read_with_pyav(path: str | Path, index: FrameIndex, picked: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each distinct picked frame once, in order: (H, W, 3) uint8. Raises ReaderError, InputError for damage."""
    wanted = sorted(set(picked.tolist()), reverse=True)
    for place, frame in decoded(path, index, wanted[0]):
        if place == wanted[-1]:
            wanted.pop()
            yield upright(frame)
        elif place > wanted[-1]:
            break
    if wanted:
        raise ReaderError(f"its frame at {index.times[wanted[-1]]:.2f} s does not decode")


def read_with_decord(path: str | Path, index: FrameIndex, picked: np.ndarray) -> Iterator[np.ndarray]:
    """As read_with_pyav. What decord does not say, which is whether frames are damaged or mirrored, PyAV is asked for
    first. Raises ReaderError, also where decord would give other frames than a viewer sees; InputError for damage."""
    try:
        import decord
    except ImportError as error:
        raise ReaderError("decord is not installed") from error
    if index.odd:
        raise ReaderError(f"decord cannot read a file with {index.odd}")
    last = int(picked[-1])
    for place, frame in decoded(path, index, last):
        if place == 0 and mirrored(frame):
            raise ReaderError("decord does not mirror pictures")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(os.path.abspath(path))
        if len(video) != len(index.times):
            raise ReaderError(f"decord sees {len(video)} frames of {len(index.times)}")
        # decord's seeking and skipping land on wrong frames in open GOPs and some H.264; reading on never does
        wanted = set(picked.tolist())
        for position in range(last + 1):
            image = video.next()
            if position in wanted:
                frame = image.asnumpy()
                if frame.shape[2:] != (3,):  # seen in videos of 16, 24, 48 and 72 columns
                    raise ReaderError(f"decord gives frames of {frame.shape[2]} channels")
                yield frame
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration, OSError) as error:
        raise ReaderError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def upright(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned and mirrored the way its container says it is to be shown, to the
    nearest right angle."""
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
    """a, b, c, d of the display matrix: a pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    with contextlib.suppress(KeyError):
        data = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
        return tuple(data[[0, 1, 3, 4]].tolist())
    return 1, 0, 0, 1


READERS = {"pyav": read_with_pyav, "decord": read_with_decord}
