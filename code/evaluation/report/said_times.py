"""Event time against said time, one panel per result: laid out for the page's template, and drawn as a PNG.

A point is an event, high above the diagonal if it was named late. On or below it, and up to a clip above it, the event
was named before a frame of it had arrived: such points have a colour of their own.
Events that were never named are on the line at the top. Events at the same place are one larger point. Knows nothing
about HTML and about how an event is found in a caption.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from metrics.timing import read_points
from qwen_vl_streaming.common.files import atomic_write
from text import counted

from report.loading import Result

Points = Sequence[tuple[float, float | None, bool]]
"""(time, said, early) of each event, times in seconds; `said` is None if it was never named."""

SIDE, LEFT, RIGHT, TOP, BOTTOM = 260, 42, 8, 26, 40
"""Of a panel's plot, in units of the SVG, and the space around it."""
INSET = 8
"""How far the zero of both axes is from the edge of the plot, so that points there do not cover the labels."""
BINS = 60
"""Places along an axis: events closer than that are one point."""
LARGEST, SMALLEST = 9.0, 1.8
"""Radius of the largest and smallest point."""
NEVER = 13
"""How far the line of events that were never named is above the plot."""
INK, LATE, EARLY, NEVER_COLOUR = "#222222", "#0072B2", "#D55E00", "#8C8C8C"
DPI = 160


@dataclass(frozen=True)
class Place:
    """Events with the same two times, in seconds."""

    time: float
    said: float | None
    early: bool
    count: int

    @property
    def kind(self) -> str:
        """named, early or never: its colour."""
        if self.said is None:
            return "never"
        return "early" if self.early else "named"

    @property
    def title(self) -> str:
        said = "never named" if self.said is None else f"said at {self.said:.3g} s"
        return f"{counted(self.count, 'event')} at {self.time:.3g} s, {said}"


def places_of(points: Points, longest: float) -> list[Place]:
    """Events at the same place together. Times are rounded to the width of a bin, unless few of them differ."""
    width = longest / BINS
    if len({time for time, _, _ in points}) > BINS:
        points = [(moved(time, said, width), said, early) for time, said, early in points]
    counted = sorted(Counter(points).items(), key=lambda item: -item[1])  # the small ones are drawn over the large ones
    return [Place(*point, count) for point, count in counted]


def moved(time: float, said: float | None, width: float) -> float:
    """`time` at the nearest multiple of `width` on its side of the diagonal."""
    nearest = round(time / width) * width
    if said is None:
        return nearest
    return max(nearest, said) if said <= time else min(nearest, math.nextafter(said, 0))


def radius(count: int, most: int) -> float:
    return max(SMALLEST, LARGEST * math.sqrt(count / max(most, 8)))


def said_panels(results: Sequence[Result], names: Sequence[str]) -> list[dict[str, Any]]:
    """A panel for each result with timeliness, with its name. Raises InputError for unreadable events."""
    shown = [(name, result) for name, result in zip(names, results, strict=True) if "events" in result.timeliness]
    every = [read_points(result.path, result.timeliness.get("points")) for _, result in shown]
    ticks = ticks_of(every)
    placed = [places_of(points, ticks[-1]) for points in every]
    most = largest_count(placed)
    return [said_panel(name, places, ticks, most) for (name, _), places in zip(shown, placed, strict=True)]


def ticks_of(every: Sequence[Points]) -> list[float]:
    """The ticks of both axes of all panels, in seconds."""
    longest = max([1.0, *(value for points in every for point in points for value in point[:2] if value is not None)])
    return [float(tick) for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True).tick_values(0, longest)]


def largest_count(panels: Sequence[Sequence[Place]]) -> int:
    """Of all panels: equal points are equally many events."""
    return max((place.count for places in panels for place in places), default=1)


def said_panel(title: str, places: Sequence[Place], ticks: Sequence[float], most: int) -> dict[str, Any]:
    """The panel of one result for the template. Lengths are in units of the SVG."""
    end = ticks[-1]

    def x(time: float) -> float:
        return round(LEFT + INSET + (SIDE - INSET) * time / end, 1)

    def y(said: float | None) -> float:
        return round(TOP - NEVER if said is None else TOP + (SIDE - INSET) * (1 - said / end), 1)

    return {
        "title": title,
        "width": LEFT + SIDE + RIGHT,
        "height": TOP + SIDE + BOTTOM,
        "left": LEFT,
        "right": LEFT + SIDE,
        "top": TOP,
        "floor": TOP + SIDE,
        "never": y(None),
        "points": [(x(place.time), y(place.said), round(radius(place.count, most), 1), place) for place in places],
        "x_ticks": [(x(tick), f"{tick:g}") for tick in ticks],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in ticks],
        "diagonal": (x(0), y(0), x(end), y(end)),  # x1, y1, x2, y2
    }


def draw_picture(files: Sequence[tuple[str, Path]], path: Path) -> None:
    """Draw the panels of `files`, (title, result file), side by side as a PNG file. Raises InputError for unreadable
    events, and if the file cannot be written."""
    every = [read_points(file) for _, file in files]
    ticks = ticks_of(every)
    end = ticks[-1]
    placed = [places_of(points, end) for points in every]
    most = largest_count(placed)
    columns = min(len(files), 3)
    rows = -(-len(files) // columns)
    figure = Figure(figsize=(max(4.6, 3.1 * columns), 3.5 * rows + 0.3), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = {"named": LATE, "early": EARLY, "never": NEVER_COLOUR}
    texts = {"named": "named after it began", "early": "named before", "never": "never named"}
    never, margin = 1.06 * end, 0.03 * end
    for axis, (title, _), points, places in zip(axes.flat, files, every, placed, strict=False):
        for kind, colour in colours.items():
            mine = [place for place in places if place.kind == kind]
            if not mine:
                continue
            axis.scatter(
                [place.time for place in mine],
                [never if place.said is None else place.said for place in mine],
                s=[3.2 * radius(place.count, most) ** 2 for place in mine],
                color=colour,
                alpha=0.75,
                linewidths=0,
                clip_on=False,
                zorder=3,
            )
        axis.plot([0, end], [0, end], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.text(-0.07 * end, never, "never", ha="right", va="center", fontsize=8.5, color=INK)
        share = 100 * np.mean([said is not None and not early and said - time <= 3 for time, said, early in points])
        axis.set_title(f"{title}\n{share:.0f}% named within 3 s", fontsize=9.5, color=INK, pad=22)
        axis.set(xlim=(-margin, end), ylim=(-margin, end), xticks=ticks, yticks=ticks, aspect="equal")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8.5)
        axis.grid(color="#EBEBEB", linewidth=0.7)
        axis.set_axisbelow(True)
    for axis in axes.flat[len(files) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("said at, seconds", fontsize=9, color=INK)
    for axis in axes[-1]:
        axis.set_xlabel("event at, seconds", fontsize=9, color=INK)
    handles = [
        figure.axes[0].scatter([], [], s=30, color=colours[kind], label=texts[kind], linewidths=0) for kind in colours
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")
