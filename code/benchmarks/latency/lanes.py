"""Timeline of perception and generation over a few rounds: two lanes for each mode.

Wraps the methods that run a session's steps, in this process and in the perception process, where the function that
loads its model installs the wrappers. On a GPU, intervals lie between two CUDA events, which are aligned once with the
host clock; on a CPU, they are read from the host clock. A step that prefills visual tokens and generates a token
belongs to both lanes.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path

import torch
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.step_request import StepRequest
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.engine.vision_encoder import VisionEncoder

from latency.runs import runs
from latency.setup import Bench, load

TOWER, CLIP, TOKEN, MOVE = "vision encoder", "prefill of a clip", "token generation", "KV transfer"
"""Kinds of work, as named in the JSON file and the plot."""
ROUNDS = 8
"""Number of rounds. SHOWN of them are drawn, starting with slot FIRST."""
FIRST, SHOWN = 4, 3


class Trace:
    """Intervals of work in seconds of the host's monotonic clock, which all processes share."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"
        self.recorded: list[tuple[list[str], object, object]] = []
        if self.cuda:
            torch.cuda.synchronize(device)
            self.start = self._now()
            torch.cuda.synchronize(device)
        self.began = time.perf_counter()

    def _now(self, stream: torch.cuda.Stream | None = None):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event

    def wrap(self, function: Callable, kinds: Callable[..., list[str]]) -> Callable:
        """Wrap a method so that its calls are recorded with the kinds that `kinds` returns for their arguments."""

        def wrapped(of, *args):
            mine = kinds(of, *args)
            stream = of.stream if TOWER in mine else None  # the tower has its own stream
            begin = self._now(stream)
            result = function(of, *args)
            if mine:
                self.recorded.append((mine, begin, self._now(stream)))
            return result

        return wrapped

    def intervals(self) -> list[dict]:
        """The recorded intervals: kinds, begin and end in seconds."""
        if self.cuda:
            torch.cuda.synchronize()

        def at(event) -> float:
            return self.began + self.start.elapsed_time(event) / 1e3 if self.cuda else event

        return [{"kinds": kinds, "begin": at(begin), "end": at(end)} for kinds, begin, end in self.recorded]


def _kinds_of_step(_, requests: Iterable[StepRequest]) -> list[str]:
    """Kinds of a step: CLIP if it has visual rows, TOKEN if it samples a token or a request has only text rows."""
    prefills = any(bool(request.prefill.visual.any()) for request in requests)
    generates = any(
        request.sample or bool(request.prefill.text.any() and not request.prefill.visual.any()) for request in requests
    )
    return [CLIP] * prefills + [TOKEN] * generates


WRAPPED = (
    (VisionEncoder, "encode", lambda *_: [TOWER]),
    (StepRunner, "step", _kinds_of_step),
    (PagedKVCache, "copy_out", lambda *_: [MOVE]),
    (PagedKVCache, "copy_in", lambda *_: [MOVE]),
)
"""Methods to wrap, and functions that return the kinds of a call."""


@contextmanager
def traced(device: str):
    """A context that yields a Trace of the steps of this process."""
    trace, kept = Trace(device), [(of, name, getattr(of, name)) for of, name, _ in WRAPPED]
    for (of, name, function), (_, _, kinds) in zip(kept, WRAPPED, strict=True):
        setattr(of, name, trace.wrap(function, kinds))
    try:
        yield trace
    finally:
        for of, name, function in kept:
            setattr(of, name, function)


def load_traced(file: str, size: str, layers: int | None, device: str, weights: str | None = None):
    """Like `setup.load`, for the perception process, which writes its intervals to `file` when it exits."""
    model = load(size, layers, device, weights)
    tracing = traced(device)
    trace = tracing.__enter__()

    def report() -> None:
        Path(file).write_text(json.dumps(trace.intervals()))
        tracing.__exit__(None, None, None)

    Finalize(None, report, exitpriority=10)
    return model


@contextmanager
def traced_perception(bench: Bench, file: Path, mode: str):
    """If `mode` is pipelined, use a new perception process in this context, which writes its intervals to `file`."""
    if mode != "pipelined":
        yield file
        return
    bench.stop_perception()
    usual, bench.loading = bench.loading, partial(load_traced, str(file))
    try:
        yield file
    finally:
        bench.stop_perception()
        bench.loading = usual


def lanes(bench: Bench, k: int, clips: int, answer_tokens: int, tokens: int, chunks: list[str]) -> dict:
    """Intervals of ROUNDS rounds in each mode, in seconds from the start of slot FIRST, and the times at which slots
    start. A clip is fed when the slot before it starts, so that one clip is always waiting, and never two. Sessions
    have room for `clips` clips and `answer_tokens` tokens, and at least for ROUNDS rounds."""
    modes, room = [], (max(clips, ROUNDS), max(answer_tokens, k * ROUNDS))
    for mode, how in runs(bench, chunks):
        prefill, theirs = bench.prefill(how, tokens, k), []
        with (
            tempfile.TemporaryDirectory() as folder,
            traced_perception(bench, Path(folder) / "perception.json", mode) as file,
        ):
            for _ in range(2):  # the first one is a warm-up
                with bench.open(mode, f"wait-{k}", *room, tokens, **prefill) as session, traced(bench.device) as trace:
                    feed_one_ahead(session, bench.clips(ROUNDS, tokens))
                    bench.wait()
                own, visible = trace.intervals(), list(session.log.visible)
            if mode == "pipelined":
                bench.stop_perception()  # the perception process writes its intervals when it exits
                theirs = json.loads(file.read_text())
        start = visible[FIRST - 1]
        shown = [
            {"who": who, "kinds": each["kinds"], "begin": each["begin"] - start, "end": each["end"] - start}
            for who, intervals in (("own", own), ("other", theirs))
            for each in intervals
            if each["end"] > visible[0]
        ]
        each = (visible[FIRST - 1 + SHOWN] - start) / SHOWN
        name = f"{mode} {how}" if mode == "fused" else mode
        modes.append({"way": mode, "name": name, "slots": [at - start for at in visible], "intervals": shown})
        print(f"{name}: {len(shown)} intervals, {1e3 * each:.2f} ms/round", flush=True)
    return {"k": k, "tokens": tokens, "shown": SHOWN, "first": FIRST, "lanes": modes}


def feed_one_ahead(session, clips) -> None:
    """Feed each clip when the slot before it starts."""
    waiting = list(clips)
    session.feed(waiting.pop())
    while waiting or not session.idle:
        while waiting and len(session.log.arrived) <= len(session.log.visible):
            session.feed(waiting.pop())
        session.step()
