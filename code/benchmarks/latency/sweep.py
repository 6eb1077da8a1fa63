"""The measured curve: speed-up over serial against the ratio r of perception to generation, beside S(r).

Each point is a K and a number of visual tokens a clip. A way's seconds a round are those between the ends of the
second and the last slot, over the rounds between: in a stream that goes on, filling the pipeline is done once. A word
is measured alone, at its rate; what a serial round takes beyond its K words is its perception, and r that over the
words. Perception of the same clips is measured alone too, vision tower and language model each at its rate, and gives a
second r, which is told of at the end: a serial session looks at a clip while the last word of the slot before it is
under way, so that perception takes less of a round than it does alone. Results are written after each point, and a run
that was stopped goes on with what is missing.
"""

import time
from pathlib import Path
from statistics import median

from qwen_vl_streaming.common.errors import InputError

from latency.floors import speed_up
from latency.runs import alone, runs, same, workload
from latency.setup import GRIDS, Bench, play, read_json, slot_ends, write_json

K = (1, 2, 4, 8, 16, 32, 64)
CLIP_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
CLIPS = 12
"""Of a session, and of one with many words a clip FEW."""
ROOM = (CLIPS + 1) * CLIP_TOKENS[-1]
"""Visual tokens that every session on a GPU has room for: nothing but the size of a pass differs between clip sizes."""
BEGUN = 2
"""Clips before those that are measured."""
FEW, MANY_WORDS = 6, 16
BETWEEN = (0.25, 4.0)
"""Where pipelined has to reach SHARE of S(r)."""
SHARE = 0.9


def parse_points(texts: list[str] | None) -> list[tuple[int, int]]:
    """(K, tokens a clip) of texts such as 3x91; all of the grid for none. Points of one clip size lie together."""
    if texts is None:
        return [(k, tokens) for tokens in CLIP_TOKENS for k in K]
    points = []
    for text in texts:
        k, _, tokens = text.partition("x")
        if not (k.isdigit() and tokens.isdigit() and int(k) > 0 and int(tokens) in GRIDS):
            sizes = ", ".join(map(str, GRIDS))
            raise InputError(f"--points {text}: give K x tokens a clip, such as 3x91, with tokens among {sizes}")
        points.append((int(k), int(tokens)))
    return sorted(points, key=lambda point: (point[1], point[0]))


def clips_of(k: int) -> int:
    return CLIPS if k < MANY_WORDS else FEW


def period(bench: Bench, way: str, k: int, tokens: int, room: tuple[int, int], chunk: int | None):
    """Seconds a round, and the words that were written."""
    clips = clips_of(k)
    with bench.open(way, f"wait-{k}", *room, tokens, chunk=chunk) as session:
        play(bench, session, bench.clips(clips, tokens))
    ends = slot_ends(session)
    return (ends[-1] - ends[BEGUN - 1]) / (clips - BEGUN), [each.token for each in session.written]


def sweep(bench: Bench, points: list[tuple[int, int]], chunks: list[str], repeats: int, path: Path, minutes: float):
    """Measure what of `points` is not in the file at `path` yet, for as long as `minutes`. Returns what is in it then.
    Raises InputError where the file is of something else."""
    began, about = time.perf_counter(), bench.about()
    data = read_json(path) if path.exists() else {"about": about, "alone": {}, "points": {}}
    for key in ("size", "layers", "device", "variant", "pixels"):
        if data["about"][key] != about[key]:
            raise InputError(f"{path} is of {key} {data['about'][key]}, not {about[key]}: give another --output")
    most, warm = max(CLIPS, *(k * clips_of(k) for k, _ in points)), set()
    print(
        f"\n{'K':>3}{'tokens':>8}{'r':>8}{'S(r)':>7}  {'way':<11}{'a clip rides':<13}{'ms a round':>11}{'floor':>8}"
        f"{'times':>7}{'speed-up':>10}{'of S(r)':>9}{'same words':>12}{'s':>6}"
    )
    for k, tokens in points:
        floors, clips = bench.floors(tokens), clips_of(k)
        room = CLIPS + 1 if bench.device == "cpu" else ROOM // tokens, most
        own = data["points"].setdefault(f"{k}x{tokens}", {"k": k, "tokens": tokens, "ways": {}})
        kinds = [("serial", "whole"), *(kind for kind in runs(bench, chunks) if kind[0] != "serial")]
        for way, how in kinds:
            name = f"{way} {how}" if way == "fused" else way
            if name in own["ways"]:
                continue
            if time.perf_counter() - began > 60 * minutes:
                print(f"{minutes:g} minutes are over: the same command goes on from here", flush=True)
                return data
            if (rounds := f"{clips}x{tokens}") not in data["alone"]:
                data["alone"][rounds] = alone(bench, tokens, clips, room, repeats, BEGUN)
                write_json(path, data)
            parts, chunk = data["alone"][rounds], bench.chunk(how, tokens, k)
            if (way, tokens, chunk) not in warm:
                period(bench, way, k, tokens, room, chunk)
                warm.add((way, tokens, chunk))
            taken = [period(bench, way, k, tokens, room, chunk) for _ in range(repeats)]
            each, said = median(seconds for seconds, _ in taken), taken[-1][1]
            serial = own["ways"].get("serial", {"seconds": each, "tokens": said})
            gain, r = serial["seconds"] / each, workload(serial["seconds"], k * parts["word"])
            own |= {"r": r, "r_alone": parts["perception"] / (k * parts["word"])}
            own["ways"][name] = {
                "seconds": each,
                "all": [seconds for seconds, _ in taken],
                "floor": (floors.session(way, [k] * clips) - floors.session(way, [k] * BEGUN)) / (clips - BEGUN),
                "speed_up": gain,
                "share": gain / speed_up(r),
                "same_words": same(said, serial["tokens"]) / len(said),
                "tokens": said,
            }
            mine = own["ways"][name]
            write_json(path, data)
            print(
                f"{k:>3}{tokens:>8}{r:>8.3f}{speed_up(r):>7.3f}  {way:<11}{how if way == 'fused' else '':<13}"
                f"{1e3 * each:>11.3f}{1e3 * mine['floor']:>8.3f}{each / mine['floor']:>7.2f}{gain:>10.3f}"
                f"{mine['share']:>9.1%}{mine['same_words']:>12.0%}{time.perf_counter() - began:>6.0f}",
                flush=True,
            )
    summarize(data)
    return data


def summarize(data: dict) -> None:
    """Print how much of S(r) was reached where r lies between the bounds, by either r."""
    low, high = BETWEEN
    for way in ("fused", "pipelined"):
        for name, what in (("r", "r"), ("r_alone", "r with perception alone")):
            within = [point for point in data["points"].values() if low <= point.get(name, 0) <= high]
            gains = [(best(point, way, "speed_up"), speed_up(point[name])) for point in within]
            if shares := [gain / most for gain, most in gains if gain is not None]:
                enough = sum(value >= SHARE for value in shares)
                print(
                    f"{way}: {len(shares)} points with {what} from {low:g} to {high:g}, at least {min(shares):.1%} of "
                    f"S(r), {sum(shares) / len(shares):.1%} in the mean; {enough} of them {SHARE:.0%} or more"
                )


def best(point: dict, way: str, figure: str) -> float | None:
    """The largest `figure` of `way` at `point`, however clips rode."""
    return max((mine[figure] for name, mine in point["ways"].items() if name.split()[0] == way), default=None)
