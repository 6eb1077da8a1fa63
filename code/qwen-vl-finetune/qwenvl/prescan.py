"""Finds bad samples before training, from captions and video headers, without decoding.

A header gives the frame size, and the number of clips to within one. Only where that leaves a doubt are the timestamps
of all frames read. What no header shows is checked, by the same rules, when a sample is first read.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import av
from accelerate.utils import gather_object
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.model.prompts import answer_ids
from qwen_vl_streaming.video.container import film_track, may_leap, open_film
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP, SLACK, pick_frames, sampled_rate, too_short
from qwen_vl_streaming.video.index import index_video

from .data import StreamingDataset

FPS = 2.0  # the default of read_video
THREADS = 16  # more than cores: on network storage, reading a header is mostly waiting


@dataclass(frozen=True)
class Header:
    """What a video's header says; empty where it cannot be read."""

    clips: tuple[int, ...] = ()
    """The possible numbers of clips."""
    size: tuple[int, int] | None = None
    """Height and width of the frames in pixels."""


def find_bad(
    samples: StreamingDataset, enough: float = math.inf, process: int = 0, processes: int = 1, quiet: bool = True
) -> dict[int, str]:
    """The bad samples by index, each with the reason. The same on every process.

    Called by all `processes` at once. Each checks its share, and stops after more than `enough` bad samples. The first
    shows progress unless `quiet`.
    """
    share = range(process, len(samples), processes)
    show = {"delay": 2, "disable": quiet or process > 0}
    bad: list[tuple[int, str]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        headers = zip(share, pool.map(partial(read_header, samples), share), strict=True)
        doubtful = [
            (index, header)
            for index, header in Progress(headers, "checking headers", len(share), **show)
            if not header.clips or check_sample(samples, index, header, header.clips)
        ]
        counts = pool.map(lambda doubt: count_clips(samples, doubt[0]), doubtful)
        for (index, header), count in Progress(zip(doubtful, counts, strict=True), "checking timestamps", **show):
            if reason := count if isinstance(count, str) else check_sample(samples, index, header, *count):
                bad.append((index, reason))
            if len(bad) > enough:
                break
        pool.shutdown(cancel_futures=True)
    return dict(sorted(gather_object(bad)))


def check_sample(
    samples: StreamingDataset,
    index: int,
    header: Header,
    clips: tuple[int, ...],
    seconds_per_clip: float = FRAMES_PER_CLIP / FPS,
) -> str:
    """Why sample `index` is bad with one of these numbers of `clips`; an empty string if it is not."""
    template = samples.template(index)
    try:
        answer = len(answer_ids(samples.processor, template, samples.rows[index]["human_caption"]))
        for count in clips if header.size else ():
            name = f"video {samples.path(index)}"
            height, width = samples.budget.size(*header.size, FRAMES_PER_CLIP * count, name)
            samples.check(count, (height // samples.side, width // samples.side), template, answer, seconds_per_clip)
    except InputError as error:
        return str(error)
    return ""


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
    clips = math.ceil((float(min(ends, default=0)) - SLACK) * FPS / FRAMES_PER_CLIP)
    # A video of about one clip may be shorter than that.
    return Header((clips - 1, clips, clips + 1) if known and clips > 1 else (), size if min(size) > 0 else None)


def count_clips(samples: StreamingDataset, index: int) -> tuple[tuple[int], float] | str:
    """The exact number of clips of a video and the seconds of each, or the reason if it is missing, broken or shorter
    than one clip."""
    try:
        path = samples.path(index)
        video = index_video(path)
    except InputError as error:
        return str(error)
    try:
        rate = sampled_rate(video, FPS)
        frames = pick_frames(video.times, video.duration, rate, None, None)
    except InputError as error:
        return f"video {path}: {error}"
    if frames is None:
        return too_short(f"video {path}", video.duration, rate)
    return (math.ceil(len(frames) / FRAMES_PER_CLIP),), FRAMES_PER_CLIP / rate
