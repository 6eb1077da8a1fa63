"""Many sessions on one model in real time, and one session over a stream of thousands of clips."""

import heapq
import os
import random
import time
from pathlib import Path
from statistics import median

import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.sessions import SessionPool

from latency.runs import percentile, runs
from latency.setup import TEMPLATE, TOKENS, Bench, slot_ends

LATE = 1.0
"""Seconds from when a clip is due to the deadline of its tokens, which is when the next clip is due."""
SAMPLES = 100
"""Approximate number of samples of memory and time over a long stream."""


def resident() -> int:
    """Resident memory of this process in bytes, as reported by Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many(bench: Bench, k: int, numbers: list[int], seconds: float, age: int, window: tuple[int, int]) -> dict:
    """How many sessions one pool sustains, each with one clip per second and `k` tokens per clip. Sessions keep a
    `window` of (clips, tokens), and their clips arrive at different, random phases of the second.

    A number of sessions is sustained if 95% of the clips have their tokens within LATE seconds, and the median lag of
    the last quarter exceeds that of the first by at most LATE / 4. Tries `numbers` in ascending order.
    After the first that is not sustained, tries up to two between it and the largest that is. Timing starts after each
    session has processed `age` clips.
    """
    print(
        f"\nsessions with a clip of {TOKENS} visual tokens and {k} tokens per second; {seconds:g} s for each number of "
        f"sessions, after {age} clips each; window: {window[0]} clips and {window[1]} tokens"
    )
    print(f"{'sessions':>8}{'GiB':>8}{'lag, ms: 50%':>14}{'95%':>8}{'max':>8}{'growth':>10}  sustained")
    options = {"max_clips": window[0], "max_new_tokens": k * (age + round(seconds) + 1), "window": window}
    table, enough, tries = [], 0, sorted(numbers)
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
                    f"{1e3 * percentile(lags, 95):>8.1f}{1e3 * max(lags):>8.1f}{1e3 * row['grown']:>10.1f}  "
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


def run_pool(bench: Bench, pool: SessionPool, k: int, count: int, seconds: float, age: int, seed: int = 0) -> dict:
    """Run `count` sessions for `seconds`. Raises InputError if the pool cannot open all of them."""
    draw, clips = random.Random(seed), max(1, round(seconds))
    options = {"schedule": f"wait-{k}", "clock": time.perf_counter}
    sessions, pixels = [], bench.clips(age + clips)
    try:
        for _ in range(count):
            sessions.append(pool.open(bench.variant, TEMPLATE, bench.layout(), **options))
        for clip in pixels[:age]:
            for session in sessions:
                session.feed(clip)
            while not pool.idle:
                pool.step()
        bench.wait()
        began = time.perf_counter()
        phases = [draw.random() for _ in sessions]
        due = [(began + phase, number, 0) for number, phase in enumerate(phases)]
        heapq.heapify(due)
        while due or not pool.idle:
            while due and time.perf_counter() >= due[0][0]:
                at, number, clip = heapq.heappop(due)
                sessions[number].feed(pixels[age + clip])
                if clip + 1 < clips:
                    heapq.heappush(due, (at + 1, number, clip + 1))
            if not pool.idle:
                pool.step()
            else:
                time.sleep(max(0.0, min(1e-3, due[0][0] - time.perf_counter())))
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


def verdict(late: list[list[float]]) -> dict:
    """Whether the lags of all clips, a list for each session, are sustained, as `many` defines it."""
    lags = [lag for mine in late for lag in mine]
    if not lags:
        return {"lags": [], "grown": 0.0, "sustained": False}
    quarter = max(1, max(map(len, late)) // 4)
    later, earlier = ([lag for mine in late for lag in mine[part]] for part in (slice(-quarter, None), slice(quarter)))
    grown = median(later) - median(earlier)
    return {"lags": lags, "grown": grown, "sustained": percentile(lags, 95) <= LATE and grown <= LATE / 4}


def long(bench: Bench, k: int, stream: int, window: tuple[int, int], chunks: list[str]) -> dict:
    """Memory and seconds per round over `stream` clips, with a `window` of (clips, tokens). Each clip is fed when the
    slot before it starts. Device memory is allocated by PyTorch in this process; `cards` is the memory in use on each
    GPU; host memory is the resident memory of this process."""
    print(f"\na stream of {stream} clips; window: {window[0]} clips and {window[1]} tokens")
    print(f"{'mode':<11}{'prefill':<14}{'clips':>7}{'device MiB':>12}{'GPUs, MiB':>16}{'host MiB':>10}{'ms/round':>12}")
    table = []
    for mode, how in runs(bench, chunks):
        samples = []

        def sample(clips: int, seconds: float, samples=samples):
            device, cards = 0, []
            if bench.device != "cpu":
                device = torch.cuda.memory_allocated(bench.device)
                for number in range(torch.cuda.device_count()):
                    free, total = torch.cuda.mem_get_info(number)
                    cards.append(total - free)
            samples.append({"clips": clips, "device": device, "cards": cards, "host": resident(), "seconds": seconds})

        prefill = bench.prefill(how, TOKENS, k)
        for count in (min(stream, 2 * window[0]), stream):  # the first one is a warm-up
            samples.clear()
            with bench.open(mode, f"wait-{k}", window[0], k * stream, window=window, **prefill) as session:
                feed_on_time(bench, session, count, max(1, count // SAMPLES), sample)
        table.append({"way": mode, **prefill, "samples": samples})
        for each in samples[:: max(1, len(samples) // 5)] + samples[-1:]:
            cards = " ".join(f"{card / 2**20:.0f}" for card in each["cards"])
            print(
                f"{mode:<11}{how if mode == 'fused' else '':<14}{each['clips']:>7}{each['device'] / 2**20:>12.1f}"
                f"{cards:>16}{each['host'] / 2**20:>10.1f}{1e3 * each['seconds']:>12.2f}",
                flush=True,
            )
    return {"k": k, "stream": stream, "window": list(window), "long": table}


def feed_on_time(bench: Bench, session, count: int, every: int, sample) -> None:
    """Feed `count` clips, each when the slot before it starts. Calls `sample` after every `every` slots with the number
    of slots and the seconds per slot."""
    pixels, taken, due = bench.clips(1)[0], 0, every
    bench.wait()
    began = time.perf_counter()
    while taken < count or not session.idle:
        if len(session.log.arrived) < count and len(session.log.arrived) <= len(session.log.visible):
            session.feed(pixels)
        session.step()
        taken = len(session.log.visible)
        if taken >= due:
            now = time.perf_counter()
            sample(taken, (now - began) / every)
            began, due = now, due + every
    bench.wait()
