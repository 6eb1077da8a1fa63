"""One session at a time: seconds a round, seconds a video, what a clip's arrival costs the next word, frames a second.

Each returns what goes into its JSON file, and prints its table as it goes.
"""

import random
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median, quantiles

import torch
from qwen_vl_streaming.sessions import GREEDY, Session
from qwen_vl_streaming.timeline.timeline import Schedule

from latency.floors import speed_up
from latency.setup import TOKENS, Bench, play, slot_ends

PUBLISHED = 3.9
"""Seconds a video of the published code, 7B on one H200: see evaluation.py."""
TARGETS = {"serial": 24.0, "fused": 16.0, "pipelined": 14.0}
"""Milliseconds a round at 7B on H200, K = 3, 91 tokens a clip, 30 clips."""
DELAYS = {"fused": 6.0, "pipelined": 3.0}
"""Milliseconds by which an arrival may delay the next word, 95th percentile."""
SAID = 32
WITHIN = 20
"""Words in whose time a clip arrives in `delay`, in the mean half of them."""


def runs(bench: Bench, chunks: list[str]) -> list[tuple[str, str]]:
    """Ways, and for the fused one each way that a clip may ride."""
    return [(way, how) for way in bench.ways for how in (chunks if way == "fused" else ["whole"])]


def cell(value: float | None, width: int, digits: int) -> str:
    """A number of a table, or a dash for none."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def same(words: list[int], others: list[int]) -> int:
    """How many words two answers have in common before they part."""
    return next((i for i, (a, b) in enumerate(zip(words, others, strict=True)) if a != b), len(words))


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def alone(
    bench: Bench, tokens: int, clips: int, room: tuple[int, int], repeats: int = 3, begun: int = 0
) -> dict[str, float]:
    """Seconds of perception and of generation, each alone and at its rate, in sessions with `room` for so many clips,
    one more than `clips`, and words. Of a clip of `tokens` visual tokens: the vision tower over clips in a row, and the
    language model over `clips` clips in a row that it has looked at, but for the first `begun` of them, nothing being
    waited for in between; and the sum of the two. Of a word: the mean of up to SAID in the slot of the last clip. The
    median of `repeats`, after one to warm up."""
    words = min(room[1], SAID)
    said_after = Schedule((0,) * clips), Schedule((0,) * (clips - 1) + (words,))
    pixels, layout = bench.clips(clips, tokens), bench.layout(tokens)
    with torch.no_grad():
        ready = [bench.model.perceive(clip[None], layout.grid)[0] for clip in pixels]
    taken = {"tower": [], "language": [], "word": []}
    for _ in range(1 + repeats):
        with bench.open("serial", said_after[0], *room, tokens) as session:
            began = time.perf_counter()
            for clip in pixels:
                session.runner.vision_encoder.encode([clip], [layout])
            bench.wait()
            taken["tower"].append((time.perf_counter() - began) / clips)
            play(bench, session, ready[:begun])
            taken["language"].append(play(bench, session, ready[begun:]) / (clips - begun))
        with bench.open("serial", said_after[1], *room, tokens) as session:
            play(bench, session, ready)
        taken["word"].append((session.written[-1].time - session.written[0].time) / (words - 1))
    parts = {name: median(seconds[1:]) for name, seconds in taken.items()}
    return {**parts, "perception": parts["tower"] + parts["language"]}


def workload(serial: float, words: float) -> float:
    """The ratio r of a round: what a `serial` one takes beyond its `words`, which is perception, over those; not less
    than 0."""
    return max(serial / words - 1, 0.0)


def rounds(bench: Bench, k: int, clips: int, words: int, tokens: int, repeats: int, chunks: list[str]) -> dict:
    """Seconds a round: a clip taken in and `k` words written, in the mean over `clips` rounds, the first clip and the
    last words included. All clips are there, none is the last, and the clock runs from the first's feeding. Sessions
    have room for `words` words."""
    room = (clips + 1, max(words, k * clips))
    floors, parts = bench.floors(tokens), alone(bench, tokens, clips, room)
    least = floors.parts(clips)
    least["language"] = least["clip"]
    print(f"\nparts, each alone, one after the other: {clips} clips of {tokens} visual tokens")
    print(f"{'':<34}{'ms':>9}{'floor':>9}{'times':>8}")
    names = {"tower": "vision tower over a clip", "language": "language model over a clip", "word": "a word"}
    for part, name in names.items():
        print(f"{name:<34}{1e3 * parts[part]:>9.3f}{1e3 * least[part]:>9.3f}{parts[part] / least[part]:>8.2f}")
    print(
        f"\n{'way':<11}{'a clip rides':<14}{'ms a round':>11}{'from':>8}{'to':>8}{'floor':>8}{'times':>7}{'asked':>7}"
        f"{'speed-up':>10}{'same words':>13}"
    )
    table, serial, answer, r = [], None, None, None
    for way, how in runs(bench, chunks):
        chunk, taken = bench.chunk(how, tokens, k), []
        for _ in range(1 + repeats):
            with bench.open(way, f"wait-{k}", *room, tokens, chunk=chunk) as session:
                taken.append(play(bench, session, bench.clips(clips, tokens)) / clips)
        said = [each.token for each in session.written]
        if len(said) != k * clips:
            raise RuntimeError(f"{way} wrote {len(said)} words instead of {k * clips}")
        answer = answer or said
        each, floor = median(taken[1:]), floors.session(way, [k] * clips) / clips
        serial = each if way == "serial" else serial
        row = {
            "way": way,
            "chunk": chunk,
            "seconds": each,
            "all": taken[1:],
            "floor": floor,
            "speed_up": serial / each if serial else None,
            "same_words": same(said, answer),
            "words": len(said),
        }
        table.append(row)
        asked = TARGETS[way] if (k, tokens) == (3, TOKENS) and bench.size == "7B" else None
        print(
            f"{way:<11}{how if way == 'fused' else '':<14}{1e3 * each:>11.2f}{1e3 * min(taken[1:]):>8.2f}"
            f"{1e3 * max(taken[1:]):>8.2f}{1e3 * floor:>8.2f}{each / floor:>7.2f}{cell(asked, 7, 0)}"
            f"{cell(row['speed_up'], 10, 2)}{row['same_words']:>7} of {len(said)}",
            flush=True,
        )
    if serial:
        r = workload(serial, k * parts["word"])
        print(f"r = {r:.3f}: what a serial round takes beyond its words, over those; S(r) = {speed_up(r):.3f}")
    return {"k": k, "clips": clips, "tokens": tokens, "parts": parts, "floors": least, "r": r, "rounds": table}


def video(bench: Bench, k: int, clips: int, words: int, repeats: int, chunks: list[str]) -> dict:
    """Seconds of a whole video, from the pixels of its first clip to the last of `words` words; and beside it those of
    opening its session, which takes the prompt in, and may be done before the video begins."""
    floors = bench.floors()
    counts = [k] * (clips - 1) + [words - k * (clips - 1)]
    print(f"\na video of {clips} clips of {TOKENS} visual tokens, {words} words")
    print(
        f"{'way':<11}{'a clip rides':<14}{'s a video':>10}{'from':>8}{'to':>8}{'floor':>8}{'times':>7}{'opening':>9}"
        f"{'published':>11}"
    )
    table = []
    for way, how in runs(bench, chunks):
        chunk, taken, opening = bench.chunk(how, TOKENS, k), [], []
        for _ in range(1 + repeats):
            bench.wait()
            began = time.perf_counter()
            with bench.open(way, Schedule((k,) * (clips - 1)), clips, words, chunk=chunk) as session:
                opening.append(time.perf_counter() - began)
                taken.append(play(bench, session, bench.clips(clips), ends=True))
            if session.counts != counts:
                raise RuntimeError(f"{way} wrote {session.counts} instead of {counts}")
        each, open_, floor = median(taken[1:]), median(opening[1:]), floors.session(way, counts)
        table.append({"way": way, "chunk": chunk, "seconds": each, "all": taken[1:], "opening": open_, "floor": floor})
        published = PUBLISHED if bench.size == "7B" else None
        print(
            f"{way:<11}{how if way == 'fused' else '':<14}{each:>10.4f}{min(taken[1:]):>8.4f}{max(taken[1:]):>8.4f}"
            f"{floor:>8.4f}{each / floor:>7.2f}{open_:>9.4f}{cell(published, 11, 1)}",
            flush=True,
        )
    return {"k": k, "clips": clips, "words": words, "videos": table}


def arrivals(session: Session) -> tuple[list[float], list[float], list[float]]:
    """Of a session that never paused, in seconds: the gaps between words that no clip touched; and for each clip after
    the first how much longer than their median was the gap it arrived in, and the longest of those from its arrival to
    the second word after it became visible."""
    times = [each.time for each in session.written]
    gaps = [(begin, end) for begin, end in pairwise(times)]
    quiet, touched = [], [[] for _ in session.visible[1:]]
    # A word may be read a pass after it was chosen: the second word after is still the clip's.
    until = [next(iter([t for t in times if t > seen][1:2]), seen) for seen in session.visible[1:]]
    for begin, end in gaps:
        mine = [i for i, came in enumerate(session.arrived[1 : 1 + len(until)]) if came < end and begin < until[i]]
        for i in mine:
            touched[i].append(end - begin)
        if not mine:
            quiet.append(end - begin)
    usual = median(quiet)
    return quiet, [gaps[0] - usual for gaps in touched if gaps], [max(gaps) - usual for gaps in touched if gaps]


def speak_on(bench: Bench, session: Session, clips: int, apart: Callable[[], float]) -> None:
    """Write without pause while `clips` clips arrive, each `apart()` seconds after the one before it."""
    waiting, due, fed = bench.clips(clips), 0.0, 0
    while not session.done and (waiting or len(session.written) < fed + WITHIN):
        if waiting and time.perf_counter() >= due:
            session.feed(waiting.pop())
            due, fed = time.perf_counter() + apart(), len(session.written)
        session.step()


def delay(bench: Bench, k: int, clips: int, chunks: list[str], seed: int = 0) -> dict:
    """Milliseconds by which a clip that arrives at a random moment delays the words, which are written without pause
    ("greedy"): what the gap between two words is longer than the median of those that no clip touches."""
    print(f"\nwords without pause, {clips} clips at random moments (seed {seed}); ms")
    print(
        f"{'way':<11}{'a clip rides':<14}{'a word':>8}{'95%':>7}   {'next word later by':<26}{'any word later by':<26}"
        f"{'asked':>6}\n{'':<43}{'50%':>8}{'95%':>8}{'most':>8}  {'50%':>8}{'95%':>8}{'most':>8}"
    )
    table, words = [], 2 * WITHIN * (clips + 2)
    for way, how in runs(bench, chunks):
        chunk, draw = bench.chunk(how, TOKENS, k), random.Random(seed)
        with bench.open(way, GREEDY, clips, words, chunk=chunk) as session:  # warms up
            speak_on(bench, session, 3, lambda: 0.0)
        word = median(later.time - one.time for one, later in pairwise(session.written[-WITHIN // 2 :]))
        with bench.open(way, GREEDY, clips, words, chunk=chunk) as session:
            speak_on(bench, session, clips, lambda d=draw, w=word: w * WITHIN * d.uniform(0.25, 0.75))
        quiet, following, worst = arrivals(session)
        gap = {"median": median(quiet), "p95": percentile(quiet, 95)}
        row = {"way": way, "chunk": chunk, "quiet": gap, "next": following, "any": worst}
        for name in ("next", "any"):
            row[f"{name}_percentiles"] = [percentile(row[name], 50), percentile(row[name], 95), max(row[name])]
        table.append(row)
        cells = ["".join(f"{1e3 * value:>8.2f}" for value in row[f"{name}_percentiles"]) for name in ("next", "any")]
        asked = DELAYS.get(way) if bench.size == "7B" else None
        print(
            f"{way:<11}{how if way == 'fused' else '':<14}{1e3 * gap['median']:>8.2f}{1e3 * gap['p95']:>7.2f}   "
            f"{cells[0]}  {cells[1]}{cell(asked, 6, 0)}",
            flush=True,
        )
    return {"clips": clips, "seed": seed, "delays": table}


def live(bench: Bench, k: int, clips: int, frames: list[float], chunks: list[str], window: tuple[int, int]) -> dict:
    """Clips that arrive at so many `frames` a second (two make a clip), each when it is due, and `k` words for each; a
    `window` of clips and words stays in sight, so that it could go on for ever. A rate is sustained where words do not
    fall further behind: their lag, from a clip's due time to the last of its words, is in the last quarter at most one
    clip's time longer than in the first. Stops at the first that is not."""
    print(
        f"\nlive: {clips} clips of {TOKENS} visual tokens, {k} words for each, a window of {window[0]} clips and "
        f"{window[1]} words"
    )
    print(f"{'way':<11}{'a clip rides':<14}{'frames/s':>9}{'lag, ms: 50%':>14}{'95%':>8}{'most':>8}  sustained")
    table = []
    for way, how in runs(bench, chunks):
        chunk = bench.chunk(how, TOKENS, k)
        for number, rate in enumerate(sorted(frames)):
            for repeat in range(2 if number == 0 else 1):  # the first session of all warms up
                with bench.open(way, f"wait-{k}", clips, k * clips, chunk=chunk, window=window) as session:
                    lags = keep_pace(bench, session, clips, 2 / rate, hurry=repeat == 0 and number == 0)
            quarter = max(1, len(lags) // 4)
            grown = median(lags[-quarter:]) - median(lags[:quarter])
            row = {"way": way, "chunk": chunk, "frames": rate, "lags": lags, "sustained": grown <= 2 / rate}
            table.append(row)
            print(
                f"{way:<11}{how if way == 'fused' else '':<14}{rate:>9.1f}{1e3 * median(lags):>14.1f}"
                f"{1e3 * percentile(lags, 95):>8.1f}{1e3 * max(lags):>8.1f}  {'yes' if row['sustained'] else 'no'}",
                flush=True,
            )
            if not row["sustained"]:
                break
    return {"k": k, "clips": clips, "window": list(window), "live": table}


def keep_pace(bench: Bench, session: Session, clips: int, period: float, hurry: bool = False) -> list[float]:
    """Feed a clip every `period` seconds, in a `hurry` at once; the lag of each slot's last word."""
    waiting, began = bench.clips(clips)[::-1], time.perf_counter()
    due = [began + (0 if hurry else number * period) for number in range(clips)]
    while waiting or not session.idle:
        while waiting and time.perf_counter() >= due[clips - len(waiting)]:
            session.feed(waiting.pop())
        if not session.idle:
            session.step()
        elif waiting:
            time.sleep(max(0.0, min(1e-4, due[clips - len(waiting)] - time.perf_counter())))
    bench.wait()
    return [end - at for end, at in zip(slot_ends(session), due, strict=True)]
