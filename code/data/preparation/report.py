"""What a run did, as numbers and one picture. Knows nothing about files of samples."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import whole_file
from .rules import BAD, DROPPED, KEPT, Rules

AXES = {"seconds": (0.5, 60), "tokens": (5, 300), "tokens per second": (0.1, 10)}
"""For each distribution the width of a bar and where the last one ends, which takes in all beyond."""


@dataclass
class Tally:
    """What became of the samples of one split."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why samples were bad."""
    bars: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in AXES})
    rows: int = 0
    """Rows written."""
    not_drawn: int = 0
    """Kept, but left out by --max-samples."""
    without_video: int = 0
    """Rows whose video is not there yet."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Rows of each sub-task, where a data set has such."""

    def add(self, outcome: str, seconds: float | None, tokens: int | None, reason: str, by: int = 1) -> None:
        """Count one sample; with `by` -1, take it back."""
        self.outcomes[outcome] += by
        if outcome == BAD:
            self.reasons[short_reason(reason)] += by
        elif seconds:
            self._bar("seconds", seconds, by)
            if tokens is not None:
                self._bar("tokens", tokens, by)
                self._bar("tokens per second", tokens / seconds, by)

    def spoil(self, outcome: str, seconds: float | None, tokens: int | None, reason: str) -> None:
        """A sample that was counted as `outcome` turned out bad."""
        self.add(outcome, seconds, tokens, "", -1)
        self.add(BAD, None, None, reason)

    def _bar(self, name: str, value: float, by: int) -> None:
        width, end = AXES[name]
        self.bars[name][math.floor(min(value, end - width / 2) / width + 1e-9)] += by

    def to_json(self) -> str:
        """The counts of samples, for `add_json`."""
        return json.dumps([self.outcomes, self.reasons, self.bars])

    def add_json(self, text: str) -> None:
        """Count in what another tally's `to_json` gave."""
        outcomes, reasons, bars = json.loads(text)
        self.outcomes.update(outcomes)
        self.reasons.update(reasons)
        for name, heights in bars.items():
            self.bars[name].update({int(bar): height for bar, height in heights.items()})

    def numbers(self) -> dict[str, Any]:
        """For the report: counts by name, most frequent reasons first."""
        others = sorted((+self.outcomes).keys() - {KEPT, BAD, *DROPPED})  # rules of one data set only
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
    """What is wrong, without what is special to one sample, so that it can be counted."""
    return reason.partition(": ")[0]


def draw(tallies: dict[str, Tally], rules: Rules, path: Path) -> None:
    """Write the distributions of seconds, tokens and their ratio to `path` as a PNG, the bounds drawn in."""
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
        "tokens": "caption length (tokens), samples that the cheap rules let through",
        "tokens per second": "tokens ÷ seconds (1/s), the same samples",
    }
    # Tokens are not counted where no rule needs them.
    shown = {name: axis for name, axis in AXES.items() if any(tally.bars[name] for tally in tallies.values())}
    shown = shown or AXES
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, (width, end)) in zip(panels, shown.items(), strict=True):
        base = Counter()
        for split, tally in tallies.items():
            bars = sorted(tally.bars[name])
            heights = [tally.bars[name][bar] for bar in bars]
            left, bottoms = [bar * width for bar in bars], [base[bar] for bar in bars]
            axes.bar(left, heights, width, bottoms, align="edge", label=split)
            base.update(tally.bars[name])
        for bound in (bound for bound in bounds[name] if 0 < bound < math.inf):
            axes.axvline(bound, color="black", linestyle="--", label=f"bound {bound:g}")
        axes.set(xlabel=labels[name], ylabel="samples", xlim=(0, end))
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
