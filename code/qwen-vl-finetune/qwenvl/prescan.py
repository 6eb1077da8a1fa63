"""Bad samples found before training: what captions, and the headers of videos, tell without decoding anything.

A header says how many clips a video has to within one, and how large they are. Only where that leaves a doubt are the
times of all frames read. What no header tells is checked when a sample is first read, by the same rules.
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
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP, SLACK, pick_frames, sampled_rate, too_short
from qwen_vl_streaming.video.index import film_track, index_video, may_leap

from .data import StreamingDataset

FPS = 2.0  # at which read_video samples by default
THREADS = 16  # more than cores: on a file system over a network each header is waited for


@dataclass(frozen=True)
class Header:
    """What the header of a video says; nothing, where it cannot be read."""

    clips: tuple[int, ...] = ()
    """How many there may be."""
    size: tuple[int, int] | None = None
    """Height and width of the frames."""


def find_bad(
    samples: StreamingDataset, enough: float = math.inf, process: int = 0, processes: int = 1, quiet: bool = True
) -> dict[int, str]:
    """The bad ones among `samples`, by index, each with its reason. The same on every process.

    Called by all `processes` at once, each of which looks at its share, and ends where that holds more than `enough`.
    The first shows how far it is unless `quiet`.
    """
    share = range(process, len(samples), processes)
    show = {"delay": 2, "disable": quiet or process > 0}
    bad: list[tuple[int, str]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        headers = zip(share, pool.map(partial(read_header, samples), share), strict=True)
        doubtful = [
            (index, header)
            for index, header in Progress(headers, "looking at the data", len(share), **show)
            if not header.clips or fault(samples, index, header, header.clips)
        ]
        counts = pool.map(lambda doubt: count_clips(samples, doubt[0]), doubtful)
        for (index, header), count in Progress(zip(doubtful, counts, strict=True), "at some closer", **show):
            if reason := count if isinstance(count, str) else fault(samples, index, header, (count,)):
                bad.append((index, reason))
            if len(bad) > enough:
                break
        pool.shutdown(cancel_futures=True)
    return dict(sorted(gather_object(bad)))


def fault(samples: StreamingDataset, index: int, header: Header, clips: tuple[int, ...]) -> str:
    """Why sample `index` is bad, if it has one of these numbers of `clips`; an empty string where nothing is."""
    template = samples.template(index)
    try:
        answer = len(answer_ids(samples.processor, template, samples.rows[index]["human_caption"]))
        for count in clips if header.size else ():
            height, width = samples.budget.size(*header.size, FRAMES_PER_CLIP * count)
            samples.check(count, height * width // samples.side**2, template, answer)
    except ValueError as error:  # an InputError, or a picture too long for its width
        return str(error)
    return ""


def read_header(samples: StreamingDataset, index: int) -> Header:
    try:
        path = samples.path(index)
    except InputError:  # count_clips says why
        return Header()
    if not os.path.isfile(path):  # a pipe would be waited for
        return Header()
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = film_track(container, str(path))
            ends = [stream.duration * stream.time_base] if stream.duration else []
            ends += [container.duration / av.time_base] if container.duration else []
            size = stream.codec_context.height, stream.codec_context.width
            # Of a slow video only the times of all frames tell whether its rate is steady; where stamps may begin anew,
            # only they tell how long it is. Of what begins late some formats give the end for the length.
            late = (stream.start_time or 0) * stream.time_base >= FRAMES_PER_CLIP / FPS
            known = float(stream.average_rate or FPS) >= FPS and not may_leap(container) and not late
    except (av.FFmpegError, OSError, InputError):
        return Header()
    clips = math.ceil((float(min(ends, default=0)) - SLACK) * FPS / FRAMES_PER_CLIP)
    # A video of hardly a clip may be too short for one.
    return Header((clips - 1, clips, clips + 1) if known and clips > 1 else (), size if min(size) > 0 else None)


def count_clips(samples: StreamingDataset, index: int) -> int | str:
    """Exactly how many clips a video has; the reason where it is missing, broken or shorter than one."""
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
    return math.ceil(len(frames) / FRAMES_PER_CLIP)
