"""Time of each kind of forward step, on the device and with the host; kernels of steps that generate a token and of the
vision encoder."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable
from statistics import median

import torch
from qwen_vl_streaming.engine.step_request import StepRequest
from qwen_vl_streaming.engine.step_runner import StepRunner
from workload import GRID, LAYOUT

from latency.setup import TOKENS, Bench, play

REPEATS = 50
SHOWN = 14
"""Number of kernels in the printed list."""


@contextlib.contextmanager
def last_requests(bench: Bench, k: int, clips: int, answer_tokens: int):
    """Play a video of `clips` clips in fused mode; yield the step runner, its session still open, and the last request
    of each kind of step. The kind is (prefill pieces, whether a token is sampled)."""
    kept: dict[tuple[int, bool], StepRequest] = {}
    with bench.open("fused", f"wait-{k}", clips, max(answer_tokens, k * clips)) as session:
        run = session.runner.step

        def keep(requests):
            (request,) = requests
            kept[int(len(request.prefill) > 0), request.sample] = request
            return run(requests)

        session.runner.step = keep
        play(bench, session, bench.clips(clips), ends=True)
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


def steps(bench: Bench, arguments: Namespace) -> dict:
    """Seconds of each kind of step at the end of a video of `clips` clips, printed in milliseconds: the step replayed
    alone, the whole of `StepRunner.step`, and the host's share that packs the inputs."""
    clips, answer_tokens = arguments.clips, arguments.answer_tokens
    floors, table, kernels = bench.floors(), [], {}
    print(
        f"\nsteps at the end of {clips} clips of {TOKENS} visual tokens\n{'rows':>6}{'token':>6}{'ms alone':>10}"
        f"{'run':>8}{'host':>8}{'floor':>8}{'x floor':>9}"
    )
    with last_requests(bench, arguments.k, clips, answer_tokens) as (made, kept):
        for (pieces, sample), request in sorted(kept.items()):
            alone = each(bench, replay(made, pieces, sample, request))
            whole = each(bench, lambda request=request: made.step([request]))
            began = time.perf_counter()
            for _ in range(REPEATS):
                made.inputs[pieces].pack([request])
            host = (time.perf_counter() - began) / REPEATS
            work = floors.decode(clips, answer_tokens) if sample else floors.prefill(clips)
            if sample and pieces:
                work = work + floors.prefill(clips).part(len(request.prefill) / TOKENS, floors.weight_bytes)
            floor = floors.seconds(work)
            row = {"rows": len(request.decode) + len(request.prefill), "write": sample}
            table.append({**row, "alone": alone, "run": whole, "host": host, "floor": floor})
            print(
                f"{row['rows']:>6}{'yes' if sample else 'no':>6}{1e3 * alone:>10.3f}{1e3 * whole:>8.3f}"
                f"{1e3 * host:>8.3f}{1e3 * floor:>8.3f}{alone / floor:>9.2f}",
                flush=True,
            )
        for name, pieces in (("decode", 0), ("prefill and decode", 1)):
            kernels[name] = profile(bench, f"{name} step", replay(made, pieces, True, kept[pieces, True]))
        kernels["vision encoder"] = profile(bench, "vision encoder", encode(bench, made))
    return {"tokens": TOKENS, "steps": table, "kernels": kernels}


def replay(made: StepRunner, pieces: int, sample: bool, request: StepRequest) -> Callable[[], object]:
    """A function that repeats the device's part of the step for `request`: a CUDA graph, or the step itself if there is
    none."""
    made.step([request])
    graph = made.graphs.get((pieces, sample))

    @torch.no_grad()
    def again():
        made._step(pieces, sample)

    return again if graph is None else graph.replay


def encode(bench: Bench, made: StepRunner) -> Callable[[], object]:
    """A function that encodes one clip: a CUDA graph, or the encoder itself if there is none."""
    encoder, clips = made.vision_encoder, bench.clips(1)
    graphs = encoder.graphs.get(GRID, {})
    return graphs[1][0].replay if graphs else lambda: encoder.encode(clips, [LAYOUT])


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
    spent, count = sum(row["ms"] for row in rows), sum(row["count"] for row in rows)
    print(f"\n{name} alone: {spent:.3f} ms in {count:.0f} kernels")
    print(f"{'ms':>8}{'count':>7}  kernel")
    for row in rows[:SHOWN]:
        print(f"{row['ms']:>8.3f}{row['count']:>7.0f}  {row['name'][:100]}", flush=True)
    return rows
