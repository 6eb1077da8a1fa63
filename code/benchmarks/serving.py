"""How many viewers the server keeps up with, beside the engine alone, and what random clients do to it.

    python code/benchmarks/serving.py load --size 7B --sessions 64 128 144 160 176
    python code/benchmarks/serving.py fuzz --clients 200

`load` drives one session pool without a server, then `python -m qwen_vl_streaming.serve` by clients on the loopback
that send two JPEG frames a second each. Both have the same model, frames and window. A number of sessions is sustained
if 95% of the clips have all their tokens within a second of the clip, and the median lag of the last quarter exceeds
that of the first by at most a quarter of a second. The server's share of a token's age is what the model does not
account for: from a frame's sending to its clip's arrival at the model, and from the token to its receipt.

Weights are random; `--size tiny` tries it on a CPU.
"""

import argparse
import asyncio
import contextlib
import heapq
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
import torch
from inputs import make_checkpoint
from latency.runs import percentile
from latency.setup import slot_ends, write_json
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.live.setup import load_on
from qwen_vl_streaming.model.prompts import QUESTIONS
from qwen_vl_streaming.model.trained import training_keys
from qwen_vl_streaming.serve.catalog import load_catalog, place
from qwen_vl_streaming.serve.frames import decode_picture, prepare_clip
from qwen_vl_streaming.serve.model_process import make_pool
from qwen_vl_streaming.serve.options import parse as parse_serve
from qwen_vl_streaming.timeline.variants import VARIANTS
from serving_clients import Talk, picture_bytes, random_client
from websockets.asyncio.client import connect

LATE = 1.0
"""Seconds from a clip to the deadline of its tokens."""
WIDTH, HEIGHT = 364, 196
"""Of the frames: 91 visual tokens a clip, as in the other benchmarks."""
KEPT = 16
"""Distinct pictures."""
CLIENTS_PER_PROCESS = 48


