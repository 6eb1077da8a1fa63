"""Measurements of one session: seconds per round and per video, delay by an arriving clip, frames per second.

Each function prints its table row by row and returns the content of its JSON file.
"""

import random
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import numpy as np
import torch
from qwen_vl_streaming.sessions import GREEDY, Session
from qwen_vl_streaming.timeline.timeline import Schedule
from workload import PUBLISHED

from latency.floors import speed_up
from latency.setup import TOKENS, VARIANT, Bench, play, slot_ends

MOST_TOKENS = 32
"""Most tokens over which the time of one is averaged."""
WITHIN = 20
"""In `delay`, clips arrive between 0.25 and 0.75 times this many token times apart."""


def same(tokens: list[int], others: list[int]) -> int:
    """Length of the common prefix of two answers, in tokens."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))


def alone(
    bench: Bench, tokens: int, clips: int, room: tuple[int, int], repeats: int = 3, begun: int = 0
) -> dict[str, float]:
    """Seconds of perception per clip and of generation per token, each measured alone and without pauses. Returns the
    median of `repeats` runs after a warm-up.

    `tower` is the vision tower, over `clips` clips of `tokens` visual tokens. `language` is the language model's
    prefill of encoded clips, over all but the first `begun`. `perception` is the sum of both. `word` is the mean time
    of a token, over up to MOST_TOKENS tokens in the slot of the last clip. `room` is the number of clips and of answer
    tokens that the sessions have room for, with at least `clips` + 1 clips.
    """
    count = min(room[1], MOST_TOKENS)
    schedules = Schedule((0,) * clips), Schedule((0,) * (clips - 1) + (count,))
    pixels, layout = bench.clips(clips, tokens), bench.layout(tokens)
    with torch.no_grad():
        ready = [bench.model.perceive(clip[None], layout.grid)[0] for clip in pixels]
    taken = {"tower": [], "language": [], "word": []}
    for _ in range(1 + repeats):
        with bench.open("serial", schedules[0], *room, tokens) as session:
            began = time.perf_counter()
            for clip in pixels:
                session.runner.vision_encoder.encode([clip], [layout])
            bench.wait()
            taken["tower"].append((time.perf_counter() - began) / clips)
            play(bench, session, ready[:begun])
            taken["language"].append(play(bench, session, ready[begun:]) / (clips - begun))
        with bench.open("serial", schedules[1], *room, tokens) as session:
            play(bench, session, ready)
        taken["word"].append((session.written[-1].time - session.written[0].time) / (count - 1))
    parts = {name: median(seconds[1:]) for name, seconds in taken.items()}
    return {**parts, "perception": parts["tower"] + parts["language"]}


def perception_ratio(serial: float, generation: float) -> float:
    """The ratio r of perception to generation in a round, at least 0. Perception is the time of a `serial` round minus
    that of the `generation` of its tokens, all in seconds."""
    return max(serial / generation - 1, 0.0)


def rounds(bench: Bench, arguments: Namespace) -> dict:
    """Seconds per round, in which one clip is encoded and prefilled and `k` tokens are generated. The mean over `clips`
    rounds, from the first clip to the last token. All clips are fed at the start, and none of them ends the video.
    Sessions have room for at least `answer_tokens` tokens."""
    k, clips = arguments.k, arguments.clips
    room = (clips + 1, max(arguments.answer_tokens, k * clips))
    floors, parts = bench.floors(), alone(bench, TOKENS, clips, room)
    least = floors.parts(clips)
    least["language"] = least["clip"]
    print(f"\nparts, each measured alone: {clips} clips of {TOKENS} visual tokens")
    print(f"{'':<34}{'ms':>9}{'floor':>9}{'x floor':>9}")
    names = {"tower": "vision encoder, per clip", "language": "prefill, per clip", "word": "generation, per token"}
    for part, name in names.items():
        print(f"{name:<34}{1e3 * parts[part]:>9.3f}{1e3 * least[part]:>9.3f}{parts[part] / least[part]:>9.2f}")
    print(
        f"\n{'mode':<11}{'ms/round':>11}{'min':>8}{'max':>8}{'floor':>8}{'x floor':>9}{'speed-up':>10}"
        f"{'same tokens':>13}"
    )
    table, serial, answer, r = [], None, None, None
    for mode in bench.modes:
        taken = []
        for _ in range(1 + arguments.repeats):
            with bench.open(mode, f"wait-{k}", *room) as session:
                taken.append(play(bench, session, bench.clips(clips)) / clips)
        written = [each.token for each in session.written]
        if len(written) != k * clips:
            raise RuntimeError(f"{mode} generated {len(written)} tokens instead of {k * clips}")
        answer = answer or written
        each, floor = median(taken[1:]), floors.session(mode, [k] * clips) / clips
        serial = each if mode == "serial" else serial
        row = {
            "way": mode,
            "seconds": each,
            "all": taken[1:],
            "floor": floor,
            "speed_up": serial / each if serial else None,
            "same_words": same(written, answer),
            "words": len(written),
        }
        table.append(row)
        gain = f"{row['speed_up']:>10.2f}" if serial else f"{'-':>10}"
        print(
            f"{mode:<11}{1e3 * each:>11.2f}{1e3 * min(taken[1:]):>8.2f}{1e3 * max(taken[1:]):>8.2f}{1e3 * floor:>8.2f}"
            f"{each / floor:>9.2f}{gain}{row['same_words']:>7} of {len(written)}",
            flush=True,
        )
    if serial:
        r = perception_ratio(serial, k * parts["word"])
        print(f"r = {r:.3f}: perception time of a serial round, divided by generation time; S(r) = {speed_up(r):.3f}")
    return {"k": k, "clips": clips, "tokens": TOKENS, "parts": parts, "floors": least, "r": r, "rounds": table}


def video(bench: Bench, arguments: Namespace) -> dict:
    """Seconds of a video, from the pixels of its first clip to the last of `answer_tokens` tokens. Also the seconds to
    open its session, which prefills the prompt and can be done before the video starts."""
    k, clips, answer_tokens = arguments.k, arguments.clips, arguments.answer_tokens
    floors = bench.floors()
    counts = [k] * (clips - 1) + [answer_tokens - k * (clips - 1)]
    published = f"{PUBLISHED[VARIANT.name]:>11.1f}" if bench.size == "7B" else f"{'-':>11}"
    print(f"\na video of {clips} clips of {TOKENS} visual tokens, {answer_tokens} answer tokens")
    print(f"{'mode':<11}{'s/video':>10}{'min':>8}{'max':>8}{'floor':>8}{'x floor':>9}{'opening':>9}{'published':>11}")
    table = []
    for mode in bench.modes:
        taken, opening = [], []
        for _ in range(1 + arguments.repeats):
            bench.wait()
            began = time.perf_counter()
            with bench.open(mode, Schedule((k,) * (clips - 1)), clips, answer_tokens) as session:
                opening.append(time.perf_counter() - began)
                taken.append(play(bench, session, bench.clips(clips), ends=True))
            if session.counts != counts:
                raise RuntimeError(f"{mode} generated {session.counts} tokens instead of {counts}")
        each, open_, floor = median(taken[1:]), median(opening[1:]), floors.session(mode, counts)
        table.append({"way": mode, "seconds": each, "all": taken[1:], "opening": open_, "floor": floor})
        print(
            f"{mode:<11}{each:>10.4f}{min(taken[1:]):>8.4f}{max(taken[1:]):>8.4f}{floor:>8.4f}{each / floor:>9.2f}"
            f"{open_:>9.4f}{published}",
            flush=True,
        )
    return {"k": k, "clips": clips, "words": answer_tokens, "videos": table}


def arrivals(session: Session) -> tuple[list[float], list[float], list[float]]:
    """Gaps between consecutive tokens of a session that generates without pause, in seconds.

    Returns three lists: the gaps that no clip affects; for each clip after the first, the excess of the gap in which it
    arrives over the median of those; and the excess of the longest gap from its arrival to the second token after it
    becomes visible.
    """
    times = [each.time for each in session.written]
    gaps = [(begin, end) for begin, end in pairwise(times)]
    quiet, touched = [], [[] for _ in session.log.visible[1:]]
    # A token may be read one step after it was sampled: the clip may still affect the second token after it.
    until = [next(iter([t for t in times if t > seen][1:2]), seen) for seen in session.log.visible[1:]]
    for begin, end in gaps:
        mine = [i for i, came in enumerate(session.log.arrived[1 : 1 + len(until)]) if came < end and begin < until[i]]
        for i in mine:
            touched[i].append(end - begin)
        if not mine:
            quiet.append(end - begin)
    usual = median(quiet)
    return quiet, [gaps[0] - usual for gaps in touched if gaps], [max(gaps) - usual for gaps in touched if gaps]


def generate_greedily(bench: Bench, session: Session, clips: int, apart: Callable[[], float]) -> None:
    """Generate without pause while `clips` clips arrive, each `apart()` seconds after the previous one."""
    waiting, due, fed = bench.clips(clips), 0.0, 0
    while not session.done and (waiting or len(session.written) < fed + WITHIN):
        if waiting and time.perf_counter() >= due:
            session.feed(waiting.pop())
            due, fed = time.perf_counter() + apart(), len(session.written)
        session.step()


def delay(bench: Bench, arguments: Namespace) -> dict:
    """Delay of tokens by clips that arrive at random times, while tokens are generated without pause ("greedy"). The
    delay is the excess of a gap between two tokens over the median gap that no clip affects. Returns seconds and prints
    milliseconds."""
    clips = arguments.arrivals
    print(f"\ngeneration without pause while {clips} clips arrive at random times; ms")
    print(
        f"{'mode':<11}{'token':>8}{'95%':>7}   {'delay of next token':<26}{'longest delay':<24}\n"
        f"{'':<29}{'50%':>8}{'95%':>8}{'max':>8}  {'50%':>8}{'95%':>8}{'max':>8}"
    )
    table, room = [], 2 * WITHIN * (clips + 2)
    for mode in bench.modes:
        draw = random.Random(0)
        with bench.open(mode, GREEDY, clips, room) as session:  # a warm-up
            generate_greedily(bench, session, 3, lambda: 0.0)
        period = median(later.time - one.time for one, later in pairwise(session.written[-WITHIN // 2 :]))
        with bench.open(mode, GREEDY, clips, room) as session:
            generate_greedily(bench, session, clips, lambda d=draw, p=period: p * WITHIN * d.uniform(0.25, 0.75))
        quiet, following, worst = arrivals(session)
        gap = {"median": median(quiet), "p95": np.percentile(quiet, 95)}
        row = {"way": mode, "quiet": gap, "next": following, "any": worst}
        for name in ("next", "any"):
            row[f"{name}_percentiles"] = [np.percentile(row[name], 50), np.percentile(row[name], 95), max(row[name])]
        table.append(row)
        cells = ["".join(f"{1e3 * value:>8.2f}" for value in row[f"{name}_percentiles"]) for name in ("next", "any")]
        print(
            f"{mode:<11}{1e3 * gap['median']:>8.2f}{1e3 * gap['p95']:>7.2f}   {cells[0]}  {cells[1]}",
            flush=True,
        )
    return {"clips": clips, "delays": table}


def live(bench: Bench, arguments: Namespace) -> dict:
    """Lag of a live session for each rate in `frames` per second, with two frames and `k` tokens per clip. The session
    keeps a `window` of (clips, tokens), as a stream without an end does.

    The lag of a clip is the time from when it is due to the last of its tokens. A rate is sustained if the median lag
    of the last quarter exceeds that of the first by at most the duration of one clip. Stops at the first rate that is
    not sustained.
    """
    k, clips, window = arguments.k, 3 * arguments.arrivals, arguments.window
    print(
        f"\nlive: {clips} clips of {TOKENS} visual tokens, {k} tokens for each; window: {window[0]} clips and "
        f"{window[1]} tokens"
    )
    print(f"{'mode':<11}{'frames/s':>9}{'lag, ms: 50%':>14}{'95%':>8}{'max':>8}  sustained")
    table = []
    for mode in bench.modes:
        with bench.open(mode, f"wait-{k}", clips, k * clips, window=window) as session:  # a warm-up
            keep_pace(bench, session, clips, 0.0)
        for rate in sorted(arguments.frames):
            with bench.open(mode, f"wait-{k}", clips, k * clips, window=window) as session:
                lags = keep_pace(bench, session, clips, 2 / rate)
            quarter = max(1, len(lags) // 4)
            grown = median(lags[-quarter:]) - median(lags[:quarter])
            row = {"way": mode, "frames": rate, "lags": lags, "sustained": grown <= 2 / rate}
            table.append(row)
            print(
                f"{mode:<11}{rate:>9.1f}{1e3 * median(lags):>14.1f}{1e3 * np.percentile(lags, 95):>8.1f}"
                f"{1e3 * max(lags):>8.1f}  {'yes' if row['sustained'] else 'no'}",
                flush=True,
            )
            if not row["sustained"]:
                break
    return {"k": k, "clips": clips, "window": list(window), "live": table}


def keep_pace(bench: Bench, session: Session, clips: int, period: float) -> list[float]:
    """Feed a clip every `period` seconds. Returns the lag of each slot's last token."""
    waiting, began = bench.clips(clips)[::-1], time.perf_counter()
    due = [began + number * period for number in range(clips)]
    while waiting or not session.idle:
        while waiting and time.perf_counter() >= due[clips - len(waiting)]:
            session.feed(waiting.pop())
        if not session.idle:
            session.step()
        elif waiting:
            time.sleep(max(0.0, min(1e-4, due[clips - len(waiting)] - time.perf_counter())))
    bench.wait()
    return [end - at for end, at in zip(slot_ends(session), due, strict=True)]
