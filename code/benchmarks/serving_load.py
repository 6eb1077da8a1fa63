"""Drives a session pool alone, and the server by clients on the loopback, with numbers of viewers, and finds which of
them are sustained: the command `load` of `serving.py`, which says what is measured.
"""

import argparse
import asyncio
import contextlib
import heapq
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from latency.many import LATE, verdict
from latency.runs import percentile
from latency.setup import slot_ends, write_json
from PIL import Image
from qwen_vl_streaming.live.setup import load_on
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels
from qwen_vl_streaming.serve.catalog import load_catalog, place
from qwen_vl_streaming.serve.frames import decode_picture
from qwen_vl_streaming.serve.model_process import make_pool
from qwen_vl_streaming.serve.options import parse as parse_serve
from qwen_vl_streaming.sessions import Session
from qwen_vl_streaming.timeline.variants import VARIANTS
from serving_clients import Talk
from websockets.asyncio.client import ClientConnection, connect

WIDTH, HEIGHT = 364, 196
"""Of the frames: 91 visual tokens a clip, as in the other benchmarks."""
KEPT = 16
"""Distinct pictures."""
CLIENTS_PER_PROCESS = 48
CONNECT_SECONDS = 1.0
"""A session is opened that long before its first frame."""
SIDES = {"alone": "by the engine alone", "served": "through the server"}


@dataclass(frozen=True)
class Row:
    """A number of sessions, with what both sides need to know. Times are in seconds from the first start."""

    starts: list[float]
    """When each session's first clip begins."""
    measured: float
    """When the measurement begins,"""
    end: float
    """and when the last clip begins at the latest."""
    k: int

    def clips(self, start: float) -> int:
        """Of a session that starts at `start`."""
        return max(1, math.floor(self.end - start))


def make_row(count: int, arguments: argparse.Namespace) -> Row:
    draw = random.Random(0)
    ramp = arguments.ramp * count / max(arguments.sessions)
    starts = sorted(draw.uniform(0, ramp) for _ in range(count))
    measured = ramp + arguments.age
    return Row(starts, measured, measured + arguments.seconds, arguments.k)


# The engine alone


