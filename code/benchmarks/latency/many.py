"""Many sessions on one model in real time, and one session over a stream of very many clips."""

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
"""Seconds after a clip is due within which its words have to be there: then the next clip comes."""
SAMPLES = 100


def resident() -> int:
    """Bytes of RAM that this process holds, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many(bench: Bench, k: int, seats: list[int], seconds: float, age: int, window: tuple[int, int]) -> dict:
    """How many sessions one pool sustains, each with a clip a second, which come at random moments of it, and `k`
    words for each clip, a `window` of clips and words in sight: of every hundred clips, 95 have their words within LATE
    seconds, and no later at the end than in the beginning. `seats` are tried from the fewest on; after the first number
    that is not sustained, two between. The clock starts when each session has seen `age` clips."""
    print(
        f"\nsessions of a clip of {TOKENS} visual tokens and {k} words a second, {seconds:g} s each number, "
        f"after {age} clips each, a window of {window[0]} clips and {window[1]} words"
    )
    print(f"{'sessions':>8}{'GiB':>8}{'lag, ms: 50%':>14}{'95%':>8}{'most':>8}{'later by':>10}  sustained")
    options = {"max_clips": window[0], "max_new_tokens": k * (age + round(seconds) + 1), "window": window}
    table, enough, tries = [], 0, sorted(seats)
    bench.forget()
    with SessionPool(bench.model, tries[-1], bench.layout(), **options) as pool:
        run_pool(bench, pool, k, min(tries[0], 2), 1, 1)  # warms up
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
            elif all(each["sustained"] for each in table[:-1]):  # the first that is too many
                between = {enough + (count - enough) * part // 3 for part in (1, 2)}
                tries = sorted(number for number in between if enough < number < count)
            else:
                break
    print(f"sustained: {enough} sessions")
    return {"k": k, "seconds": seconds, "age": age, "window": list(window), "sustained": enough, "many": table}


def run_pool(bench: Bench, pool: SessionPool, k: int, count: int, seconds: float, age: int, seed: int = 0) -> dict:
    """`count` sessions for so many `seconds`. Raises InputError where not all of them are let in."""
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
        on_card = bench.device != "cpu"
        used = torch.cuda.memory_allocated(bench.device) if on_card else resident()
    finally:
        for session in sessions:
            session.close()
    late = [
        [end - (began + phase + clip) for clip, end in enumerate(slot_ends(session)[age:])]
        for session, phase in zip(sessions, phases, strict=True)
    ]
    quarter, lags = max(1, clips // 4), [lag for mine in late for lag in mine]
    later, earlier = ([lag for mine in late for lag in mine[part]] for part in (slice(-quarter, None), slice(quarter)))
    grown = median(later) - median(earlier)
    sustained = percentile(lags, 95) <= LATE and grown <= LATE / 4
    return {"sessions": count, "bytes": used, "lags": lags, "grown": grown, "sustained": sustained}


def long(bench: Bench, k: int, stream: int, window: tuple[int, int], chunks: list[str]) -> dict:
    """Memory and seconds a round over `stream` clips, of which a session keeps a `window` of clips and words in sight.
    A clip is fed as the slot before it begins. Device memory is what PyTorch gave out in this process, and beside it
    what is in use of each card, host memory what this process holds in RAM."""
    print(f"\na stream of {stream} clips, a window of {window[0]} clips and {window[1]} words")
    print(
        f"{'way':<11}{'a clip rides':<14}{'clips':>7}{'device MiB':>12}{'cards, MiB':>16}{'host MiB':>10}"
        f"{'ms a round':>12}"
    )
    table = []
    for way, how in runs(bench, chunks):
        samples = []

        def sample(clips: int, seconds: float, samples=samples):
            device, cards = 0, []
            if bench.device != "cpu":
                device = torch.cuda.memory_allocated(bench.device)
                for number in range(torch.cuda.device_count()):
                    free, total = torch.cuda.mem_get_info(number)
                    cards.append(total - free)
            samples.append({"clips": clips, "device": device, "cards": cards, "host": resident(), "seconds": seconds})

        options = {"chunk": bench.chunk(how, TOKENS, k), "window": window}
        for count in (min(stream, 2 * window[0]), stream):  # the first warms up
            samples.clear()
            with bench.open(way, f"wait-{k}", window[0], k * stream, **options) as session:
                drink(bench, session, count, max(1, count // SAMPLES), sample)
        table.append({"way": way, "chunk": options["chunk"], "samples": samples})
        for each in samples[:: max(1, len(samples) // 5)] + samples[-1:]:
            cards = " ".join(f"{card / 2**20:.0f}" for card in each["cards"])
            print(
                f"{way:<11}{how if way == 'fused' else '':<14}{each['clips']:>7}{each['device'] / 2**20:>12.1f}"
                f"{cards:>16}{each['host'] / 2**20:>10.1f}{1e3 * each['seconds']:>12.2f}",
                flush=True,
            )
    return {"k": k, "stream": stream, "window": list(window), "long": table}


def drink(bench: Bench, session, count: int, every: int, sample) -> None:
    """Feed `count` clips and write what they let be written; `sample` after each `every` slots that have begun."""
    pixels, taken, due = bench.clips(1)[0], 0, every
    bench.wait()
    began = time.perf_counter()
    while taken < count or not session.idle:
        if len(session.arrived) < count and len(session.arrived) <= len(session.visible):
            session.feed(pixels)
        session.step()
        taken = len(session.visible)
        if taken >= due:
            now = time.perf_counter()
            sample(taken, (now - began) / every)
            began, due = now, due + every
    bench.wait()
