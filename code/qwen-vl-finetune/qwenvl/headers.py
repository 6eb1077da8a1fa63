"""What the headers of videos contain and how long captions are, each read once for a run: by the planner, or else by
the pre-scan.

A header gives the frame size, and the number of clips to within one. Only where that leaves a doubt are the timestamps
of all frames read.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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
SECONDS_PER_CLIP = FRAMES_PER_CLIP / FPS
THREADS = 16  # more than cores: on network storage, reading a header is mostly waiting
CHANNEL = "QWENVL_HEADERS"
"""Environment variable: a file without a name, open in the launcher, in which the planner leaves what it has read for
training."""


@dataclass(frozen=True)
class Header:
    """What is known of a video, or of the part of it that a row names; empty where its header cannot be read."""

    clips: Sequence[int] = ()
    """The possible numbers of clips; the exact one after the timestamps have been read."""
    size: Sequence[int] | None = None
    """Height and width of the frames in pixels."""
    seconds: float = 0.0
    """The duration."""
    seconds_per_clip: float = SECONDS_PER_CLIP
    problem: str | None = None
    """Why the video cannot be used, empty if it can; None before the timestamps have been read."""


class Headers:
    """Headers by `video_key`, and tokens of captions by the index of their row among all rows. Rows that share a video
    share its header."""

    def __init__(self, headers: dict[str, Header] | None = None, tokens: dict[int, int] | None = None):
        self.headers, self.tokens = headers or {}, tokens or {}

    def count_tokens(self, samples: StreamingDataset, index: int) -> int:
        """The tokens of a caption without `<|im_end|>`, 0 where it has none or cannot be used."""
        if index not in self.tokens:
            try:
                self.tokens[index] = samples.count_tokens(index) - 1
            except InputError:
                self.tokens[index] = 0
        return self.tokens[index]

    def read(self, samples: StreamingDataset, indices: Iterable[int]) -> Iterator[int]:
        """Reads the headers of these samples that are not known. Yields the index of each sample after that."""
        return self._each(samples, indices, partial(read_header, samples), lambda key: key not in self.headers)

    def count(self, samples: StreamingDataset, indices: Iterable[int]) -> Iterator[int]:
        """Counts the clips of these samples, whose headers are known, from timestamps that are not. Yields the index of
        each sample after that."""

        def count(index: int) -> Header:
            return count_clips(samples, index, self.header(samples, index))

        return self._each(samples, indices, count, lambda key: self.headers[key].problem is None)

    def _each(
        self,
        samples: StreamingDataset,
        indices: Iterable[int],
        look: Callable[[int], Header],
        unknown: Callable[[str], bool],
    ) -> Iterator[int]:
        keys = {index: video_key(samples, index) for index in indices}
        first: dict[str, int] = {}
        for index, key in keys.items():
            first.setdefault(key, index)
        with ThreadPoolExecutor(THREADS) as pool:
            coming = {key: pool.submit(look, index) for key, index in first.items() if unknown(key)}
            try:
                for index, key in keys.items():
                    if key in coming:
                        self.headers[key] = coming.pop(key).result()
                    yield index
            finally:
                pool.shutdown(cancel_futures=True)

    def header(self, samples: StreamingDataset, index: int) -> Header:
        return self.headers[video_key(samples, index)]

    def save(self, path: Path) -> None:
        headers = {key: asdict(header) for key, header in self.headers.items()}
        path.write_text(json.dumps({"headers": headers, "tokens": list(self.tokens.items())}), encoding="utf-8")

    @classmethod
    def take(cls, path: Path) -> "Headers":
        """Those that the planner has left in this file, which is emptied; empty where it has left none."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            path.write_text("")
        except (OSError, ValueError):
            return cls()
        headers = {key: Header(**header) for key, header in saved["headers"].items()}
        return cls(headers, {index: tokens for index, tokens in saved["tokens"]})


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


def count_clips(samples: StreamingDataset, index: int, header: Header) -> Header:
    """`header` with the exact number of clips and seconds of each, or with the problem of a video that is missing,
    broken or shorter than one clip."""
    try:
        path, part = samples.path(index), video_part(samples.rows[index])
        video = index_video(path)
        seconds = part_seconds(path, part, video.duration)
    except InputError as error:
        return replace(header, problem=str(error))
    try:
        rate = sampled_rate(video, FPS)
        frames = pick_frames(video.times, video.duration, rate, part.get("start"), part.get("end"))
    except InputError as error:
        return replace(header, problem=f"video {path}: {error}")
    if frames is None:
        return replace(header, problem=too_short(f"{'the part of ' if part else ''}video {path}", seconds, rate))
    return Header((math.ceil(len(frames) / FRAMES_PER_CLIP),), header.size, seconds, FRAMES_PER_CLIP / rate, problem="")
