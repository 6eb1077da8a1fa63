"""Finds bad samples, and counts captions that do not fit their video, before training: from captions and video headers,
without decoding.

A header gives the frame size, and the number of clips to within one. Only where that leaves a doubt are the timestamps
of all frames read. What no header shows is checked, by the same rules, when a sample is first read.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import av
from accelerate.utils import gather_object
from qwen_vl_streaming.common.data_rows import TOKENS_PER_SECOND
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.common.video_part import part_seconds, video_part
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
    seconds: float = 0.0
    """The duration, or that of the part of the video which the row names."""


@dataclass
class CaptionRates:
    """Numbers of captions by their tokens per second of video. Captions whose video cannot be read do not count."""

    within: int = 0
    """Within TOKENS_PER_SECOND."""
    fewer: int = 0
    more: int = 0
    below_clips: int = 0
    """Of `fewer`: those with fewer tokens than clips."""

    def add(self, tokens: int, seconds: float, clips: int) -> None:
        """Count a caption of `tokens` tokens, without `<|im_end|>`, for a video of `seconds` and at least `clips`."""
        low, high = TOKENS_PER_SECOND
        self.fewer += tokens < low * seconds
        self.more += tokens > high * seconds
        self.within += low * seconds <= tokens <= high * seconds
        self.below_clips += tokens < min(clips, low * seconds)

    def merge(self, other: "CaptionRates") -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def __str__(self) -> str:
        low, high = TOKENS_PER_SECOND
        total = self.within + self.fewer + self.more
        text = f"captions: {self.within} of {total} have {low:g} to {high:g} tokens per second of video"
        if self.within == total:
            return text
        clips = f" ({self.below_clips} of them less than one per clip)" if self.below_clips else ""
        return f'{text}, {self.fewer} fewer{clips}, {self.more} more: see "Caption lengths" in docs/data.md'


@dataclass(frozen=True)
class Scan:
    """What is known of the samples before training."""

    bad: dict[int, str]
    """The bad samples by index, each with the reason."""
    captions: CaptionRates


def scan(
    samples: StreamingDataset, enough: float = math.inf, process: int = 0, processes: int = 1, quiet: bool = True
) -> Scan:
    """Check `samples`. The result is the same on every process.

    Called by all `processes` at once. Each checks its share, and stops after more than `enough` bad samples. The first
    shows progress unless `quiet`.
    """
    share = range(process, len(samples), processes)
    show = {"delay": 2, "disable": quiet or process > 0}
    bad: list[tuple[int, str]] = []
    captions = CaptionRates()
    with ThreadPoolExecutor(THREADS) as pool:
        headers = zip(share, pool.map(partial(read_header, samples), share), strict=True)
        doubtful = []
        for index, header in Progress(headers, "checking headers", len(share), **show):
            tokens = count_tokens(samples, index)
            if not header.clips or check_sample(samples, index, header, tokens, header.clips):
                doubtful.append((index, header, tokens))
            else:
                captions.add(tokens, header.seconds, min(header.clips))
        counts = pool.map(lambda doubt: count_clips(samples, doubt[0]), doubtful)
        for (index, header, tokens), count in Progress(
            zip(doubtful, counts, strict=True), "checking timestamps", **show
        ):
            if isinstance(count, str):
                reason = count
            else:
                clips, seconds_per_clip, seconds = count
                reason = check_sample(samples, index, header, tokens, clips, seconds_per_clip)
                captions.add(tokens, seconds, *clips)
            if reason:
                bad.append((index, reason))
            if len(bad) > enough:
                break
        pool.shutdown(cancel_futures=True)
    found: dict[int, str] = {}
    total = CaptionRates()
    for some, rates in gather_object([(bad, captions)]):
        found.update(some)
        total.merge(rates)
    return Scan(dict(sorted(found.items())), total)


def count_tokens(samples: StreamingDataset, index: int) -> int:
    """The tokens of a caption without `<|im_end|>`, 0 where it has none."""
    try:
        return len(answer_ids(samples.processor, samples.template(index), samples.rows[index]["human_caption"])) - 1
    except InputError:
        return 0


def check_sample(
    samples: StreamingDataset,
    index: int,
    header: Header,
    tokens: int,
    clips: tuple[int, ...],
    seconds_per_clip: float = FRAMES_PER_CLIP / FPS,
) -> str:
    """Why sample `index`, with a caption of `tokens` tokens, is bad with one of these numbers of `clips`; an empty
    string if it is not."""
    template = samples.template(index)
    try:
        if not tokens:
            raise InputError("the caption has no tokens: remove the sample")
        for count in clips if header.size else ():
            name = f"video {samples.path(index)}"
            height, width = samples.budget.size(*header.size, FRAMES_PER_CLIP * count, name)
            samples.check(
                count, (height // samples.side, width // samples.side), template, tokens + 1, seconds_per_clip
            )
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
    try:
        seconds = part_seconds(path, video_part(samples.rows[index]), float(min(ends, default=0)))
    except InputError:  # count_clips reports it
        return Header()
    clips = math.ceil((seconds - SLACK) * FPS / FRAMES_PER_CLIP)
    # A video of about one clip may be shorter than that.
    possible = (clips - 1, clips, clips + 1) if known and clips > 1 else ()
    return Header(possible, size if min(size) > 0 else None, seconds)


def count_clips(samples: StreamingDataset, index: int) -> tuple[tuple[int], float, float] | str:
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
