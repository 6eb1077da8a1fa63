"""The lengths of the samples, from captions and video headers, or assumed where the data are not here."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.video.frames import FRAMES_PER_CLIP

from ..data import StreamingDataset
from ..prescan import THREADS, Header, count_clips, read_header

MOST_SCANNED = 2_000
"""Rows that are read; of more rows, a random sample of this many."""
ROW_MULTIPLE = 128
"""Rows are padded to a multiple, as the blocks of FlexAttention."""
DRAWS = 4_096
"""Random batches that are drawn to find the row that holds all."""
MARGIN = 1.05


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples that are trained on."""

    tokens: tuple[int, ...]
    """Tokens of each sample that was looked at, at most."""
    visual: float
    """Visual tokens of a sample, on average."""
    clip: float
    """Visual tokens of a clip, on average."""
    answer: float
    """Answer tokens of a sample, on average."""
    rows: int
    """Samples of the whole data."""
    longest: int
    """No sample is longer. The maximum length where not all were looked at."""
    note: str
    """How they are known."""

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def alike(self) -> bool:
        """Whether samples differ so little in length that padding them to one costs little."""
        return self.longest <= MARGIN * self.mean

    def row(self, samples: int) -> int:
        """Tokens of a row that holds any `samples` samples of a batch, a multiple of ROW_MULTIPLE."""
        most = largest_batch(self.tokens, samples)
        bound = samples * self.longest if samples == 1 else min(samples * self.longest, int(MARGIN * most))
        return math.ceil(max(bound, self.longest) / ROW_MULTIPLE) * ROW_MULTIPLE


@cache
def largest_batch(tokens: tuple[int, ...], samples: int) -> int:
    """Tokens of the largest of DRAWS random batches, the same at each call."""
    draw = random.Random(0)
    return max(sum(draw.choices(tokens, k=samples)) for _ in range(DRAWS))


ASSUMED_CLIPS, ASSUMED_CLIP, ASSUMED_ANSWER, ASSUMED_REST = 30, 91, 117, 46


def assumed_lengths(max_length: int, rows: int = 20_000) -> Lengths:
    """Those of the benchmarks, 30 clips of 91 tokens, where the data are not here."""
    tokens = min(ASSUMED_CLIPS * ASSUMED_CLIP + ASSUMED_ANSWER + ASSUMED_REST, max_length)
    visual = ASSUMED_CLIPS * ASSUMED_CLIP
    return Lengths(
        (tokens,), visual, ASSUMED_CLIP, ASSUMED_ANSWER, rows, tokens, "assumed: the data or the model are not here"
    )


def find_lengths(samples: StreamingDataset, seed: int = 0) -> tuple[Lengths, dict[int, Header]]:
    """The lengths of `samples`, and the headers that were read, by index. Bad samples do not count.

    Raises InputError where no sample can be read.
    """
    total = len(samples)
    chosen = range(total) if total <= MOST_SCANNED else sorted(random.Random(seed).sample(range(total), MOST_SCANNED))
    with ThreadPoolExecutor(THREADS) as pool:
        headers = dict(zip(chosen, pool.map(partial(read_header, samples), chosen), strict=True))
        unknown = [index for index, header in headers.items() if header.size and not header.clips]
        counts = dict(zip(unknown, pool.map(partial(count_clips, samples), unknown), strict=True))
    found = []
    for index, header in headers.items():
        count = counts.get(index)
        clips = max(header.clips) if header.clips else count[0][0] if isinstance(count, tuple) else 0
        if not clips or not header.size:
            continue
        try:
            template = samples.template(index)
            answer = samples.count_tokens(index)
            # Fewer clips can have larger frames.
            possible = []
            for number in header.clips or (clips,):
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
            f"none of {len(headers)} samples can be trained on: their videos cannot be read, or they are longer than "
            f"{samples.max_length} tokens: see --video_root, --model_max_length and --pack_tokens"
        )

    def mean(column: int) -> float:
        return sum(row[column] for row in found) / len(found)

    tokens = tuple(row[0] for row in found)
    complete = len(headers) == total
    note = "all headers read" if complete else f"by a sample of {len(headers):,} of them"
    return Lengths(
        tokens, mean(1), mean(2), mean(3), total, max(tokens) if complete else samples.max_length, note
    ), headers
