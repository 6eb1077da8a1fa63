"""The report's tables, in the paper's layout, with the paper's values in separate rows; and as Markdown.

A missing value is shown as a dash with a footnote that says why, never as zero. Knows nothing about HTML.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from metrics.timing import NAMES
from qwen_vl_streaming.common.numbers import is_number
from qwen_vl_streaming.timeline.variants import VARIANTS

from report import paper
from report.differences import labels, not_comparable
from report.loading import Result, metrics_of, score_in, without_folders

NOT_GIVEN = "no result file of this variant was given"
NOT_IN_PAPER = "not in the paper"
LAGS = ("AL", "LAAL")
MISSING = {
    "delay_median": "no event was named after it began",
    "delay_95": "no event was named after it began",
    "words_per_quiet_second": "the videos have no quiet stretches",
}
"""Why a value of timeliness is missing."""


@dataclass(frozen=True)
class Cell:
    text: str
    note: int = 0
    """The footnote's number, from 1; 0 for none."""


@dataclass(frozen=True)
class Line:
    group: str
    """Offline or Streaming, or the metric."""
    name: str
    """The paper's name of the method, or what the line shows."""
    ours: str
    """The variant's name in this project."""
    source: str
    """Where the values come from."""
    paper: bool
    cells: list[Cell]


@dataclass
class Table:
    title: str
    heads: list[str]
    """Heads of the columns before the values; the first is that of the group."""
    columns: list[str]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cell(self, value: float | None, reason: str = "", form: str = ".2f") -> Cell:
        """A cell with `value` in this format, or a dash, with a footnote if there is a `reason`."""
        if value is not None:
            return Cell(format(round(value, 2) + 0.0, form))  # + 0.0: no -0.00
        if not reason:
            return Cell("-")
        if reason not in self.notes:
            self.notes.append(reason)
        return Cell("-", self.notes.index(reason) + 1)


def main_table(results: Sequence[Result], task: str, size: str) -> Table:
    """Metrics by variant, with the rows of the paper's first table: our values above the paper's. `results` are of one
    task."""
    title, _ = paper.TASKS.get(task, (task, ""))
    metrics = metrics_of(results)
    table = Table(title, ["", "Method", "Variant", "Source"], metrics)
    label = labels(results)
    known = any(key[0] == task for key in paper.FIGURES)
    for variant in VARIANTS.values():
        group, method = variant.mode, variant.method
        mine = [result for result in results if result.variant is variant]
        for result in mine:
            cells = [table.cell(*result.score(metric)) for metric in metrics]
            table.lines.append(Line(group, method, variant.name, f"ours: {label[result.path]}", False, cells))
        if not mine and known:
            cells = [table.cell(None, NOT_GIVEN) for _ in metrics]
            table.lines.append(Line(group, method, variant.name, "ours", False, cells))
        if known:
            theirs = [paper.figure(task, size, variant.name, metric) for metric in metrics]
            cells = [table.cell(value, NOT_IN_PAPER) for value in theirs]
            table.lines.append(Line(group, method, variant.name, f"paper: {size}", True, cells))
    return table


def subtask_table(results: Sequence[Result]) -> Table | None:
    """The scores of each sub-task, whose means are in the main table; None if there are none."""
    metrics = metrics_of(results)
    table = Table("By sub-task", ["Result", "Sub-task", "", "Videos"], metrics)
    label = labels(results)
    for result in results:
        group = f"{result.variant.paper} ({result.variant.name}), {label[result.path]}"
        for name, scores in result.subtasks.items():
            cells = [table.cell(*score_in(scores, metric)) for metric in metrics]
            table.lines.append(Line(group, name, "", str(scores.get("count", "-")), False, cells))
    return table if table.lines else None


def schedule_pairs(results: Sequence[Result]) -> list[tuple[Result | None, Result | None]]:
    """All pairs (fixed, random) of results of the same streaming variant, checkpoint, precision of its weights and K;
    empty without a random one."""
    streaming = [result for result in results if result.variant.streams and result.kind in ("fixed", "random")]
    if not any(result.kind == "random" for result in streaming):
        return []
    groups: dict[tuple, dict[str, list[Result]]] = {}
    unknown = {result.model for result in streaming if result.checkpoint == result.model}  # in earlier versions
    for result in streaming:
        checkpoint = result.model if result.model in unknown else result.checkpoint
        key = result.variant.name, checkpoint, result.weights, result.k
        groups.setdefault(key, {}).setdefault(result.kind, []).append(result)
    return [
        pair for group in groups.values() for pair in product(group.get("fixed", [None]), group.get("random", [None]))
    ]


