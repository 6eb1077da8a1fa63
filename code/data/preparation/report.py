"""Statistics of a run, as numbers and as one figure. Does not depend on where samples come from."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.files import atomic_write

from .rules import BAD, DROPPED, KEPT, Rules

HISTOGRAMS = {"seconds": (0.5, 60), "tokens": (5, 300), "tokens per second": (0.1, 10)}
"""For each distribution, the width of a bin and the upper edge of the last bin, which also counts larger values."""


@dataclass
class SplitStatistics:
    """Outcomes and distributions of the samples of one split."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why samples were bad, and how many."""
    bins: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in HISTOGRAMS})
    """For each distribution, bin index -> samples."""
    rows: int = 0
    """Rows written."""
    not_drawn: int = 0
    """Samples that passed the rules but were not drawn because of --max-samples."""
    without_video: int = 0
    """Rows whose video file does not exist yet."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Rows of each sub-task, for data sets that have sub-tasks."""

    def add(self, outcome: str, seconds: float | None, tokens: int | None, reason: str, by: int = 1) -> None:
        """Count one sample; `by` -1 removes it again."""
        self.outcomes[outcome] += by
        if outcome == BAD:
            self.reasons[short_reason(reason)] += by
        elif seconds:
            self._add_to_bin("seconds", seconds, by)
            if tokens is not None:
                self._add_to_bin("tokens", tokens, by)
                self._add_to_bin("tokens per second", tokens / seconds, by)

    def mark_bad(self, outcome: str, seconds: float | None, tokens: int | None, reason: str) -> None:
        """Recount a sample as bad that was counted as `outcome`."""
        self.add(outcome, seconds, tokens, "", -1)
        self.add(BAD, None, None, reason)

    def _add_to_bin(self, name: str, value: float, by: int) -> None:
        width, end = HISTOGRAMS[name]
        self.bins[name][math.floor(min(value, end - width / 2) / width + 1e-9)] += by

    def to_json(self) -> str:
        """The counts of samples, as `add_json` reads them."""
        return json.dumps([self.outcomes, self.reasons, self.bins])

    def add_json(self, text: str) -> None:
        """Add the counts that another object's `to_json` returned."""
        outcomes, reasons, bins = json.loads(text)
        self.outcomes.update(outcomes)
        self.reasons.update(reasons)
        for name, heights in bins.items():
            self.bins[name].update({int(index): height for index, height in heights.items()})

    def summary(self) -> dict[str, Any]:
        """The counts for report.json, most frequent reasons first."""
        others = sorted((+self.outcomes).keys() - {KEPT, BAD, *DROPPED})  # rules that only one data set has
        return {
            "samples": sum(self.outcomes.values()),
            "kept": self.outcomes[KEPT],
            "dropped": {rule: self.outcomes[rule] for rule in (*DROPPED, *others)},
            "bad": self.outcomes[BAD],
            "bad_reasons": dict(sorted((+self.reasons).items(), key=lambda item: (-item[1], item[0]))),
            "not_drawn": self.not_drawn,
            "rows": self.rows,
            "rows_without_video": self.without_video,
            **({"tasks": dict(self.tasks)} if self.tasks else {}),
        }


def short_reason(reason: str) -> str:
    """The part of a reason before the colon, which is the same for all samples with this problem."""
    return reason.partition(": ")[0]


def plot(statistics: dict[str, SplitStatistics], rules: Rules, path: Path) -> None:
    """Plot the distributions of seconds, tokens and tokens per second, with the bounds of `rules`, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    bounds = {
        "seconds": (rules.min_seconds, rules.max_seconds),
        "tokens": (),
        "tokens per second": (rules.min_tokens_per_second, rules.max_tokens_per_second),
    }
    labels = {
        "seconds": "video duration (s), all readable samples",
        "tokens": "caption length (tokens), samples within the duration and prefix rules",
        "tokens per second": "tokens ÷ seconds (1/s), the same samples",
    }
    # Tokens are counted only if a rule needs them.
    shown = {name: axis for name, axis in HISTOGRAMS.items() if any(split.bins[name] for split in statistics.values())}
    shown = shown or HISTOGRAMS
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, (width, end)) in zip(panels, shown.items(), strict=True):
        base = Counter()
        for split, found in statistics.items():
            indices = sorted(found.bins[name])
            heights = [found.bins[name][index] for index in indices]
            left, bottoms = [index * width for index in indices], [base[index] for index in indices]
            axes.bar(left, heights, width, bottoms, align="edge", label=split)
            base.update(found.bins[name])
        for bound in (bound for bound in bounds[name] if 0 < bound < math.inf):
            axes.axvline(bound, color="black", linestyle="--", label=f"bound {bound:g}")
        axes.set(xlabel=labels[name], ylabel="samples", xlim=(0, end))
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
