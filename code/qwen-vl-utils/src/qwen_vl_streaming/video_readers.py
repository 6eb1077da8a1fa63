"""Frame times and decoded frames of a video file, by decord or PyAV. Knows nothing about sampling, clips or sizes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from .errors import InputError

CUT_SHORT = 1.0  # seconds that may be missing of what a container claims: audio and video seldom end together


class ReaderError(Exception):
    """One of the readers cannot read a file; another one may."""


@dataclass(frozen=True)
class FrameIndex:
    """When each frame of a video is shown, found without decoding."""

    pts: np.ndarray
    """(n,) int64, ascending, in the container's time base."""
    times: np.ndarray
    """(n,) float64 seconds from the first frame."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    container: str
    """The container format's names, as FFmpeg writes them."""

    @property
    def fps(self) -> float:
        """The video's own mean rate; 0 for a single frame."""
        return (len(self.times) - 1) / self.times[-1] if len(self.times) > 1 else 0.0


def index_video(source: str | Path | BinaryIO, name: str = "") -> FrameIndex:
    """The frame times of a file, or of a readable object that is called `name` in messages.

    Raises InputError if it is missing, no file, empty, no video, without frames or timestamps, or cut short.
    """
    if isinstance(source, str | Path):
        name = str(source)
        try:
            size = Path(source).stat().st_size if Path(source).is_file() else None
        except OSError as error:  # a path that is too long, or a folder on the way that may not be entered
            raise InputError(f"video {name:.200} cannot be read ({error.strerror}): check its path") from error
        if size is None and Path(source).is_dir():
            raise InputError(f"video {name} is a folder: name a video file in it")
        if size is None and Path(source).exists():
            raise InputError(f"video {name} is a pipe, a socket or a device: write the video to a file, and name that")
        if size is None:
            raise InputError(f"video {name} does not exist: check the path, or put the file there")
        if not size:
            raise InputError(f"video {name} is empty: fetch it again")
    try:
        with _open(source) as container:
            if not container.streams.video:
                raise InputError(f"video {name} has no video stream: fetch it again or leave it out")
            stream = container.streams.video[0]
            shown = [(p.pts, p.duration) for p in container.demux(stream) if p.size and not p.is_discard]
            claims = [stream.duration * stream.time_base] if stream.duration else []
            claims += [container.duration / av.time_base] if container.duration else []
            time_base, container_name = stream.time_base, container.format.name
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"video {name} cannot be opened ({error.strerror}): fetch it again") from error
    if not shown:
        raise InputError(f"video {name} has no frames: fetch it again or leave it out")
    if any(pts is None for pts, _ in shown):
        raise InputError(f"video {name} has frames without timestamps: rewrite it as MP4")
    _, last_duration = max(shown, key=lambda frame: frame[0])
    pts = np.unique([pts for pts, _ in shown])
    times = (pts - pts[0]) * time_base.numerator / time_base.denominator
    if not last_duration and len(pts) > 1:
        last_duration = round((pts[-1] - pts[0]) / (len(pts) - 1))
    duration = float(int(pts[-1] - pts[0] + (last_duration or 0)) * time_base)
    claimed = float(min(claims, default=duration))
    if duration < claimed - CUT_SHORT:
        raise InputError(
            f"video {name} is cut short, {duration:.2f} s of the {claimed:.2f} s it claims: fetch it again"
        )
    return FrameIndex(pts=pts, times=times, duration=duration, container=container_name)


def _open(source: str | Path | BinaryIO) -> av.container.InputContainer:
    """Titles and the like may be in any encoding; they do not matter here."""
    if isinstance(source, str | Path):
        return av.open(str(source), metadata_errors="replace")
    source.seek(0)
    return av.open(source, metadata_errors="replace")


def check_first_frame(source: str | Path | BinaryIO, name: str) -> None:
    """Decode one frame. Raises InputError, calling the video `name`, where that fails."""
    try:
        with _open(source) as container:
            if next(container.decode(video=0), None) is None:
                raise InputError(f"video {name} has no frame that decodes: fetch it again or leave it out")
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"video {name} cannot be decoded ({error.strerror}): fetch it again or leave it out"
        ) from error


def read_with_decord(path: str | Path, index: FrameIndex, picked: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each distinct picked frame once, in order: (H, W, 3) uint8. Raises ReaderError."""
    try:
        import decord
    except ImportError as error:
        raise ReaderError("decord is not installed") from error
    if "mpegts" in index.container:
        raise ReaderError("decord loses the first frames of MPEG-TS")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(str(path))
        if len(video) != len(index.times):
            raise ReaderError(f"decord sees {len(video)} frames of {len(index.times)}")
        # decord's seeking and skipping land on wrong frames in open GOPs and some H.264; reading on never does
        wanted = set(picked.tolist())
        for position in range(int(picked[-1]) + 1):
            image = video.next()
            if position in wanted:
                frame = image.asnumpy()
                if frame.shape[2:] != (3,):  # seen in videos of 16, 24, 48 and 72 columns
                    raise ReaderError(f"decord gives frames of {frame.shape[2]} channels")
                yield frame
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration, OSError) as error:
        raise ReaderError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def read_with_pyav(path: str | Path, index: FrameIndex, picked: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each distinct picked frame once, in order: (H, W, 3) uint8. Raises ReaderError."""
    wanted = sorted(set(index.pts[picked].tolist()), reverse=True)
    try:
        with _open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                if wanted and frame.pts == wanted[-1]:
                    wanted.pop()
                    yield upright(frame)
                if not wanted:
                    return
    except (av.FFmpegError, OSError) as error:
        raise ReaderError(error.strerror) from error
    raise ReaderError(f"{len(wanted)} of its frames do not decode")


def upright(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned the way its container says it is to be shown."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)


READERS = {"decord": read_with_decord, "pyav": read_with_pyav}
