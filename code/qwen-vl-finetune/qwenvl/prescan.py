"""Finds bad samples, and counts captions that do not fit their video, before training: from captions and video headers,
without decoding.

What no header shows is checked, by the same rules, when a sample is first read.
"""

import math
from dataclasses import asdict, dataclass

from accelerate.utils import gather_object
from qwen_vl_streaming.common.data_rows import TOKENS_PER_SECOND
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.model.prompts import answer_ids
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP

from .data import StreamingDataset
from .headers import FPS, Header, Headers


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
    captions = CaptionRates()
    headers = known or Headers()
    doubtful: dict[int, int] = {}  # tokens of the caption by sample
    for index in Progress(headers.read(samples, share), "checking headers", len(share), **show):
        header, tokens = headers.header(samples, index), count_tokens(samples, index)
        if not header.clips or check_sample(samples, index, header, tokens, header.clips):
            doubtful[index] = tokens
        else:
            captions.add(tokens, header.seconds, min(header.clips))
    for index in Progress(headers.count(samples, doubtful), "checking timestamps", len(doubtful), **show):
        count, tokens = headers.clips(samples, index), doubtful[index]
        if isinstance(count, str):
            reason = count
        else:
            clips, seconds_per_clip, seconds = count
            reason = check_sample(samples, index, headers.header(samples, index), tokens, clips, seconds_per_clip)
            captions.add(tokens, seconds, *clips)
        if reason:
            bad.append((index, reason))
        if len(bad) > enough:
            break
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
