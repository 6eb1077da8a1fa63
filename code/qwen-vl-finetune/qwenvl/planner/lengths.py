"""The lengths of the samples, from captions and video headers, or assumed where the data are not here."""

import math
import random
from dataclasses import dataclass
from functools import cached_property

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP

from ..batches import first_fit
from ..data import StreamingDataset
from ..headers import Headers

TERMINAL = {"delay": 2, "disable": None}
"""Options of a bar that is shown on a terminal only."""
ROW_MULTIPLE = 128
"""Rows are padded to a multiple, as the blocks of FlexAttention."""
MARGIN = 1.05
MOST_READ = 50_000
"""Rows that are read for a plan. Of more, a random sample is: one node reads them, and the others wait."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples that are trained on."""

    tokens: tuple[int, ...]
    """Tokens of each sample, at most."""
    visual: float
    """Visual tokens of a sample, on average."""
    clip: float
    """Visual tokens of a clip, on average."""
    answer: float
    """Answer tokens of a sample, on average."""
    rows: int
    """Samples of the whole data."""
    note: str
    """How they are known."""
    held_out: int = 0
    """Samples of these rows that are held out for evaluation, and not trained on."""

    @cached_property
    def descending(self) -> tuple[int, ...]:
        return tuple(sorted(self.tokens, reverse=True))

    @property
    def longest(self) -> int:
        return self.descending[0]

    @cached_property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def alike(self) -> bool:
        """Whether samples differ so little in length that padding them to one costs little."""
        return self.longest <= MARGIN * self.mean

    def row(self, samples: int) -> int:
        """Tokens of a row that holds any `samples` samples of a batch, a multiple of ROW_MULTIPLE."""
        return math.ceil(sum(self.largest(samples)) / ROW_MULTIPLE) * ROW_MULTIPLE

    def largest(self, samples: int) -> list[int]:
        """Tokens of the largest `samples` samples. Of fewer than that, the largest is repeated."""
        found = list(self.descending[:samples])
        return [self.longest] * (samples - len(found)) + found

    def heaviest(self, samples: int) -> float:
        """How much larger the largest `samples` samples together are than an average batch of as many."""
        return sum(self.largest(samples)) / (samples * self.mean)

    def rows_filled(self, samples: int, tokens: int) -> int:
        """Rows of `tokens` tokens that the largest `samples` samples are packed into."""
        return len(first_fit(self.largest(samples), tokens))


ASSUMED_CLIPS, ASSUMED_CLIP, ASSUMED_ANSWER, ASSUMED_REST = 30, 91, 117, 46


def assumed_lengths(max_length: int, rows: int = 20_000) -> Lengths:
    """Those of the benchmarks, 30 clips of 91 tokens, where the data are not here."""
    tokens = min(ASSUMED_CLIPS * ASSUMED_CLIP + ASSUMED_ANSWER + ASSUMED_REST, max_length)
    visual = ASSUMED_CLIPS * ASSUMED_CLIP
    return Lengths((tokens,), visual, ASSUMED_CLIP, ASSUMED_ANSWER, rows, "assumed: the data or the model are not here")


def find_lengths(samples: StreamingDataset, headers: Headers | None = None) -> Lengths:
    """The lengths of `samples`. Bad samples do not count. What is read is added to `headers`.

    Of more than MOST_READ samples, so many are read, and one of the maximum length is assumed among the others, so that
    a row of any planned length holds each sample, and a batch with one as long.

    Raises InputError where no sample can be read.
    """
    headers, total = headers or Headers(), len(samples)
    read = range(total) if total <= MOST_READ else sorted(random.Random(0).sample(range(total), MOST_READ))
    for _ in Progress(headers.read(samples, read), "reading headers", len(read), **TERMINAL):
        pass
    unknown = [i for i in read if (header := headers.header(samples, i)).size and not header.clips]
    for _ in Progress(headers.count(samples, unknown), "reading timestamps", len(unknown), **TERMINAL):
        pass
    found = []
    for index in read:
        header = headers.header(samples, index)
        if not header.clips or not header.size:
            continue
        try:
            template = samples.template(index)
            if not (tokens := headers.count_tokens(samples, index)):
                continue
            answer = tokens + 1  # and the end of the turn
            # Fewer clips can have larger frames.
            possible = []
            for number in header.clips:
                height, width = samples.budget.size(*header.size, FRAMES_PER_CLIP * number)
                possible.append((number, height * width // samples.pixels_per_token))
            number, clip = max(possible, key=lambda pair: pair[0] * pair[1])
            answer += samples.slot_ends(number)
        except InputError:
            continue
        rest = len(template.prompt) + len(template.tail) + len(template.header)
        length = rest + number * clip + answer
        if min(rest + n * c + answer for n, c in possible) <= samples.max_length:
            found.append((min(length, samples.max_length), number * clip, clip, answer))
    if not found:
        raise InputError(
            f"none of {len(read)} samples can be trained on: their videos cannot be read, or they are longer than "
            f"{samples.max_length} tokens: see --video_root, --model_max_length and --pack_tokens"
        )

    def mean(column: int) -> float:
        return sum(row[column] for row in found) / len(found)

    tokens, note = tuple(row[0] for row in found), "all headers read"
    if len(read) < total:
        tokens += (samples.max_length,)
        note = (
            f"{len(read):,} headers read at random, and one sample of {samples.max_length:,} tokens assumed among the "
            "others: a lower --model_max_length is faster if none is as long"
        )
    return Lengths(tokens, mean(1), mean(2), mean(3), total, note)
