"""Many sessions on one model in real time, and one session over a stream of thousands of clips."""

import random
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from statistics import median

import numpy as np
import psutil
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.sessions import Session, SessionPool
from workload import TEMPLATE

from latency.setup import TOKENS, VARIANT, Bench, feed_one_ahead, slot_ends

LATE = 1.0
"""Seconds from when a clip is due to the deadline of its tokens, which is when the next clip is due."""
SAMPLES = 100
"""Approximate number of samples of memory and time over a long stream."""


def resident() -> int:
    """Resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def verdict(late: list[list[float]]) -> dict:
    """The lags of all clips, given as a list for each session, and whether they are sustained: 95% of them are at most
    LATE seconds, and the median of the last quarter of the clips exceeds that of the first by at most LATE / 4."""
    lags = [lag for mine in late for lag in mine]
    if not lags:
        return {"lags": [], "grown": 0.0, "sustained": False}
    quarter = max(1, max(map(len, late)) // 4)
    later, earlier = ([lag for mine in late for lag in mine[part]] for part in (slice(-quarter, None), slice(quarter)))
    grown = median(later) - median(earlier)
    return {"lags": lags, "grown": grown, "sustained": bool(np.percentile(lags, 95) <= LATE and grown <= LATE / 4)}


def many(bench: Bench, arguments: Namespace) -> dict:
    """How many sessions one pool sustains, each with one clip per second and `k` tokens per clip. Sessions keep a
    `window` of (clips, tokens), and their clips arrive at different, random phases of the second.

    `verdict` defines what is sustained. Tries the numbers of sessions in ascending order. After the first that is not
    sustained, tries up to two between it and the largest that is. Timing starts after each session has processed `age`
    clips.
    """
    k, seconds, age, window = arguments.k, arguments.seconds, arguments.age, arguments.window
    print(
        f"\nsessions with a clip of {TOKENS} visual tokens and {k} tokens per second; {seconds:g} s for each number of "
        f"sessions, after {age} clips each; window: {window[0]} clips and {window[1]} tokens"
    )
    print(f"{'sessions':>8}{'GiB':>8}{'lag, ms: 50%':>14}{'95%':>8}{'max':>8}{'growth':>10}  sustained")
    options = {"max_clips": window[0], "max_new_tokens": k * (age + round(seconds) + 1), "window": window}
    table, enough, tries = [], 0, sorted(arguments.sessions)
    bench.release()
    with SessionPool(bench.model, tries[-1], bench.layout(), **options) as pool:
        run_pool(bench, pool, k, min(tries[0], 2), 1, 1)  # a warm-up
        while tries:
            count = tries.pop(0)
            try:
                row = run_pool(bench, pool, k, count, seconds, age)
            except InputError as error:
                row = {"sessions": count, "sustained": False, "refused": str(error)}
                print(f"{count:>8}  {error}", flush=True)
            else:
                lags = row["lags"]
                print(
                    f"{count:>8}{row['bytes'] / 2**30:>8.1f}{1e3 * median(lags):>14.1f}"
                    f"{1e3 * np.percentile(lags, 95):>8.1f}{1e3 * max(lags):>8.1f}{1e3 * row['grown']:>10.1f}  "
                    f"{'yes' if row['sustained'] else 'no'}",
                    flush=True,
                )
            table.append(row)
            if row["sustained"]:
                enough = max(enough, count)
            elif all(each["sustained"] for each in table[:-1]):  # the first number that is not sustained
                between = {enough + (count - enough) * part // 3 for part in (1, 2)}
                tries = sorted(number for number in between if enough < number < count)
            else:
                break
    print(f"sustained: {enough} sessions")
    return {"k": k, "seconds": seconds, "age": age, "window": list(window), "sustained": enough, "many": table}


def drive(pool: SessionPool, events: Iterable[tuple[float, Callable[[], object]]]) -> None:
    """Step `pool` until all `events` are over and it is idle. An event is a time of perf_counter, and what to call
    then."""
    due = deque(sorted(events, key=itemgetter(0)))
    while due or not pool.idle:
        while due and time.perf_counter() >= due[0][0]:
            _, work = due.popleft()
            work()
        if not pool.idle:
            pool.step()
        elif due:
            time.sleep(max(0.0, min(1e-3, due[0][0] - time.perf_counter())))


def run_pool(bench: Bench, pool: SessionPool, k: int, count: int, seconds: float, age: int) -> dict:
    """Run `count` sessions for `seconds`. Raises InputError if the pool cannot open all of them."""
    draw, clips = random.Random(0), max(1, round(seconds))
    options = {"schedule": f"wait-{k}", "clock": time.perf_counter}
    sessions, pixels = [], bench.clips(age + clips)
    try:
        for _ in range(count):
            sessions.append(pool.open(VARIANT, TEMPLATE, bench.layout(), **options))
        for clip in pixels[:age]:
            for session in sessions:
                session.feed(clip)
            while not pool.idle:
                pool.step()
        bench.wait()
        began = time.perf_counter()
        phases = [draw.random() for _ in sessions]
        drive(
            pool,
            (
                (began + phase + clip, partial(session.feed, pixels[age + clip]))
                for session, phase in zip(sessions, phases, strict=True)
                for clip in range(clips)
            ),
        )
        bench.wait()
        on_gpu = bench.device != "cpu"
        used = torch.cuda.memory_allocated(bench.device) if on_gpu else resident()
    finally:
        for session in sessions:
            session.close()
    late = [
        [end - (began + phase + clip) for clip, end in enumerate(slot_ends(session)[age:])]
        for session, phase in zip(sessions, phases, strict=True)
    ]
    return {"sessions": count, "bytes": used, **verdict(late)}


def long(bench: Bench, arguments: Namespace) -> dict:
    """Memory and seconds per round over `stream` clips, with a `window` of (clips, tokens). Each clip is fed when the
    slot before it starts. Device memory is allocated by PyTorch in this process; `cards` is the memory in use on each
    GPU; host memory is the resident memory of this process."""
    k, stream, window = arguments.k, arguments.stream, arguments.window
    print(f"\na stream of {stream} clips; window: {window[0]} clips and {window[1]} tokens")
    print(f"{'mode':<11}{'clips':>7}{'device MiB':>12}{'GPUs, MiB':>16}{'host MiB':>10}{'ms/round':>12}")
    table, every = [], max(1, stream // SAMPLES)
    for mode in bench.modes:
        for count in (min(stream, 2 * window[0]), stream):  # the first one is a warm-up
            with bench.open(mode, f"wait-{k}", window[0], k * stream, window=window) as session:
                samples = sample_stream(bench, session, count, every)
        table.append({"way": mode, "samples": samples})
        for each in samples[:: max(1, len(samples) // 5)] + samples[-1:]:
            cards = " ".join(f"{card / 2**20:.0f}" for card in each["cards"])
            print(
                f"{mode:<11}{each['clips']:>7}{each['device'] / 2**20:>12.1f}{cards:>16}{each['host'] / 2**20:>10.1f}"
                f"{1e3 * each['seconds']:>12.2f}",
                flush=True,
            )
    return {"k": k, "stream": stream, "window": list(window), "long": table}


def sample_stream(bench: Bench, session: Session, count: int, every: int) -> list[dict]:
    """Memory and seconds per slot after every `every` slots of a stream of `count` clips."""
    samples, due, began = [], every, time.perf_counter()
    for started in feed_one_ahead(session, bench.clips(count)):
        if started >= due:
            now = time.perf_counter()
            samples.append({"clips": started, **memory(bench), "host": resident(), "seconds": (now - began) / every})
            began, due = now, due + every
    bench.wait()
    return samples


def memory(bench: Bench) -> dict:
    """Bytes that PyTorch has allocated on the device of `bench`, and bytes in use on each GPU."""
    if bench.device == "cpu":
        return {"device": 0, "cards": []}
    free_and_total = map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))
    cards = [total - free for free, total in free_and_total]
    return {"device": torch.cuda.memory_allocated(bench.device), "cards": cards}
