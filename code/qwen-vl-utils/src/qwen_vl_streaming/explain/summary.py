"""Summarizes a timeline: spans of tokens of one kind, and what is done at the same time. Knows nothing about how it is
shown."""

from dataclasses import dataclass

from ..timeline.timeline import ANSWER, CLIP, PARTS, Timeline
from ..timeline.variants import Variant


@dataclass(frozen=True)
class Span:
    """Consecutive tokens in feed order of one part, one clip and, if requested, one slot."""

    part: int
    clip: int
    """As in `Rows`."""
    start: int
    stop: int
    """Feed indices, `stop` not included."""
    first: int
    """The index, within its part, of the first token."""
    written: int
    """The slot that wrote the first token; 0 for the prompt and the visual side."""
    fed: int
    """The slot in which the span enters the model: the number of clips that have arrived by then."""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        if self.part == ANSWER:
            return token_names(self.first, self.first + len(self))
        return f"clip {self.clip}" if self.part == CLIP else PARTS[self.part]


def token_names(start: int, stop: int) -> str:
    """The name of answer tokens `start` to `stop`, `stop` not included: a3, or a3–5."""
    return f"a{start}" if stop - start == 1 else f"a{start}–{stop - 1}"


def find_spans(timeline: Timeline, by_slot: bool) -> list[Span]:
    """The spans of a timeline in feed order. With `by_slot`, the tokens of two slots are two spans."""
    rows = timeline.rows
    changed = (rows.part[1:] != rows.part[:-1]) | (rows.clip[1:] != rows.clip[:-1])
    if by_slot:
        changed |= rows.slot[1:] != rows.slot[:-1]
    starts = [0, *(changed.nonzero().squeeze(1) + 1).tolist()]
    fed = rows.clip.cummax(0).values
    return [
        Span(int(rows.part[a]), int(rows.clip[a]), a, b, int(rows.index[a]), int(rows.slot[a]), int(fed[a]))
        for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)
    ]


@dataclass(frozen=True)
class Step:
    """What is done at the same time: a clip is watched, answer tokens are written, or both."""

    clip: int
    """1…N, or 0 if no clip is watched."""
    start: int
    stop: int
    """The answer tokens written, `stop` not included."""


def find_steps(timeline: Timeline) -> list[Step]:
    """The steps of a timeline, in order.

    The tokens of slot i attend to clips 1…i. A parallel variant therefore writes them while clip i+1 is watched, any
    other variant between the two clips.
    """
    steps, stop = [], 0
    written = []
    for count in timeline.counts:
        written.append((stop, stop + count))
        stop += count
    if timeline.variant.parallel:
        steps = [Step(1, 0, 0), *(Step(clip, *span) for clip, span in enumerate(written[:-1], start=2))]
        steps.append(Step(0, *written[-1]))
    else:
        steps = [step for clip, span in enumerate(written, start=1) for step in (Step(clip, 0, 0), Step(0, *span))]
    return [step for step in steps if step.clip or step.stop > step.start]


def describe(variant: Variant) -> tuple[str, str, str]:
    """Describes when a variant watches and speaks, how it counts positions, and what clips attend to."""
    if variant.parallel:
        when, sees = "watches and speaks at the same time", "clips and tail never attend to text"
    elif variant.streams:
        when, sees = "watches and speaks in turn", "clips attend to the text before them"
    else:
        when, sees = "watches the whole video, then speaks", "all text comes after the video"
    counts = {
        "stock": "text continues after the video",
        "own": f"text has its own count, from {variant.text_start}",
        "feed": "one count for clips and text",
        "rounds": "text and the next clip start together",
    }
    return when, counts[variant.count], sees


def sizes(timeline: Timeline) -> str:
    """The number of tokens of each part."""
    layout, (rows, columns) = timeline.layout, timeline.layout.grid
    return (
        f"{len(timeline.rows)} tokens: prompt {layout.prompt}, clips {timeline.clips} × ({rows} × {columns}), "
        f"tail {layout.tail}, header {layout.header}, answer {sum(timeline.counts)}"
    )
