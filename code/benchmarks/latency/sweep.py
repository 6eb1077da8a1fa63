"""Measures the speed-up over serial against the ratio r of perception to generation, and compares it with S(r).

A point is a pair of K and visual tokens per clip. The seconds per round of a mode are the time from the end of the
second slot to the end of the last, divided by the rounds between them. This excludes the time to fill the pipeline,
which a long stream spends only once.

A token is measured alone and without pauses. The perception of a serial round is its time minus that of its K tokens,
and r is the ratio of the two. A second r, printed at the end, uses perception measured alone: vision tower and language
model, each without pauses. It is usually larger, because a serial session encodes a clip while it generates the last
token of the previous slot.

Results are written after each measurement. A run that was stopped continues with the missing points.
"""

import time
from argparse import Namespace
from pathlib import Path
from statistics import median

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.sessions import MODES

from latency.floors import speed_up
from latency.runs import alone, perception_ratio, same
from latency.setup import GRIDS, Bench, play, read_json, slot_ends, write_json

K = (1, 2, 4, 8, 16, 32, 64)
CLIP_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
CLIPS = 12
"""Number of clips in a session."""
ROOM = (CLIPS + 1) * CLIP_TOKENS[-1]
"""Visual tokens that every session on a GPU has room for, so that clip sizes differ only in the size of a step."""
BEGUN = 2
"""Number of clips before the measured ones."""
FEW, MANY_TOKENS = 6, 16
"""Number of clips in a session with many tokens per clip, and the smallest K to which it applies."""
BETWEEN = (0.25, 4.0)
"""Range of r in which pipelined mode must reach SHARE of S(r)."""
SHARE = 0.9


def parse_points(texts: list[str] | None) -> list[tuple[int, int]]:
    """(K, visual tokens per clip) for each text, such as 3x91, or the whole grid if None. Sorted by clip size, so that
    points of one size follow each other. Raises InputError for any other text."""
    if texts is None:
        return [(k, tokens) for tokens in CLIP_TOKENS for k in K]
    points = []
    for text in texts:
        k, _, tokens = text.partition("x")
        if not (k.isdigit() and tokens.isdigit() and int(k) > 0 and int(tokens) in GRIDS):
            sizes = ", ".join(map(str, GRIDS))
            raise InputError(f"--points {text}: give K x tokens per clip, such as 3x91, with tokens from {sizes}")
        points.append((int(k), int(tokens)))
    return sorted(points, key=lambda point: (point[1], point[0]))


def clips_of(k: int) -> int:
    return CLIPS if k < MANY_TOKENS else FEW


def period(bench: Bench, mode: str, k: int, tokens: int, room: tuple[int, int]) -> tuple[float, list[int]]:
    """Seconds per round, and the generated tokens."""
    clips = clips_of(k)
    with bench.open(mode, f"wait-{k}", *room, tokens) as session:
        play(bench, session, bench.clips(clips, tokens))
    ends = slot_ends(session)
    return (ends[-1] - ends[BEGUN - 1]) / (clips - BEGUN), [each.token for each in session.written]


def sweep(bench: Bench, arguments: Namespace, path: Path) -> None:
    """Measure the points that are missing from the file at `path`. Raises InputError if it has results of another model
    size, device or precision."""
    began, about, repeats = time.perf_counter(), bench.about(), arguments.repeats
    points = parse_points(arguments.points)
    data = read_json(path) if path.exists() else {"about": about, "alone": {}, "points": {}}
    for key in ("size", "device", "weights"):
        if data["about"].get(key) != about[key]:
            raise InputError(f"{path} is of {key} {data['about'].get(key)}, not {about[key]}: give another --output")
    most, warm = max(CLIPS, *(k * clips_of(k) for k, _ in points)), set()
    print(
        f"\n{'K':>3}{'tokens':>8}{'r':>8}{'S(r)':>7}  {'mode':<11}{'ms/round':>11}{'floor':>8}{'x floor':>9}"
        f"{'speed-up':>10}{'of S(r)':>9}{'same tokens':>13}{'s':>6}"
    )
    for k, tokens in points:
        floors, clips = bench.floors(tokens), clips_of(k)
        room = CLIPS + 1 if bench.device == "cpu" else ROOM // tokens, most
        own = data["points"].setdefault(f"{k}x{tokens}", {"k": k, "tokens": tokens, "ways": {}})
        for mode in sorted(bench.modes, key=MODES.index):  # serial first
            if mode in own["ways"]:
                continue
            if (rounds := f"{clips}x{tokens}") not in data["alone"]:
                data["alone"][rounds] = alone(bench, tokens, clips, room, repeats, BEGUN)
                write_json(path, data)
            parts = data["alone"][rounds]
            if (mode, tokens) not in warm:
                period(bench, mode, k, tokens, room)
                warm.add((mode, tokens))
            taken = [period(bench, mode, k, tokens, room) for _ in range(repeats)]
            each, written = median(seconds for seconds, _ in taken), taken[-1][1]
            serial = own["ways"].get("serial", {"seconds": each, "tokens": written})
            gain, r = serial["seconds"] / each, perception_ratio(serial["seconds"], k * parts["word"])
            own |= {"r": r, "r_alone": parts["perception"] / (k * parts["word"])}
            own["ways"][mode] = mine = {
                "seconds": each,
                "all": [seconds for seconds, _ in taken],
                "floor": (floors.session(mode, [k] * clips) - floors.session(mode, [k] * BEGUN)) / (clips - BEGUN),
                "speed_up": gain,
                "share": gain / speed_up(r),
                "same_words": same(written, serial["tokens"]) / len(written),
                "tokens": written,
            }
            write_json(path, data)
            print(
                f"{k:>3}{tokens:>8}{r:>8.3f}{speed_up(r):>7.3f}  {mode:<11}{1e3 * each:>11.3f}"
                f"{1e3 * mine['floor']:>8.3f}{each / mine['floor']:>9.2f}{gain:>10.3f}{mine['share']:>9.1%}"
                f"{mine['same_words']:>13.0%}{time.perf_counter() - began:>6.0f}",
                flush=True,
            )
    summarize(data)


def summarize(data: dict) -> None:
    """Print the share of S(r) that was reached for points within BETWEEN, for both definitions of r."""
    low, high = BETWEEN
    for mode in ("fused", "pipelined"):
        for name, what in (("r", "r"), ("r_alone", "r with perception alone")):
            within = [point for point in data["points"].values() if low <= point.get(name, 0) <= high]
            shares = [
                point["ways"][mode]["speed_up"] / speed_up(point[name]) for point in within if mode in point["ways"]
            ]
            if shares:
                enough = sum(value >= SHARE for value in shares)
                print(
                    f"{mode}: {len(shares)} points with {what} from {low:g} to {high:g}, at least {min(shares):.1%} of "
                    f"S(r), mean {sum(shares) / len(shares):.1%}; {SHARE:.0%} or more at {enough} of them"
                )