def engine_alone(flags: list[str], rows: list[Row], results) -> None:
    """In a process of its own: send the measured values of each of `rows` to the connection `results`."""
    settings = parse_serve("", {}, flags)
    models = load_catalog(settings)
    (served,), (spec, *_) = models.values(), place(models, settings)
    pool = make_pool(load_on(spec.path, spec.device, spec.dtype), spec, 1)
    frames = torch.from_numpy(np.stack([decode_picture(data, "jpeg", 10**7, (HEIGHT, WIDTH)) for data in pictures()]))
    pixels = [clip.to(spec.dtype) for clip in clip_pixels(served.processor, frames)[0]]
    if pool.runner.on_cuda:  # as the server, which copies clips into pinned memory outside the model's loop
        pixels = [clip.pin_memory() for clip in pixels]
    template = served.template(QUESTIONS[-1])
    layout, variant = served.layout(template, (HEIGHT, WIDTH)), VARIANTS[spec.variant]
    for row in rows:
        options = {**spec.limits, "schedule": f"wait-{row.k}", "clock": time.perf_counter}
        sessions: dict[int, Session] = {}
        began = time.perf_counter() + CONNECT_SECONDS
        due = [(start - CONNECT_SECONDS, number, -1) for number, start in enumerate(row.starts)]
        heapq.heapify(due)
        while due or not pool.idle:
            while due and time.perf_counter() - began >= due[0][0]:
                _, number, clip = heapq.heappop(due)
                if clip < 0:
                    sessions[number] = pool.open(variant, template, layout, **options)
                elif not sessions[number].done:
                    sessions[number].feed(pixels[clip % len(pixels)])
                start = row.starts[number]
                if clip + 1 < row.clips(start):  # a clip is complete when its second frame has come
                    heapq.heappush(due, (start + clip + 1 + 1 / 2, number, clip + 1))
            if not pool.idle:
                pool.step()
            else:
                wait = began + due[0][0] - time.perf_counter() if due else 0.0
                time.sleep(max(0.0, min(1e-3, wait)))
        late = [
            [end - (began + start + clip + 1 / 2) for clip, end in enumerate(slot_ends(sessions[number]))]
            for number, start in enumerate(row.starts)
        ]
        for session in sessions.values():
            session.close()
        pool.step()
        measured = [
            [lag for clip, lag in enumerate(lags) if start + clip >= row.measured]
            for lags, start in zip(late, row.starts, strict=True)
        ]
        results.send({"sessions": len(row.starts), **verdict(measured)})


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
    """JPEGs as large as a camera's of this size, about 13 KB: coloured areas with a little noise."""
    found = []
    for seed in range(KEPT):
        draw, file = np.random.default_rng(seed), io.BytesIO()
        areas = Image.fromarray(draw.integers(0, 256, (HEIGHT // 14, WIDTH // 14, 3), dtype=np.uint8))
        smooth = np.asarray(areas.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + draw.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=80)
        found.append(file.getvalue())
    return found


class Timed(ClientConnection):
    """Notes when bytes arrive: reading a message out of them is the client's own work."""

    at = 0.0

    def data_received(self, data: bytes) -> None:
        self.at = time.monotonic()
        super().data_received(data)


async def camera(address: str, records: Path, row: Row, began: float, start: float) -> dict:
    """One viewer: 2 frames a second. Returns the lag of each measured clip, and the server's share of the age of each
    token that saw no later one."""
    data, begun, sent, ended, tokens = pictures(), {}, {}, {}, []
    begin, clips = began + start, row.clips(start)
    await asyncio.sleep(max(0.0, begin - CONNECT_SECONDS - time.monotonic()))
    options = {"compression": None, "max_queue": None, "open_timeout": 60, "create_connection": Timed}
    async with Talk(connect(address, **options)) as viewer:
        await viewer.begin(WIDTH, HEIGHT, schedule=f"wait-{row.k}")
        await viewer.until("session.updated")

        async def send() -> None:
            for number in range(2 * clips):
                await asyncio.sleep(max(0.0, begin + number / 2 - time.monotonic()))
                begun[number / 2] = time.monotonic()
                with contextlib.suppress(Exception):  # the server ends a session that is too slow
                    await viewer.frame(number / 2, data[number % KEPT])
                sent[number / 2] = time.monotonic()
            await asyncio.sleep(2 * LATE)
            with contextlib.suppress(Exception):
                await viewer.say("response.cancel")

        sender = asyncio.create_task(send())
        while True:
            text, at = await viewer.socket.recv(), viewer.socket.at  # or that of a later message, never before
            if (message := json.loads(text))["type"] == "response.done":
                break
            if message.get("token_ids"):
                tokens.append((message["capture_time"], at))
        sender.cancel()
    shares, (times, received) = [], model_times(records, message["response"]["record_id"])
    for number, (moment, at) in enumerate(tokens):
        if moment in sent and start + (clip := int(moment)) >= row.measured:
            ended[clip] = at - begun[moment]
            if number < len(times) and clip < len(received):
                shares.append(at - sent[moment] - (times[number] - received[clip]))
    return {"lags": [ended[clip] for clip in sorted(ended)], "shares": shares, "status": message["response"]["status"]}


def model_times(records: Path, key: str | None) -> tuple[list[float], list[float]]:
    """When the model's process had written each token and received each clip, as the record `key` says. Empty if
    that process was lost."""
    path = next(records.glob(f"*-{key}.json"), None)
    record = json.loads(path.read_text()) if path else {"times": [], "about": {}}
    return record["times"], record["about"].get("received", [])


def cameras(address: str, records: Path, row: Row, began: float, starts: list[float]) -> list[dict]:
    """In a process of its own: a viewer for each of `starts`."""

    async def all_of_them() -> list[dict]:
        return await asyncio.gather(*(camera(address, records, row, began, start) for start in starts))

    return asyncio.run(all_of_them())


def through_server(address: str, records: Path, row: Row, clients) -> dict:
    """The measured values of a row; `clients` is a pool of processes."""
    began = time.monotonic() + CONNECT_SECONDS + 1
    groups = -(-len(row.starts) // CLIENTS_PER_PROCESS)
    tasks = [(address, records, row, began, row.starts[number::groups]) for number in range(groups)]
    viewers = [viewer for found in clients.starmap(cameras, tasks, chunksize=1) for viewer in found]
    shares = [share for viewer in viewers for share in viewer["shares"]]
    statuses = Counter(viewer["status"] for viewer in viewers)
    found = verdict([viewer["lags"] for viewer in viewers])
    sustained = found["sustained"] and "too_slow" not in statuses
    return {"sessions": len(viewers), **found, "sustained": sustained, "shares": shares, "statuses": dict(statuses)}


def ladder(rows: list[Row], measure: Callable[[Row], dict]) -> Iterator[dict]:
    """What `measure` finds for each of `rows`, up to the first that is not sustained."""
    for row in rows:
        yield (found := measure(row))
        lags, shares = found["lags"] or [float("nan")] * 2, found.get("shares")
        share = f"{1e3 * percentile(shares, 95):>12.2f}" if shares else f"{'':>12}"
        end = f"{'yes' if found['sustained'] else 'no'} {found.get('statuses', '')}"
        times = f"{1e3 * median(lags):>12.1f}{1e3 * percentile(lags, 95):>10.1f}{1e3 * found['grown']:>12.1f}"
        print(f"{found['sessions']:>8}{times}{share}  {end}", flush=True)
        if not found["sustained"]:
            break


def load(arguments: argparse.Namespace, flags: list[str], records: Path) -> None:
    rows = [make_row(count, arguments) for count in sorted(arguments.sessions)]
    about = {name: getattr(arguments, name) for name in ("size", "k", "seconds", "age", "ramp")}
    found: dict = {"about": {**about, "cpus": os.cpu_count()}, "alone": [], "served": []}

    def keep(side: str, each: Iterator[dict]) -> int:
        """Writes the file after each row. Returns the largest number of sessions that is sustained."""
        for row in each:
            found[side].append(row)
            write_json(arguments.output, found)
        return max((row["sessions"] for row in found[side] if row["sustained"]), default=0)

    print(f"{'sessions':>8}{'lag ms: 50%':>12}{'95%':>10}{'later by':>12}{'share 95%':>12}  sustained")
    context = multiprocessing.get_context("spawn")
    most = dict.fromkeys(arguments.sides, 0)
    if "alone" in most:
        print("the engine alone", flush=True)
        results, theirs = context.Pipe(duplex=False)
        process = context.Process(target=engine_alone, args=(flags, rows, theirs), daemon=True)
        process.start()
        theirs.close()  # so that `recv` raises EOFError if the process dies
        most["alone"] = keep("alone", ladder(rows, lambda _: results.recv()))
        process.kill()
        process.join()
    if "served" in most:
        print("through the server", flush=True)
        with context.Pool(-(-max(arguments.sessions) // CLIENTS_PER_PROCESS)) as clients, server(flags) as (address, _):
            most["served"] = keep("served", ladder(rows, lambda row: through_server(address, records, row, clients)))
    print("sustained: " + ", ".join(f"{number} sessions {SIDES[side]}" for side, number in most.items()))
