"""What the headers of videos say, each read once for a run: by the planner, or else by the pre-scan.

A header gives the frame size, and the number of clips to within one. Only where that leaves a doubt are the timestamps
of all frames read.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import av
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.video_part import part_seconds, video_part
from qwen_vl_streaming.video.container import film_track, may_leap, open_film
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP, SLACK, pick_frames, sampled_rate, too_short
from qwen_vl_streaming.video.index import index_video

from .data import StreamingDataset

FPS = 2.0  # the default of read_video
THREADS = 16  # more than cores: on network storage, reading a header is mostly waiting
CHANNEL = "QWENVL_HEADERS"
"""Environment variable: a file without a name, open in the launcher, in which the planner leaves what it has read for
training."""
Count = tuple[tuple[int], float, float] | str
"""The exact number of clips of a video, or of the part that a row names, and the seconds of each and of all; or why it
cannot be used."""


@dataclass(frozen=True)
class Header:
    """What a video's header says; empty where it cannot be read."""

    clips: tuple[int, ...] = ()
    """The possible numbers of clips."""
    size: tuple[int, int] | None = None
    """Height and width of the frames in pixels."""
    seconds: float = 0.0
    """The duration, or that of the part of the video which the row names."""


class Headers:
    """Headers and exact counts by `video_key`. Rows that share a video share its header."""

    def __init__(self, headers: dict[str, Header] | None = None, counts: dict[str, Count] | None = None):
        self.headers, self.counts = headers or {}, counts or {}

    def read(self, samples: StreamingDataset, indices: Iterable[int]) -> Iterator[int]:
        """Reads the headers of these samples that are not known. Yields the index of each sample after that."""
        yield from self._each(self.headers, partial(read_header, samples), samples, indices)

    def count(self, samples: StreamingDataset, indices: Iterable[int]) -> Iterator[int]:
        """Counts the clips of these samples that are not known. Yields the index of each sample after that."""
        yield from self._each(self.counts, partial(count_clips, samples), samples, indices)

    def _each(self, known: dict, look: Callable[[int], object], samples: StreamingDataset, indices) -> Iterator[int]:
        indices = list(indices)
        first = {video_key(samples, index): index for index in reversed(indices)}
        new = [index for path, index in first.items() if path not in known]
        with ThreadPoolExecutor(THREADS) as pool:
            coming = {video_key(samples, index): pool.submit(look, index) for index in reversed(new)}
            try:
                for index in indices:
                    if (path := video_key(samples, index)) not in known:
                        known[path] = coming[path].result()
                    yield index
            finally:
                pool.shutdown(cancel_futures=True)

    def header(self, samples: StreamingDataset, index: int) -> Header:
        return self.headers[video_key(samples, index)]

    def clips(self, samples: StreamingDataset, index: int) -> Count:
        return self.counts[video_key(samples, index)]

    def save(self, path: Path) -> None:
        headers = {name: asdict(header) for name, header in self.headers.items()}
        path.write_text(json.dumps({"headers": headers, "counts": self.counts}), encoding="utf-8")

    @classmethod
    def take(cls, path: Path) -> "Headers":
        """Those that the planner has left in this file, which is emptied; empty where it has left none."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            path.write_text("")
        except (OSError, ValueError):
            return cls()
        headers = {
            name: Header(tuple(one["clips"]), one["size"] and tuple(one["size"]), one["seconds"])
            for name, one in saved["headers"].items()
        }
        counts = {
            name: one if isinstance(one, str) else (tuple(one[0]), one[1], one[2])
            for name, one in saved["counts"].items()
        }
        return cls(headers, counts)


def video_key(samples: StreamingDataset, index: int) -> str:
    """Names the video of a row, or the part of it that the row names."""
    row = samples.rows[index]
    part = video_part(row)
    return json.dumps([row["video_path"], part]) if part else row["video_path"]


def read_header(samples: StreamingDataset, index: int) -> Header:
    try:
        path = samples.path(index)
    except InputError:  # count_clips reports it
        return Header()
    if not os.path.isfile(path):  # opening a pipe would block
        return Header()
    try:
        with open_film(path) as container:
            stream = film_track(container, str(path))
            ends = [stream.duration * stream.time_base] if stream.duration else []
            ends += [container.duration / av.time_base] if container.duration else []
            size = stream.codec_context.height, stream.codec_context.width
            # At a low frame rate, only the timestamps show whether the rate is constant; where timestamps may restart,
            # only they show the duration. If the first frame is late, some formats give the end as the duration.
            late = (stream.start_time or 0) * stream.time_base >= FRAMES_PER_CLIP / FPS
            known = float(stream.average_rate or FPS) >= FPS and not may_leap(container) and not late
    except (av.FFmpegError, OSError, InputError):
        return Header()
    try:
        seconds = part_seconds(path, video_part(samples.rows[index]), float(min(ends, default=0)))
    except InputError:  # count_clips reports it
        return Header()
    clips = math.ceil((seconds - SLACK) * FPS / FRAMES_PER_CLIP)
    # A video of about one clip may be shorter than that.
    possible = (clips - 1, clips, clips + 1) if known and clips > 1 else ()
    return Header(possible, size if min(size) > 0 else None, seconds)


def count_clips(samples: StreamingDataset, index: int) -> Count:
    """The exact number of clips of a video, or of the part that the row names, and the seconds of each and of all; or
    the reason if it is missing, broken or shorter than one clip."""
    try:
        path, part = samples.path(index), video_part(samples.rows[index])
        video = index_video(path)
        seconds = part_seconds(path, part, video.duration)
    except InputError as error:
        return str(error)
    try:
        rate = sampled_rate(video, FPS)
        frames = pick_frames(video.times, video.duration, rate, part.get("start"), part.get("end"))
    except InputError as error:
        return f"video {path}: {error}"
    if frames is None:
        return too_short(f"{'the part of ' if part else ''}video {path}", seconds, rate)
    return (math.ceil(len(frames) / FRAMES_PER_CLIP),), FRAMES_PER_CLIP / rate, seconds