def checkpoint_of(size: str, layers: int | None, folder: Path, k: int) -> Path:
    """A checkpoint with random weights that takes frames of WIDTH x HEIGHT, trained as group."""
    checkpoint = make_checkpoint(size, layers, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    pixels = WIDTH * HEIGHT
    budget = {"min_pixels_per_frame": pixels, "max_pixels_per_frame": pixels, "max_pixels_per_video": 60 * pixels}
    config.update(training_keys(VARIANTS["group"], k), pixel_budget={**budget, "budget": "stream"})
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def verdict(late: list[list[float]]) -> dict:
    """Whether the lags of all clips, a list for each session, are sustained."""
    lags = [lag for mine in late for lag in mine]
    if not lags:
        return {"lags": [], "grown": 0.0, "sustained": False}
    quarter = max(1, max(map(len, late)) // 4)
    later, earlier = ([lag for mine in late for lag in mine[part]] for part in (slice(-quarter, None), slice(quarter)))
    grown = median(later) - median(earlier)
    return {"lags": lags, "grown": grown, "sustained": percentile(lags, 95) <= LATE and grown <= LATE / 4}


# The engine alone


def engine_alone(flags: list[str], counts: list[int], clips: int, age: int, k: int, results) -> None:
    """In a process of its own: put a row for each of `counts` into `results`, and None at the end."""
    settings = parse_serve("", {}, flags)
    models = load_catalog(settings)
    (served,), (spec, *_) = models.values(), place(models, settings)
    pool = make_pool(load_on(spec.path, spec.device, spec.dtype), spec, 1)
    frames = torch.stack([decode_picture(data, "jpeg", 10**7, (HEIGHT, WIDTH)) for data in pictures()])
    prepared = [prepare_clip(served.processor, frames[i : i + 2], spec.dtype) for i in range(0, KEPT, 2)]
    pixels = [torch.frombuffer(bytearray(clip.raw), dtype=spec.dtype).view(clip.shape) for clip in prepared]
    template = served.template(QUESTIONS[-1])
    layout, variant = served.layout(template, (HEIGHT, WIDTH)), VARIANTS[spec.variant]
    for count in counts:
        draw = random.Random(0)
        options = {**spec.limits, "schedule": f"wait-{k}", "clock": time.perf_counter}
        sessions = [pool.open(variant, template, layout, **options) for _ in range(count)]
        began = time.perf_counter() + 0.1
        phases = [draw.random() for _ in sessions]
        due = [(began + phase, number, 0) for number, phase in enumerate(phases)]
        heapq.heapify(due)
        while due or not pool.idle:
            while due and time.perf_counter() >= due[0][0]:
                at, number, clip = heapq.heappop(due)
                if not sessions[number].done:
                    sessions[number].feed(pixels[clip % len(pixels)])
                if clip + 1 < clips:
                    heapq.heappush(due, (at + 1, number, clip + 1))
            if not pool.idle:
                pool.step()
            else:
                time.sleep(max(0.0, min(1e-3, due[0][0] - time.perf_counter()) if due else 0.0))
        late = [
            [end - (began + phase + clip) for clip, end in enumerate(slot_ends(session)) if clip >= age]
            for session, phase in zip(sessions, phases, strict=True)
        ]
        for session in sessions:
            session.close()
        pool.step()
        results.put({"sessions": count, **verdict(late)})
    results.put(None)


# Through the server


@contextlib.contextmanager
def server(flags: list[str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start the server; yields its WebSocket address and its process."""
    command = [sys.executable, "-m", "qwen_vl_streaming.serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found = None
    try:
        for line in process.stdout:
            if found := re.search(r"open http://([^/]+)/", line):
                break
        if not found:
            sys.exit(process.wait() or 1)
        yield f"ws://{found[1]}/v1/realtime", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def pictures() -> list[bytes]:
    return [picture_bytes((WIDTH, HEIGHT), seed=seed) for seed in range(KEPT)]


async def camera(address: str, clips: int, k: int, ready: list, go: asyncio.Future, phase: float) -> dict:
    """One viewer: 2 frames a second. Returns the lag of each clip, and the server's share of each token's age."""
    data, sent, acknowledged, ended, shares = pictures(), {}, {}, {}, []
    async with Talk(connect(address, compression=None, max_queue=None, open_timeout=60)) as viewer:
        await viewer.begin(WIDTH, HEIGHT, schedule=f"wait-{k}")
        await viewer.until("session.updated")
        ready.append(viewer)
        begin = await go + phase - 0.5

        async def send() -> None:
            for number in range(2 * clips):
                await asyncio.sleep(max(0.0, begin + number / 2 - time.monotonic()))
                sent[number / 2] = time.monotonic()
                with contextlib.suppress(Exception):  # the server ends a session that is too slow
                    await viewer.frame(number / 2, data[number % KEPT])
            await asyncio.sleep(2 * LATE)
            with contextlib.suppress(Exception):
                await viewer.say("response.cancel")

        sender = asyncio.create_task(send())
        while (message := json.loads(await viewer.socket.recv()))["type"] != "response.done":
            at, moment = time.monotonic(), message.get("capture_time", message.get("time"))
            if message["type"] == "input_video_frame.acknowledged":
                acknowledged[moment] = message["age_ms"] / 1e3
            elif message["type"] == "response.output_text.delta" and moment in sent:
                ended[int(moment)] = at - sent[moment]
                shares.append(at - sent[moment] - message["age_ms"] / 1e3 + acknowledged.get(moment, 0.0))
        sender.cancel()
    return {"lags": ended, "shares": shares, "status": message["response"]["status"]}


def cameras(address: str, phases: list[float], clips: int, k: int, gates, results) -> None:
    """In a process of its own: a viewer for each of `phases`."""
    ready_gate, go_gate, start = gates

    async def all_of_them() -> list[dict]:
        ready: list = []
        go = asyncio.get_running_loop().create_future()
        tasks = [asyncio.create_task(camera(address, clips, k, ready, go, phase)) for phase in phases]
        while len(ready) < len(phases) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(ready_gate.wait)
        await asyncio.to_thread(go_gate.wait)
        go.set_result(start.value)
        return await asyncio.gather(*tasks)

    results.put(asyncio.run(all_of_them()))


def through_server(address: str, count: int, clips: int, age: int, k: int) -> dict:
    """A row of `load` for `count` viewers."""
    draw, context = random.Random(0), multiprocessing.get_context("spawn")
    phases = [draw.random() for _ in range(count)]
    groups = [phases[i : i + CLIENTS_PER_PROCESS] for i in range(0, count, CLIENTS_PER_PROCESS)]
    gates = context.Barrier(len(groups) + 1), context.Barrier(len(groups) + 1), context.Value("d")
    results = context.Queue()
    processes = [
        context.Process(target=cameras, args=(address, group, clips, k, gates, results), daemon=True)
        for group in groups
    ]
    for process in processes:
        process.start()
    gates[0].wait(300)
    gates[2].value = time.monotonic() + 1
    gates[1].wait(60)
    viewers = [viewer for _ in processes for viewer in results.get(timeout=clips + 300)]
    late = [[lag for clip, lag in sorted(viewer["lags"].items()) if clip >= age] for viewer in viewers]
    shares = [share for viewer in viewers for share in viewer["shares"]]
    statuses = Counter(viewer["status"] for viewer in viewers)
    row = {"sessions": count, **verdict(late), "shares": shares, "statuses": dict(statuses)}
    return {**row, "sustained": row["sustained"] and "too_slow" not in statuses}


def ladder(counts: list[int], measure) -> list[dict]:
    """Rows of `measure` for ascending `counts`, up to the first that is not sustained."""
    rows = []
    for count in sorted(counts):
        rows.append(row := measure(count))
        lags, shares = row["lags"] or [float("nan")] * 2, row.get("shares")
        share = f"{1e3 * percentile(shares, 95):>12.2f}" if shares else f"{'':>12}"
        print(
            f"{count:>8}{1e3 * median(lags):>12.1f}{1e3 * percentile(lags, 95):>10.1f}{1e3 * row['grown']:>12.1f}"
            f"{share}  {'yes' if row['sustained'] else 'no'} {row.get('statuses', '')}",
            flush=True,
        )
        if not row["sustained"]:
            break
    return rows


def load(arguments: argparse.Namespace, flags: list[str]) -> None:
    clips, age, k = arguments.age + arguments.seconds, arguments.age, arguments.k
    print(f"{'sessions':>8}{'lag ms: 50%':>12}{'95%':>10}{'later by':>12}{'share 95%':>12}  sustained")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=engine_alone, args=(flags, sorted(arguments.sessions), clips, age, k, results))
    process.start()
    print("the engine alone")
    alone = ladder(arguments.sessions, lambda _: results.get(timeout=1800))
    process.terminate()
    process.join()
    print("through the server")
    with server(flags) as (address, _):
        served = ladder(arguments.sessions, lambda count: through_server(address, count, clips, age, k))
    most = [max((row["sessions"] for row in rows if row["sustained"]), default=0) for rows in (alone, served)]
    print(f"sustained: {most[0]} sessions by the engine alone, {most[1]} through the server")
    about = {"size": arguments.size, "k": k, "seconds": arguments.seconds, "age": age, "cpus": os.cpu_count()}
    write_json(arguments.output, {"about": about, "alone": alone, "served": served, "sustained": most})


def fuzz(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Random clients, eight at a time or so; then nothing may be left behind."""
    with server(flags) as (address, process):
        before = psutil.Process(process.pid)
        files, began = before.num_fds(), time.monotonic()

        async def all_of_them() -> list[str]:
            gate = asyncio.Semaphore(16)

            async def one(number: int) -> str:
                async with gate, asyncio.timeout(120):
                    return await random_client(connect(address), random.Random(f"{arguments.seed} {number}"))

            return await asyncio.gather(*map(one, range(arguments.clients)))

        ends = asyncio.run(all_of_them())
        time.sleep(1)
        left = before.num_fds() - files
        print(f"{arguments.clients} clients in {time.monotonic() - began:.1f} s: {dict(Counter(ends))}")
        print(f"{left} open files left, {before.memory_info().rss / 2**20:.0f} MiB")
        if left > 2 or process.poll() is not None:
            sys.exit("error: something was left behind")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("load", "fuzz"))
    add("--size", choices=("tiny", "3B", "7B"), default="tiny")
    add("--layers", type=int, help="fewer layers, to try it out")
    add("--sessions", type=int, nargs="+", default=[1, 64, 128, 144, 160, 176], help="of load")
    add("--seconds", type=int, default=20, help="of video that is measured (default: 20)")
    add("--age", type=int, default=15, help="clips before that (default: 15)")
    add("--k", type=int, default=3, help="tokens a clip (default: 3)")
    add("--window", type=int, nargs=2, default=(60, 400), help="clips and tokens (default: 60 400)")
    add("--clients", type=int, default=200, help="of fuzz (default: 200)")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, default=Path("serving"), help="of checkpoint and records (default: serving)")
    add("--output", type=Path, default=Path("serving/serving.json"), help="of load (default: serving/serving.json)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(arguments.size, arguments.layers, arguments.folder, arguments.k)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as records:
        flags = ["--model", str(checkpoint), "--port", "0", "--records", records, "--sessions-per-client", "9999"]
        flags += ["--window", *map(str, arguments.window), "--sessions"]
        if arguments.command == "load":
            load(arguments, [*flags, str(max(arguments.sessions))])
        else:
            fuzz(arguments, [*flags, "8", "--max-new-tokens", "20", "--window", "8", "40"])


if __name__ == "__main__":
    run(main)
