"""Finds bad samples, and counts captions that do not fit their video, before training: from captions and video headers,
without decoding.

What no header shows is checked, by the same rules, when a sample is first read.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from accelerate.utils import gather_object
from qwen_vl_streaming.common.data_rows import TOKENS_PER_SECOND
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP

from .data import StreamingDataset
from .headers import Header, Headers


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
        words, late = self.seconds.total(), sorted(seconds for seconds in self.seconds.elements() if seconds > 0)
        if not late:
            return f"times: each of {words:,} words is written in the first slot after its time" if words else ""
        median, high = (late[math.ceil(share * len(late)) - 1] for share in (0.5, 0.95))
        return (
            f"times: {len(late):,} of {words:,} words are late, since a slot has at most {self.most} tokens: by "
            f'{median:.1f} s (median), {high:.1f} s (95%), {late[-1]:.1f} s (maximum): see "Captions with times" in '
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
    samples: StreamingDataset,
    enough: float = math.inf,
    process: int = 0,
    processes: int = 1,
    quiet: bool = True,
    known: Headers | None = None,
) -> Scan:
    """Check `samples`. The result is the same on every process.

    Called by all `processes` at once. Each checks its share, and stops after more than `enough` bad samples. The first
    shows progress unless `quiet`. What is `known` is not read again.
    """
    share = range(process, len(samples), processes)
    show = {"delay": 2, "disable": quiet or process > 0}
    bad: list[tuple[int, str]] = []
    captions, late = CaptionRates(), LateWords(most=samples.max_tokens_per_slot)

    def count(index: int, tokens: int, header: Header) -> None:
        if samples.segments(index) is None:
            captions.add(tokens, header.seconds, min(header.clips))
        elif samples.variant.streams:
            clips = sorted(header.clips)[len(header.clips) // 2]
            late.add(samples.seconds_late(index, clips, header.seconds_per_clip))

    headers = known or Headers()
    doubtful: dict[int, int] = {}  # tokens of the caption by sample
    for index in Progress(headers.read(samples, share), "checking headers", len(share), **show):
        header, tokens = headers.header(samples, index), headers.count_tokens(samples, index)
        if not header.clips or check_sample(samples, index, header, tokens):
            doubtful[index] = tokens
        else:
            count(index, tokens, header)
    for index in Progress(headers.count(samples, doubtful), "checking timestamps", len(doubtful), **show):
        header, tokens = headers.header(samples, index), doubtful[index]
        reason = header.problem or check_sample(samples, index, header, tokens)
        if not header.problem and (not reason or samples.segments(index) is None):
            count(index, tokens, header)
        if reason:
            bad.append((index, reason))
        if len(bad) > enough:
            break
    all_bad: dict[int, str] = {}
    rates, words = CaptionRates(), LateWords(most=samples.max_tokens_per_slot)
    for some, some_rates, some_words in gather_object([(bad, captions, late)]):
        all_bad.update(some)
        rates.merge(some_rates)
        words.seconds.update(some_words.seconds)
    return Scan(dict(sorted(all_bad.items())), rates, words)


def check_sample(samples: StreamingDataset, index: int, header: Header, tokens: int) -> str:
    """Why sample `index`, with a caption of `tokens` tokens, is bad with one of the header's numbers of clips; an empty
    string if it is not."""
    try:
        if not tokens:
            samples.count_tokens(index)  # raises
        if not header.size:
            return ""
        video = f"video {samples.path(index)}"  # looked up once
        for clips in header.clips:
            height, width = samples.budget.size(*header.size, FRAMES_PER_CLIP * clips, video)
            grid = height // samples.side, width // samples.side
            samples.check(index, clips, grid, tokens + 1, header.seconds_per_clip)
    except InputError as error:
        return str(error)
    return ""
