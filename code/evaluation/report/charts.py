"""Bar charts of metrics by variant, laid out for the page's template. Knows nothing about HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator
from qwen_vl_streaming.timeline.variants import VARIANTS, Variant

from report import paper
from report.loading import Result, metrics_of
from report.tables import schedule_pairs

WIDTH, LEFT, BAR, GAP, BETWEEN, AXIS = 360, 96, 13, 3, 11, 38
CHARACTER = 6.2  # approximate width of a character in a value's label
AXES = {
    "Fluency": "Fluency, 1 to 5",
    "AL": "AL, clips (seconds)",
    "LAAL": "LAAL, clips (seconds)",
    "early_words": "words per video",
}
ABOUT = {
    "CIDEr": "Similarity to the reference, by weighted n-grams. Higher is better.",
    "BLEU-1": "Share of single words that are in the reference. Higher is better.",
    "BLEU-4": "Share of 4-word sequences that are in the reference. Higher is better.",
    "METEOR": "Match with the reference, with stems and synonyms. Higher is better.",
    "ROUGE-L": "Longest word sequence shared with the reference. Higher is better.",
    "BLEURT": "Similarity to the reference, by a trained model. Higher is better.",
    "Fluency": "Grade of an LLM judge, without the reference. Higher is better.",
    "AL": "Average lag behind an even pace. Lower is earlier.",
    "LAAL": "As AL, without a reward for long captions. Lower is earlier.",
    "early_words": "Words written before the last clip arrived. Higher is earlier.",
}
"""What a chart shows, in a sentence or two."""
Panel = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    variant: Variant
    kind: str
    """Its colour: fixed, random, other or paper."""
    title: str
    value: float
    mark: str = ""
    """What distinguishes it from other bars of its variant and kind."""

    @property
    def text(self) -> str:
        return f"{self.value:.2f}" + (f" ({self.mark})" if self.mark else "")


def main_panels(results: Sequence[Result], task: str, size: str) -> list[Panel]:
    """A panel for each metric with values: ours with fixed schedules (or others if there is no fixed one), and the
    paper's."""
    shown = [
        result
        for result in results
        if result.kind == "fixed"
        or not any(other.variant is result.variant and other.kind == "fixed" for other in results)
    ]
    panels = []
    for metric in metrics_of(results):
        bars = our_bars(shown, metric)
        if bars:
            theirs = [(variant, paper.figure(task, size, variant.name, metric)) for variant in VARIANTS.values()]
            bars += [
                Bar(variant, "paper", f"{variant.name}, paper, {size}", value) for variant, value in theirs if value
            ]
            panels.append(panel(metric, bars))
    return panels


def schedule_panels(results: Sequence[Result]) -> list[Panel]:
    """A panel for each metric with values for random schedules: fixed and random."""
    both = list({result.path: result for pair in schedule_pairs(results) for result in pair if result}.values())
    panels = []
    for metric in metrics_of(results):
        bars = our_bars(both, metric)
        if any(bar.kind == "random" for bar in bars):
            panels.append(panel(metric, bars))
    return panels


def our_bars(results: Sequence[Result], metric: str) -> list[Bar]:
    bars = []
    for result in results:
        value, _ = result.score(metric)
        alike = [other for other in results if (other.variant, other.kind) == (result.variant, result.kind)]
        names = ("schedule", "size", "seed")
        differ = [name for name in names if len({getattr(other, name) for other in alike}) > 1]
        mark = ", ".join(f"seed {result.seed}" if name == "seed" else getattr(result, name) for name in differ)
        kind = result.kind if result.kind in ("fixed", "random") else "other"
        if value is not None:
            title = f"{result.variant.name}, {result.schedule}, {result.size}, {result.model_name}"
            bars.append(Bar(result.variant, kind, title, value, mark))
    return bars


def panel(metric: str, bars: Sequence[Bar]) -> Panel:
    """The chart of one metric for the template: horizontal `bars`, at least one, grouped by variant in the order of the
    paper's tables. Lengths are in units of the SVG."""
    low, high = min(0, *(bar.value for bar in bars)), max(0, *(bar.value for bar in bars))
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high or 1)
    right = 8 + CHARACTER * max(len(bar.text) for bar in bars)
    step = (WIDTH - LEFT - right) / (ticks[-1] - ticks[0])

    def x(value: float) -> float:
        return round(LEFT + (value - ticks[0]) * step, 1)

    placed, names, y = [], [], BETWEEN / 2
    for variant in VARIANTS.values():
        group = [bar for bar in bars if bar.variant is variant]
        if not group:
            continue
        top = y
        for bar in group:
            left, width = min(x(0), x(bar.value)), round(abs(x(bar.value) - x(0)), 1)
            placed.append((left, y, width, left + width + 4, bar))
            y += BAR + GAP
        names.append((round((top + y - GAP) / 2, 1), variant))
        y += BETWEEN - GAP
    axis = AXES.get(metric, f"{metric} × 100" if metric in paper.METRICS else metric)
    return {
        "metric": metric,
        "about": ABOUT.get(metric, ""),
        "axis": axis,
        "width": WIDTH,
        "height": round(y + AXIS),
        "floor": round(y),
        "thickness": BAR,
        "zero": x(0),
        "ticks": [(x(tick), f"{tick:g}") for tick in ticks],
        "bars": placed,  # (x, y, width, x of the label, bar)
        "names": names,  # (y of the center, variant)
    }
