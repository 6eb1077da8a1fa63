"""Finds bad samples, and counts captions that do not fit their video, before training: from captions and video headers,
without decoding.

A header gives the frame size, and the number of clips to within one. Only where that leaves a doubt are the timestamps
of all frames read. What no header shows is checked, by the same rules, when a sample is first read.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate

import av
from accelerate.utils import gather_object
from qwen_vl_streaming.common.data_rows import TOKENS_PER_SECOND
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.video.container import film_track, may_leap, open_film
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP, SLACK, pick_frames, sampled_rate, too_short
from qwen_vl_streaming.video.index import index_video

from .data import StreamingDataset

FPS = 2.0  # the default of read_video
SECONDS_PER_CLIP = FRAMES_PER_CLIP / FPS
THREADS = 16  # more than cores: on network storage, reading a header is mostly waiting


@dataclass(frozen=True)
class Header:
    """What a video's header says; empty where it cannot be read."""

    clips: tuple[int, ...] = ()
    """The possible numbers of clips."""
    size: tuple[int, int] | None = None
    """Height and width of the frames in pixels."""
    seconds: float = 0.0
    """The duration."""


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
        """One line, empty where no caption counts."""
        low, high = TOKENS_PER_SECOND
        total = self.within + self.fewer + self.more
        if not total:
            return ""
        text = f"captions: {self.within} of {total} have {low:g} to {high:g} tokens per second of video"
        if self.within == total:
            return text
        clips = f" ({self.below_clips} of them less than one per clip)" if self.below_clips else ""
        return f'{text}, {self.fewer} fewer{clips}, {self.more} more: see "Caption lengths" in docs/data.md'


@dataclass
class LateWords:
    """How late the words of samples with times are written, because earlier text has filled the slots."""

    seconds: Counter[float] = field(default_factory=Counter)
    """Numbers of words by the seconds by which they are late, to a millisecond; 0 for those in time."""
    most: int = 0
    """The bound of a slot, in tokens."""

    def add(self, late: Iterable[float]) -> None:
        self.seconds.update(round(seconds, 3) for seconds in late)

    def __str__(self) -> str:
        """One line, empty where no words have times."""
        words, late = self.seconds.total(), {seconds: n for seconds, n in sorted(self.seconds.items()) if seconds > 0}
        if not late:
            return f"times: each of {words:,} words is written in the first slot after its time" if words else ""
        total = sum(late.values())
        reached = dict(zip(late, accumulate(late.values()), strict=True))
        median, high = (next(s for s, n in reached.items() if n >= share * total) for share in (0.5, 0.95))
        return (
            f"times: {total:,} of {words:,} words are late, since a slot has at most {self.most} tokens: by "
            f'{median:.1f} s (median), {high:.1f} s (95%), {max(late):.1f} s (maximum): see "Captions with times" in '
            "docs/data.md"
        )


@dataclass(frozen=True)
class Scan:
    """What is known of the samples before training."""

    bad: dict[int, str]
    """The bad samples by index, each with the reason."""
    captions: CaptionRates
    """Of samples without times."""
    late: LateWords
    """Of samples with times."""


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
    captions, late = CaptionRates(), LateWords(most=samples.max_tokens_per_slot)

    def count(index: int, tokens: int, seconds: float, clips: tuple[int, ...], seconds_per_clip: float) -> None:
        if samples.segments(index) is None:
            captions.add(tokens, seconds, min(clips))
        elif samples.variant.streams:
            late.add(samples.seconds_late(index, sorted(clips)[len(clips) // 2], seconds_per_clip))

    with ThreadPoolExecutor(THREADS) as pool:
        headers = zip(share, pool.map(partial(read_header, samples), share), strict=True)
        doubtful = []
        for index, header in Progress(headers, "checking headers", len(share), **show):
            tokens = count_tokens(samples, index)
            if not header.clips or check_sample(samples, index, header, tokens, header.clips):
                doubtful.append((index, header, tokens))
            else:
                count(index, tokens, header.seconds, header.clips, SECONDS_PER_CLIP)
        counts = pool.map(lambda doubt: count_clips(samples, doubt[0]), doubtful)
        for (index, header, tokens), found in Progress(
            zip(doubtful, counts, strict=True), "checking timestamps", **show
        ):
            if isinstance(found, str):
                reason = found
            else:
                clips, seconds_per_clip, seconds = found
                reason = check_sample(samples, index, header, tokens, clips, seconds_per_clip)
                if not reason or samples.segments(index) is None:
                    count(index, tokens, seconds, clips, seconds_per_clip)
            if reason:
                bad.append((index, reason))
            if len(bad) > enough:
                break
        pool.shutdown(cancel_futures=True)
    all_bad: dict[int, str] = {}
    rates, words = CaptionRates(), LateWords(most=samples.max_tokens_per_slot)
    for some, some_rates, some_words in gather_object([(bad, captions, late)]):
        all_bad.update(some)
        rates.merge(some_rates)
        words.seconds.update(some_words.seconds)
    return Scan(dict(sorted(all_bad.items())), rates, words)


def count_tokens(samples: StreamingDataset, index: int) -> int:
    """The tokens of a caption without `<|im_end|>`, 0 where it has none or cannot be used."""
    try:
        return samples.count_tokens(index) - 1
    except InputError:
        return 0


def check_sample(
    samples: StreamingDataset,
    index: int,
    header: Header,
    tokens: int,
    clips: tuple[int, ...],
    seconds_per_clip: float = SECONDS_PER_CLIP,
) -> str:
    """Why sample `index`, with a caption of `tokens` tokens, is bad with one of these numbers of `clips`; an empty
    string if it is not."""
    try:
        if not tokens:
            samples.count_tokens(index)  # raises
        for count in clips if header.size else ():
            name = f"video {samples.path(index)}"
            height, width = samples.budget.size(*header.size, FRAMES_PER_CLIP * count, name)
            samples.check(index, count, (height // samples.side, width // samples.side), tokens + 1, seconds_per_clip)
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
    seconds = float(min(ends, default=0))
    clips = math.ceil((seconds - SLACK) * FPS / FRAMES_PER_CLIP)
    # A video of about one clip may be shorter than that.
    possible = (clips - 1, clips, clips + 1) if known and clips > 1 else ()
    return Header(possible, size if min(size) > 0 else None, seconds)


def count_clips(samples: StreamingDataset, index: int) -> tuple[tuple[int], float, float] | str:
    """The exact number of clips of a video, and the seconds of each and of the video; or the reason if it is missing,
    broken or shorter than one clip."""
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
    return (math.ceil(len(frames) / FRAMES_PER_CLIP),), FRAMES_PER_CLIP / rate, video.duration