def schedule_table(results: Sequence[Result], task: str, size: str) -> Table | None:
    """Fixed and random schedules: the paper's second table, for all metrics, beside the paper's values if they are of
    `size`; None without random schedules."""
    pairs = schedule_pairs(results)
    if not pairs:
        return None
    label = labels(results)
    ks = {(fixed or random).k for fixed, random in pairs}
    many = Counter((fixed or random).variant.name for fixed, random in pairs)
    columns = []
    shared = Counter(fixed.path for fixed, _ in pairs if fixed)
    for fixed, random in pairs:
        one = random if fixed and random and shared[fixed.path] > 1 else fixed or random
        extra = f", {label[one.path]}" if many[one.variant.name] > 1 or len(ks) > 1 else ""
        columns.append(f"{one.variant.method} ({one.variant.name}{extra})")
    table = Table("Fixed and random schedules", ["Metric", "Schedule", "", "Source"], columns)
    both = [result for pair in pairs for result in pair if result]
    printed = (task, size) == ("description", paper.RANDOM_SIZE)
    for metric in metrics_of(results):
        if all(result.score(metric)[0] is None for result in both):
            continue
        rows: dict[str, list[Cell]] = {"fixed": [], "random": [], "difference": []}
        for fixed, random in pairs:
            values = []
            for kind, result, other in (("fixed", fixed, random), ("random", random, fixed)):
                value, reason = (
                    result.score(metric) if result else (None, f"no {kind} result file beside {other.path.name}")
                )
                values.append(value)
                rows[kind].append(table.cell(value, reason))
            reason = not_comparable(fixed, random)
            there = None not in values and not reason
            difference = values[1] - values[0] if there else None
            rows["difference"].append(table.cell(difference, "" if None in values else reason, "+.2f"))
        for kind, cells in rows.items():
            name = f"{kind}, K = {min(ks)}" if kind != "difference" and len(ks) == 1 else kind
            table.lines.append(Line(metric, name, "", "ours", False, cells))
        if metric == paper.RANDOM_METRIC and printed:
            add_paper(table, pairs)
    if printed and not any(line.paper for line in table.lines):
        add_paper(table, pairs)
    return table


def add_paper(table: Table, pairs) -> None:
    """The paper's rows, which are only given for BLEURT at 3B."""
    for kind, values in paper.RANDOM.items():
        cells = [table.cell(values.get((fixed or random).variant.name), NOT_IN_PAPER) for fixed, random in pairs]
        source = f"paper: {paper.RANDOM_SIZE}"
        table.lines.append(Line(paper.RANDOM_METRIC, f"{kind}, K = 3", "", source, True, cells))


def timeliness_table(results: Sequence[Result]) -> Table | None:
    """When the captions say what happens, for each result in which that was measured; None if there is none."""
    shown = [result for result in results if result.timeliness]
    table = Table("When it speaks", ["", "Method", "Variant", "Source"], [*NAMES.values(), *LAGS])
    label = labels(results)
    for result in shown:
        found = result.timeliness
        reason = f"not computed: {without_folders(str(found['not_computed']))}" if "not_computed" in found else ""
        cells = []
        for key in NAMES:
            value = float(found[key]) if is_number(found.get(key)) else None
            form = ".0f" if key == "events" else ".2f"
            cells.append(table.cell(value, reason or MISSING.get(key, "not computed"), form))
        cells += [table.cell(*result.score(metric)) for metric in LAGS]
        variant = result.variant
        source = f"ours: {label[result.path]}"
        table.lines.append(Line(variant.mode, variant.method, variant.name, source, False, cells))
    return table if shown else None


def runs_table(results: Sequence[Result]) -> list[list[str]]:
    """Heads, then a row for each result file."""
    heads = ["File", "Variant", "Schedule", "Model", "Size", "Trained", "Commit", "Training data", "Data", "Videos"]
    heads += ["Skipped", "Seconds per video"]
    rows = [heads]
    for result in results:
        seconds = [row["seconds"] for row in result.rows.values()]
        skipped = result.scores.get("skipped", "-")
        rows.append(
            [
                result.path.name,
                result.variant.name,
                result.schedule + (f", seed {result.seed}" if result.seed else ""),
                result.model_name,
                f"{result.size}, {result.weights} weights" if result.weights else result.size,
                result.trained,
                result.commit,
                result.training_data,
                result.data,
                str(len(result.rows)),
                str(skipped),
                f"{sum(seconds) / len(seconds):.2f}",
            ]
        )
    return rows


def markdown_table(table: Table) -> str:
    kept = [column for column, head in enumerate(table.heads) if head or column == 0]
    lines = [
        "| " + " | ".join(map(plain, [*(table.heads[column] for column in kept), *table.columns])) + " |",
        "|" + " --- |" * len(kept) + " ---: |" * len(table.columns),
    ]
    before = None
    for line in table.lines:
        heads = [line.group if line.group != before else "", line.name, line.ours, line.source]
        cells = [f"{cell.text}{f'<sup>{cell.note}</sup>' if cell.note else ''}" for cell in line.cells]
        values = [f"*{cell}*" if line.paper else cell for cell in cells]
        lines.append("| " + " | ".join([*(plain(heads[column]) for column in kept), *values]) + " |")
        before = line.group
    notes = [f"<sup>{number}</sup> {plain(note)}  " for number, note in enumerate(table.notes, 1)]
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "") + "\n"


def plain(text: str) -> str:
    """`text` on one line, escaped for Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))
