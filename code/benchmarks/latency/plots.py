"""Plots of the results of latency.py: measured speed-up, two lanes for each mode, delays, a long stream.

Reads only JSON files. Knows nothing about models and needs no GPU.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from qwen_vl_streaming.common.errors import InputError

from latency.floors import speed_up
from latency.lanes import CLIP, MOVE, TOKEN, TOWER
from latency.setup import read_json
from latency.sweep import BETWEEN, SHARE, best

# The palette of Okabe and Ito is safe for colour-blind readers. Marker shapes distinguish the sizes.
COLORS = {"serial": "#8C8C8C", "fused": "#D55E00", "pipelined": "#0072B2"}
MARKERS = {"3B": "o", "7B": "s", "tiny": "^"}
KINDS = {TOWER: "#56B4E9", CLIP: "#0072B2", MOVE: "#009E73", TOKEN: "#D55E00"}
INK, FAINT = "#222222", "#D0D0D0"
THIN = 0.005
"""Bars of a lane have a white edge if they are longer than this share of the time axis."""
DPI = 160
WIDE = 9.0  # inches; about the width at which a README shows images, so that font sizes match its text


def figure_of(high: float, columns: int = 1, rows: int = 1, **options):
    """A figure that is `high` inches high, and its axes, as matplotlib's `subplots` returns them."""
    figure = Figure(figsize=(WIDE, high), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for each in np.atleast_1d(axes).flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(colors=INK, labelsize=9)
        each.grid(color="#EBEBEB", linewidth=0.7)
        each.set_axisbelow(True)
    return figure, axes


def plot_sweep(files: list[dict], path: Path) -> None:
    """Figure 6 of the paper with measured values, one column for each mode. The upper panel shows the speed-up over
    serial against r, with S(r); the lower panel shows the share of S(r). Marks of 8-bit weights are hollow. Points with
    r = 0 are skipped, because the axis of r is logarithmic."""
    points = [(model_of(data["about"]), point) for data in files for point in data["points"].values() if point.get("r")]
    modes = [
        mode for mode in ("pipelined", "fused") if any(best(point, mode, "share") is not None for _, point in points)
    ]
    if not modes:
        raise InputError("the sweep has no point of fused or pipelined yet: run it first")
    figure, panels = figure_of(6.2, len(modes), 2, sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    ratios = [point["r"] for _, point in points]
    low, high = min(*ratios, BETWEEN[0]) / 1.3, max(*ratios, BETWEEN[1]) * 1.3
    line = np.geomspace(low, high, 400)
    theory = np.array([speed_up(r) for r in line])
    within = (line >= BETWEEN[0]) & (line <= BETWEEN[1])
    dashed = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    models = sorted({model for model, _ in points})
    for column, mode in enumerate(modes):
        above, below = panels[:, column]
        above.plot(line, theory, color=INK, linewidth=1.6, zorder=1)
        above.plot(line[within], SHARE * theory[within], **dashed)
        below.axhline(100, color=INK, linewidth=1.6, zorder=1)
        below.plot(BETWEEN, [100 * SHARE] * 2, **dashed)
        for model in models:
            mine = [point for its, point in points if its == model and best(point, mode, "share") is not None]
            r = np.array([point["r"] for point in mine])
            expected = np.array([speed_up(each) for each in r])
            share = np.array([best(point, mode, "share") for point in mine])
            plain = model[1] == ""
            style = {
                "marker": MARKERS[model[0]],
                "s": 26,
                "facecolor": COLORS[mode] if plain else "none",
                "edgecolor": "white" if plain else COLORS[mode],
                "linewidth": 0.8 if plain else 1.2,
            }
            above.scatter(r, share * expected, **style, zorder=2)
            below.scatter(r, 100 * share, **style, zorder=2)
        above.set_title(mode, fontsize=11, color=COLORS[mode], weight="bold")
        below.set_xlabel("r = perception / generation time of a round", fontsize=9.5, color=INK)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xlim(low, high)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
            axes.axvspan(*BETWEEN, color="#F4F4F4", zorder=0)
    panels[0, 0].set_ylabel("speed-up over serial", fontsize=9.5, color=INK)
    panels[0, 0].set_ylim(bottom=min(0.9, panels[0, 0].get_ylim()[0]))
    panels[1, 0].set_ylabel("share of S(r), %", fontsize=9.5, color=INK)
    mark = {"color": INK, "linestyle": "none", "markersize": 5.5}
    handles = [
        Line2D([], [], color=INK, linewidth=1.6, label="S(r) = (1 + r) / max(1, r)"),
        Line2D([], [], label=f"{SHARE:.0%} of S(r), r from 1/4 to 4", **dashed),
        *(
            Line2D([], [], marker=MARKERS[size], fillstyle="none" if kind else "full", label=f"{size}{kind}", **mark)
            for size, kind in models
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def model_of(about: dict) -> tuple[str, str]:
    """The size of the model that was measured, and what to write behind it: its kind of 8-bit weights, if any."""
    kind = about.get("weights")
    return about["size"], f", {kind} weights" if kind else ""


def plot_lanes(data: dict, path: Path) -> None:
    """A few rounds of each mode on one time axis: perception above, generation below."""
    modes = data["lanes"]
    figure, axes = figure_of(0.9 + 1.05 * len(modes))
    longest = max(mine["slots"][data["first"] - 1 + data["shown"]] for mine in modes) * 1e3
    ticks, labels = [], []
    drawn: set[str] = set()
    for number, mine in enumerate(modes):
        top = -2.9 * number
        for lane, name in ((0, "perception"), (-1, "generation")):
            ticks.append(top + lane)
            labels.append(name)
            axes.axhspan(top + lane - 0.42, top + lane + 0.42, color="#F6F6F6", zorder=0)
        for each in mine["intervals"]:
            begin, end = (1e3 * each[edge] for edge in ("begin", "end"))
            shared = CLIP in each["kinds"] and TOKEN in each["kinds"]
            for kind in each["kinds"]:
                bars = [(max(begin, 0), min(end, longest) - max(begin, 0))]
                if bars[0][1] <= 0:
                    continue
                drawn.add(kind)
                place = (top - (kind == TOKEN) - 0.36, 0.72)
                # A white edge would hide very short bars.
                edge = "white" if bars[0][1] > THIN * longest else KINDS[kind]
                axes.broken_barh(bars, place, facecolor=KINDS[kind], edgecolor=edge, linewidth=0.5, zorder=2)
                if shared:
                    axes.broken_barh(
                        bars, place, facecolor="none", edgecolor="white", hatch="////", linewidth=0, zorder=3
                    )
        for slot, at in enumerate(mine["slots"], 1):
            if -1e-9 <= 1e3 * at <= longest * 1.001:
                axes.vlines(1e3 * at, top - 1.45, top + 0.5, color=INK, linewidth=1, zorder=4)
                axes.text(1e3 * at, top + 0.55, f" slot {slot}", fontsize=7.5, color=INK, va="bottom")
        span = mine["slots"][data["first"] - 1 + data["shown"]] / data["shown"]
        label = f"{mine['name']}\n{1e3 * span:.1f} ms/round"
        axes.annotate(
            label, (1, top - 0.5), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=9.5, color=COLORS[mine["way"]], weight="bold", va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set_xlim(0, longest)
    axes.set_ylim(-2.9 * (len(modes) - 1) - 1.6, 1.25)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time from the start of a slot, ms", fontsize=9.5, color=INK)
    handles = [Patch(facecolor=colour, label=kind) for kind, colour in KINDS.items() if kind in drawn]
    if any(len(each["kinds"]) > 1 for mine in modes for each in mine["intervals"]):
        handles.append(Patch(facecolor=FAINT, edgecolor="white", hatch="////", label="one step, in both lanes"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def plot_delay(data: dict, path: Path) -> None:
    """Cumulative distribution of the longest delay that each arriving clip causes to a token."""
    figure, axes = figure_of(3.4)
    dashes = ["-", (0, (5, 2)), (0, (1, 1.5))]
    times = {}
    for mine in data["delays"]:
        late = 1e3 * np.sort(mine["any"])
        style = dashes[times.setdefault(mine["way"], 0) % len(dashes)]
        times[mine["way"]] += 1
        name = mine["way"] + (f", {mine['chunk']} tokens per step" if mine["chunk"] else "")
        name += f", {mine['chunks']} chunks" if (mine.get("chunks") or 1) > 1 else ""
        name += f" (95%: {1e3 * mine['any_percentiles'][1]:.2f} ms)"
        share = 100 * np.arange(1, len(late) + 1) / len(late)
        axes.step(late, share, where="post", color=COLORS[mine["way"]], linestyle=style, linewidth=1.6, label=name)
    axes.axhline(95, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 101)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel("longest delay of a token by an arriving clip, ms", fontsize=9.5, color=INK)
    axes.set_ylabel("share of arrivals, %", fontsize=9.5, color=INK)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def plot_long(data: dict, path: Path) -> None:
    """Memory and milliseconds per round over the clips of a long stream."""
    figure, (left, right) = figure_of(3.2, 2)
    for mine in data["long"]:
        clips = [sample["clips"] for sample in mine["samples"]]
        name = mine["way"]
        for kind, style in (("device", "-"), ("host", (0, (4, 2)))):
            values = [sample[kind] for sample in mine["samples"]]
            if any(values):
                values = np.array(values) / 2**30
                left.plot(clips, values, color=COLORS[name], linestyle=style, linewidth=1.6, label=f"{name}, {kind}")
        taken = [1e3 * sample["seconds"] for sample in mine["samples"]]
        right.plot(clips[1:], taken[1:], color=COLORS[name], linewidth=1.4, label=name)
    for axes, label in ((left, "memory in use, GiB"), (right, "time per round, ms")):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.set_xlabel("clips processed", fontsize=9.5, color=INK)
        axes.set_ylabel(label, fontsize=9.5, color=INK)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def plot_all(folder: Path) -> None:
    """Plot the result files in `folder`. All sweeps share one plot. Raises InputError if there is nothing to plot."""
    made = []
    if sweeps := [read_json(path) for path in sorted(folder.glob("*-sweep.json"))]:
        plot_sweep(sweeps, folder / "sweep.png")
        made.append(folder / "sweep.png")
    kinds: dict[str, Callable[[dict, Path], None]] = {"lanes": plot_lanes, "delay": plot_delay, "long": plot_long}
    for kind, draw in kinds.items():
        for path in sorted(folder.glob(f"*-{kind}.json")):
            draw(read_json(path), path.with_suffix(".png"))
            made.append(path.with_suffix(".png"))
    if not made:
        raise InputError(f"{folder} has no results of sweep, lanes, delay or long: run one of them first")
    print("\n".join(map(str, made)))
