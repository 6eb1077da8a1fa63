"""Time of each kind of forward step, on the device and with the host, and kernels of steps that generate a token."""

import contextlib
import time
from collections.abc import Callable
from statistics import median

import torch
from qwen_vl_streaming.engine.step_request import StepRequest
from qwen_vl_streaming.engine.step_runner import StepRunner

from latency.setup import Bench, play

REPEATS = 50
SHOWN = 14
"""Number of kernels in the printed list."""


@contextlib.contextmanager
def last_asks(bench: Bench, way: str, k: int, clips: int, words: int, tokens: int, chunk: int | None):
    """Play a video of `clips` clips; yield the step runner, its session still open, and the last request of each kind
    of step. The kind is (prefill pieces, whether a token is sampled)."""
    kept: dict[tuple[int, bool], StepRequest] = {}
    with bench.open(way, f"wait-{k}", clips, max(words, k * clips), tokens, chunk=chunk) as session:
        run = session.runner.step

        def keep(asks):
            (ask,) = asks
            kept[int(len(ask.prefill) > 0), ask.sample] = ask
            return run(asks)

        session.runner.step = keep
        play(bench, session, bench.clips(clips, tokens), ends=True)
        del session.runner.step
        yield session.runner, kept


def each(bench: Bench, work: Callable[[], object]) -> float:
    """Seconds per call of `work`, called many times in a row. This is device time if the host is faster."""
    for _ in range(3):
        work()
    bench.wait()
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(REPEATS):
            work()
        bench.wait()
        taken.append((time.perf_counter() - began) / REPEATS)
    return median(taken)


def passes(bench: Bench, k: int, clips: int, words: int, tokens: int, chunks: list[str]) -> dict:
    """Seconds of each kind of step at the end of a video of `clips` clips, printed in milliseconds: the step replayed
    alone, the whole of `StepRunner.step`, and the host's share that packs the inputs."""
    floors, table, kernels = bench.floors(tokens), [], {}
    print(
        f"\npasses at the end of {clips} clips of {tokens} visual tokens\n{'a clip rides':<14}{'rows':>6}{'word':>6}",
        end="",
    )
    print(f"{'ms alone':>10}{'run':>8}{'host':>8}{'floor':>8}{'times':>7}")
    for how in chunks:
        with last_asks(bench, "fused", k, clips, words, tokens, bench.chunk(how, tokens, k)) as (made, kept):
            for (pieces, write), ask in sorted(kept.items()):
                alone = each(bench, replay(made, pieces, write, ask))
                whole = each(bench, lambda made=made, ask=ask: made.step([ask]))
                began = time.perf_counter()
                for _ in range(REPEATS):
                    made.inputs[pieces].pack([ask])
                host = (time.perf_counter() - began) / REPEATS
                work = floors.word(clips, words) if write else floors.clip(clips)
                if write and pieces:
                    share = len(ask.prefill) / tokens
                    work = work + floors.clip(clips).part(share, bench.model.dtype.itemsize * floors.weights)
                floor = floors.seconds(work)
                row = {"how": how, "rows": len(ask.decode) + len(ask.prefill), "write": write}
                table.append({**row, "alone": alone, "run": whole, "host": host, "floor": floor})
                print(
                    f"{how if pieces else '':<14}{row['rows']:>6}{'yes' if write else 'no':>6}{1e3 * alone:>10.3f}"
                    f"{1e3 * whole:>8.3f}{1e3 * host:>8.3f}{1e3 * floor:>8.3f}{alone / floor:>7.2f}",
                    flush=True,
                )
            if how == chunks[0]:
                for name, pieces in (("a word", 0), ("a clip and a word", 1)):
                    kernels[name] = profile(bench, name, replay(made, pieces, True, kept[pieces, True]))
    return {"tokens": tokens, "passes": table, "kernels": kernels}


def replay(made: StepRunner, pieces: int, write: bool, ask: StepRequest) -> Callable[[], object]:
    """A function that repeats the device's part of the step for `ask`: a CUDA graph, or the step itself if there is
    none."""
    made.step([ask])
    graph = made.graphs.get((pieces, write))

    @torch.no_grad()
    def again():
        made._step(pieces, write)

    return again if graph is None else graph.replay


def profile(bench: Bench, name: str, work: Callable[[], object]) -> list[dict]:
    """Kernels of `work` with their count and milliseconds per call, by descending time. `name` is for the heading."""
    gpu = bench.device != "cpu"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if gpu else activity.CPU]) as found:
        for _ in range(10):
            work()
        bench.wait()
    rows = []
    for event in found.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if spent:
            rows.append({"name": event.key, "count": event.count / 10, "ms": spent / 1e4})
    rows.sort(key=lambda row: -row["ms"])
    print(f"\n{name} alone: {sum(row['ms'] for row in rows):.3f} ms in {sum(row['count'] for row in rows):.0f} kernels")
    print(f"{'ms':>8}{'count':>7}  kernel")
    for row in rows[:SHOWN]:
        print(f"{row['ms']:>8.3f}{row['count']:>7.0f}  {row['name'][:100]}", flush=True)
    return rows
