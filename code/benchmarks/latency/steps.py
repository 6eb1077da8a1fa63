"""Time of each kind of forward step, on the device and with the host; kernels of steps that generate a token and of the
vision encoder."""

import contextlib
import time
from collections.abc import Callable
from statistics import median

import torch
from qwen_vl_streaming.engine.step_request import StepRequest
from qwen_vl_streaming.engine.step_runner import StepRunner

from latency.setup import GRIDS, Bench, play

REPEATS = 50
SHOWN = 14
"""Number of kernels in the printed list."""


@contextlib.contextmanager
def last_requests(bench: Bench, mode: str, k: int, clips: int, answer_tokens: int, tokens: int, prefill: dict):
    """Play a video of `clips` clips; yield the step runner, its session still open, and the last request of each kind
    of step. The kind is (prefill chunks, whether a token is sampled)."""
    kept: dict[tuple[int, bool], StepRequest] = {}
    with bench.open(mode, f"wait-{k}", clips, max(answer_tokens, k * clips), tokens, **prefill) as session:
        run = session.runner.step

        def keep(requests):
            (request,) = requests
            (_, pieces), sample = session.runner.kind_of(requests)
            kept[pieces, sample] = request
            return run(requests)

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


def steps(bench: Bench, k: int, clips: int, answer_tokens: int, tokens: int, chunks: list[str]) -> dict:
    """Seconds of each kind of step at the end of a video of `clips` clips, printed in milliseconds: the step replayed
    alone, the whole of `StepRunner.step`, and the host's share that packs the inputs."""
    floors, table, kernels = bench.floors(tokens), [], {}
    print(
        f"\nsteps at the end of {clips} clips of {tokens} visual tokens\n{'prefill':<14}{'rows':>6}{'token':>6}"
        f"{'ms alone':>10}{'run':>8}{'host':>8}{'floor':>8}{'x floor':>9}"
    )
    for how in chunks:
        with last_requests(bench, "fused", k, clips, answer_tokens, tokens, bench.prefill(how, tokens, k)) as (
            made,
            kept,
        ):
            for (pieces, sample), request in sorted(kept.items()):
                alone = each(bench, replay(made, pieces, sample, request))
                whole = each(bench, lambda made=made, request=request: made.step([request]))
                began = time.perf_counter()
                for _ in range(REPEATS):
                    made.inputs[1, pieces].pack([request])
                host = (time.perf_counter() - began) / REPEATS
                work = floors.decode(clips, answer_tokens) if sample else floors.prefill(clips)
                if sample and pieces:
                    share = len(request.prefill) / tokens
                    work = work + floors.prefill(clips).part(share, floors.weight_bytes)
                floor = floors.seconds(work)
                row = {"how": how, "rows": len(request.decode) + len(request.prefill), "write": sample}
                table.append({**row, "alone": alone, "run": whole, "host": host, "floor": floor})
                print(
                    f"{how if pieces else '':<14}{row['rows']:>6}{'yes' if sample else 'no':>6}{1e3 * alone:>10.3f}"
                    f"{1e3 * whole:>8.3f}{1e3 * host:>8.3f}{1e3 * floor:>8.3f}{alone / floor:>9.2f}",
                    flush=True,
                )
            if how == chunks[0]:
                beside = min(pieces for pieces, sample in kept if pieces and sample)
                for name, pieces in (("decode", 0), ("prefill and decode", beside)):
                    kernels[name] = profile(bench, f"{name} step", replay(made, pieces, True, kept[pieces, True]))
                kernels["vision encoder"] = profile(bench, "vision encoder", encode(bench, made, tokens))
    return {"tokens": tokens, "steps": table, "kernels": kernels}


def replay(made: StepRunner, pieces: int, sample: bool, request: StepRequest) -> Callable[[], object]:
    """A function that repeats the device's part of the step for `request`: a CUDA graph, or the step itself if there is
    none."""
    made.step([request])
    graph = made.graphs.get(((1, pieces), sample))

    @torch.no_grad()
    def again():
        made._step((1, pieces), sample)

    return again if graph is None else graph.replay


def encode(bench: Bench, made: StepRunner, tokens: int) -> Callable[[], object]:
    """A function that encodes one clip: a CUDA graph, or the encoder itself if there is none."""
    encoder, clips = made.vision_encoder, bench.clips(1, tokens)
    graphs = encoder.graphs.get(GRIDS[tokens], {})
    return graphs[1][0].replay if graphs else lambda: encoder.encode(clips, [bench.layout(tokens)])


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
