"""The picture that `explain` draws: what happens when, which positions, and what attends to what.

Everything shown comes from timeline, positions and attention. Knows nothing about files.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..timeline.attention import dense_mask
from ..timeline.positions import timeline_positions
from ..timeline.timeline import ANSWER, CLIP, HEADER, PARTS, PROMPT, TAIL, Timeline
from .summary import Span, describe, find_spans, find_steps, sizes, token_names

# Okabe and Ito's palette, which is safe for colour blindness: cold colours for the visual side, warm ones for text.
COLOURS = {PROMPT: "#8C8C8C", CLIP: "#0072B2", TAIL: "#56B4E9", HEADER: "#F0B400", ANSWER: "#D55E00"}
INK, FAINT, FORBIDDEN = "#222222", "#BBBBBB", "#444444"
PALE = 0.3  # share of the colour that is left for a clip's height and width positions
DPI = 120

# Inches, from a panel's left and top edge.
PANEL = (3.95, 7.35)
LEFT, WIDE = 0.78, 2.72
MARGIN = 0.12
ABOVE: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}


def draw_png(timelines: Sequence[Timeline], pace: int) -> bytes:
    """A PNG with one panel per timeline, three per row. On the time axis `pace` tokens take as long as one clip."""
    columns = min(3, len(timelines))
    lines = -(-len(timelines) // columns)
    head = 1.12 if columns > 1 else 1.4
    wide, high = columns * PANEL[0] + 2 * MARGIN, lines * PANEL[1] + head + MARGIN
    figure = Figure(figsize=(wide, high), dpi=DPI)
    _head(figure, timelines)
    longest = max(_times(timeline, pace)[-1][1] for timeline in timelines)
    for at, timeline in enumerate(timelines):
        line, column = divmod(at, columns)
        _Panel(figure, MARGIN + column * PANEL[0], head + line * PANEL[1]).draw(timeline, pace, longest)
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _head(figure: Figure, timelines: Sequence[Timeline]) -> None:
    """Title, sizes and legend."""
    wide, high = figure.get_size_inches()
    several = len(timelines) > 1
    title = "Ways of watching a video and speaking about it" if several else "Watching a video and speaking about it"
    x = (MARGIN + 0.1) / wide
    figure.text(x, 1 - 0.22 / high, title, fontsize=16 if several else 12, weight="bold", color=INK, va="top")
    figure.text(x, 1 - 0.55 / high, sizes(timelines[0]), fontsize=10 if several else 8, color=INK, va="top")
    handles = [Patch(facecolor=colour, label=PARTS[part]) for part, colour in COLOURS.items()]
    handles += [
        Patch(facecolor=_pale(COLOURS[CLIP]), label="height and width of clip"),
        Patch(facecolor="white", edgecolor=FORBIDDEN, hatch="/////", linewidth=0, label="not attended to"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(x, 1 - 0.76 / high),
        ncols=len(handles) if several else 3,
        frameon=False,
        fontsize=10 if several else 8,
        handlelength=1.2,
        handleheight=1.1,
        columnspacing=1.4,
        borderpad=0,
        borderaxespad=0,
    )


def _pale(colour: str) -> tuple[float, float, float]:
    red, green, blue = 1 - PALE * (1 - np.array(to_rgb(colour)))
    return red, green, blue


def _boxes(left, right, low, high) -> Any:
    """Corners of n rectangles: an array (n, 4, 2), which PolyCollection takes, but does not declare."""
    return np.stack([np.stack([left, right, right, left], 1), np.stack([low, low, high, high], 1)], 2)


def _edge(count: int) -> dict:
    """The style of the edges of `count` adjacent blocks. If there are many, they are too small for an edge."""
    return {"edgecolor": "white", "linewidth": 1 if count < 40 else 0}


def _times(timeline: Timeline, pace: int) -> list[tuple[float, float]]:
    """Start and end of each step. A clip takes 1, a token 1 / `pace`."""
    times, now = [], 0.0
    for step in find_steps(timeline):
        lasts = max(1.0 if step.clip else 0.0, (step.stop - step.start) / pace)
        times.append((now, now + lasts))
        now += lasts
    return times


class _Panel:
    """One variant: lanes at the top, positions and mask below. The last two share feed order as their x axis."""

    def __init__(self, figure: Figure, left: float, top: float):
        self.figure, self.left, self.top = figure, left, top

    def axes(self, top: float, high: float, left: float = LEFT, wide: float = WIDE) -> Axes:
        """Axes at a position in inches from the top left corner of the panel."""
        width, height = self.figure.get_size_inches()
        bottom = height - self.top - top - high
        axes = self.figure.add_axes(((self.left + left) / width, bottom / height, wide / width, high / height))
        axes.tick_params(length=0, labelsize=8, colors=INK, pad=3)
        axes.spines[:].set_visible(False)
        return axes

    def draw(self, timeline: Timeline, pace: int, longest: float) -> None:
        when, count, sees = describe(timeline.variant)
        lanes = self.axes(0.6, 0.85)
        title = lanes.annotate(timeline.variant.name, (0, 1), (0, 24), fontsize=15, weight="bold", **ABOVE)
        after: dict[str, Any] = ABOVE | {"xycoords": title}
        lanes.annotate(f"paper: {timeline.variant.paper}", (1, 0), (9, 2), fontsize=9, **after)
        _draw_lanes(lanes, timeline, pace, longest)
        positions = self.axes(2.12, 1.5)
        beside = self.axes(2.12, 1.5, left=LEFT + WIDE + 0.08, wide=0.3)
        _draw_positions(positions, beside, timeline)
        mask = self.axes(4.02, 2.4)
        _draw_mask(mask, timeline)
        for axes, title in ((lanes, when), (positions, count), (mask, sees)):
            axes.annotate(title, (0, 1), (0, 7), fontsize=9.5, color=INK, **ABOVE)


def _draw_lanes(axes: Axes, timeline: Timeline, pace: int, longest: float) -> None:
    """Two lanes over time, with the clips watched and the tokens written, and the slots above them."""
    inches = WIDE / longest
    arrived, times = [], _times(timeline, pace)
    edge = _edge(len(times))
    for step, (start, _) in zip(find_steps(timeline), times, strict=True):
        if step.clip:
            _block(axes, start, 1, 1, COLOURS[CLIP], f"{step.clip}", inches, edge)
            arrived.append(start + 1)
        if step.stop > step.start:
            lasts = (step.stop - step.start) / pace
            _block(axes, start, 0, lasts, COLOURS[ANSWER], token_names(step.start, step.stop), inches, edge)
    if len(arrived) < 20:
        axes.vlines(arrived, -0.5, 2.4, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
    slots = zip(arrived, [*arrived[1:], times[-1][1]], strict=True)
    for slot, (start, end) in enumerate(slots, start=1):
        axes.plot((start + 0.06, end - 0.06), (2, 2), color=FAINT, linewidth=1)
        _label(axes, (start + end) / 2, 2, f"{slot}", (end - start) * inches, color=INK, backgroundcolor="white")
    axes.set_xlim(0, longest)
    axes.set_ylim(-0.55, 2.4)
    axes.set_yticks([2, 1, 0], ["slot", "watching", "speaking"])
    axes.set_xticks(range(0, int(longest) + 1, max(1, round(longest / 10))))
    axes.set_xlabel(f"time (1 = a clip watched or {pace} answer tokens written)", fontsize=7.5, color=INK, labelpad=2)
    axes.axhline(-0.55, color=FAINT, linewidth=1)


def _block(axes: Axes, x: float, lane: int, wide: float, colour: str, label: str, inches: float, edge: dict) -> None:
    axes.add_patch(Rectangle((x, lane - 0.43), wide, 0.86, facecolor=colour, **edge))
    _label(axes, x + wide / 2, lane, label, wide * inches, color="white")


def _label(axes: Axes, x: float, y: float, label: str, room: float, **style) -> None:
    """Centred text, omitted if it needs more than `room` inches."""
    if room > 0.06 * len(label) + 0.05:
        axes.text(x, y, label, fontsize=7.5, ha="center", va="center_baseline", **style)


def _draw_positions(axes: Axes, beside: Axes, timeline: Timeline) -> None:
    """The position of each token in feed order, and beside it the ranges of the visual side and of text."""
    positions = timeline_positions(timeline).numpy()
    part = timeline.rows.part.numpy()
    fold = _Fold(positions)
    feed = np.arange(len(part))
    strong = np.array([to_rgb(COLOURS[p]) for p in range(len(PARTS))])
    pale = np.array([_pale(COLOURS[p]) for p in range(len(PARTS))])
    for axis, colours in ((1, pale), (2, pale), (0, strong)):
        y = fold(positions[axis])
        cells = _boxes(feed, feed + 1, y, y + 1)
        axes.add_collection(PolyCollection(cells, facecolors=colours[part], edgecolors=colours[part], linewidths=0.4))
    spans = find_spans(timeline, by_slot=True)
    edge = _edge(len(spans))
    for each in spans:
        low, high = positions[:, each.start : each.stop].min(), positions[:, each.start : each.stop].max()
        column = int(each.part >= HEADER)
        place = (column + 0.08, fold(low)), 0.84, fold(high) + 1 - fold(low)
        beside.add_patch(Rectangle(*place, facecolor=COLOURS[each.part], **edge))
    top = fold(positions.max()) + 1.5
    for each, across in ((axes, len(part)), (beside, 2)):
        each.set_ylim(-0.5, top)
        each.set_xlim(0, across)
        each.set_yticks([*fold.ticks(positions.max())])
        each.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        each.set_axisbelow(True)
        if fold.hole:
            middle = fold.low + 1 + fold.size / 2
            each.axhspan(fold.low + 1 + fold.size * 0.2, fold.low + 1 + fold.size * 0.8, facecolor="#EEEEEE")
    axes.set_yticks(fold.ticks(positions.max()), [f"{label}" for label in fold.labels(positions.max())])
    if fold.hole:
        axes.text(0.5, middle, f"{fold.hole} positions omitted", fontsize=8, color=INK, va="center_baseline")
    axes.set_ylabel("position", fontsize=8.5, color=INK)
    axes.set_xticks([])
    beside.tick_params(labelleft=False)
    beside.set_xticks([0.5, 1.5], ["visual", "text"], rotation=90, fontsize=7.5)


class _Fold:
    """Shortens the longest range of unused positions. Calling it with positions returns heights."""

    def __init__(self, positions: np.ndarray):
        used = np.unique(positions)
        gaps = np.diff(used)
        at = int(gaps.argmax())
        rest = int(used[-1] - gaps[at])
        self.hole = int(gaps[at]) - 1 if gaps[at] > max(100, rest) else 0
        self.low, self.high = int(used[at]), int(used[at + 1])
        self.size = max(3, rest // 5)

    def __call__(self, positions):
        return positions - (positions > self.low) * (self.hole - self.size) if self.hole else positions

    def labels(self, top: int) -> list[int]:
        """The positions that have a tick."""
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if self(top) / s <= 9)
        if not self.hole:
            return list(range(0, top + 1, step))
        return [*range(0, self.low + 1, step), *range(self.high, top + 1, step)]

    def ticks(self, top: int) -> list[float]:
        return [self(label) + 0.5 for label in self.labels(top)]


def _draw_mask(axes: Axes, timeline: Timeline) -> None:
    """Which token (down) attends to which (across), in the colour of the latter."""
    rows, length = timeline.rows, len(timeline.rows)
    mask = dense_mask(rows.visual[None], rows.text[None], timeline.variant.parallel)[0, 0]
    colours = torch.tensor([to_rgb(COLOURS[part]) for part in range(len(PARTS))]).mul(255).byte()
    image = torch.where(mask[:, :, None], colours[rows.part][None], 255).byte()
    axes.imshow(image.numpy(), extent=(0, length, length, 0), aspect="auto")
    spans = find_spans(timeline, by_slot=False)
    strip = length * 0.018
    # Tokens that were fed earlier and are not attended to are hidden by the variant's rule.
    starts = [each.start for each in spans]
    seen = mask[starts][:, starts].tolist()
    pairs = [(q, k) for at, q in enumerate(spans) for k, sees in zip(spans[:at], seen[at], strict=False) if not sees]
    if pairs:
        hidden = _boxes(*np.array([(k.start, k.stop, q.start, q.stop) for q, k in pairs]).T)
        style = {"facecolors": "white", "edgecolors": FORBIDDEN, "hatch": "/////", "linewidths": 0}
        axes.add_collection(PolyCollection(hidden, **style))
    for each in spans:
        colour = COLOURS[each.part]
        axes.add_patch(Rectangle((-1.6 * strip, each.start), strip, len(each), facecolor=colour, clip_on=False))
        axes.add_patch(Rectangle((each.start, length + 0.6 * strip), len(each), strip, facecolor=colour, clip_on=False))
    if len(spans) < 60:
        axes.hlines(starts[1:], 0, length, color="white", linewidth=0.9)
        axes.vlines(starts[1:], 0, length, color="white", linewidth=0.9)
    above = {"fontsize": 8, "color": "#777777", "ha": "right"}
    axes.text(length * 0.97, length * 0.06, "fed later", va="center", **above)
    if late := next((each for each in spans if each.part == ANSWER and 0 < each.written < each.fed), None):
        # The lanes above show when a token is written; here is when it enters the model.
        note = f"a{late.first} is written in slot {late.written}\nand fed after clip {late.fed}"
        axes.text(length * 0.97, length * 0.12, note, va="top", **above)
    labelled = _spread(spans, length)
    middles = [(each.start + each.stop) / 2 for each in labelled]
    axes.set_yticks(middles, [each.name for each in labelled], fontsize=7.5)
    axes.set_xticks(middles, [each.name for each in labelled], fontsize=7.5, rotation=90)
    axes.tick_params(pad=9)
    axes.set_xlim(0, length)
    axes.set_ylim(length, 0)
    axes.set_ylabel("a token …", fontsize=8.5, color=INK)
    axes.set_xlabel("… attends to (feed order)", fontsize=8.5, color=INK, labelpad=2)


def _spread(spans: Sequence[Span], length: int) -> list[Span]:
    """The spans that have room for a label, longest first."""
    chosen: list[Span] = []
    for each in sorted(spans, key=len, reverse=True):
        if all(abs(each.start + each.stop - other.start - other.stop) > 0.08 * length for other in chosen):
            chosen.append(each)
    return chosen
