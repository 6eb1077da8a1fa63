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
from qwen_vl_streaming.engine.step_request import StepRequest
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.engine.vision_encoder import VisionEncoder

from latency.runs import runs
from latency.setup import Bench, load

TOWER, CLIP, WORD, MOVE = "vision tower", "language model over a clip", "words", "keys and values move"
ROUNDS = 8
"""Number of rounds. SHOWN of them are drawn, starting with slot FIRST."""
FIRST, SHOWN = 4, 3


class Trace:
    """Intervals of work in seconds of the host's monotonic clock, which all processes share."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"
        self.marks: list[tuple[list[str], object, object]] = []
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
                self.marks.append((mine, begin, self._now(stream)))
            return result

        return wrapped

    def intervals(self) -> list[dict]:
        """The recorded intervals: kinds, begin and end in seconds."""
        if self.cuda:
            torch.cuda.synchronize()

        def at(mark) -> float:
            return self.began + self.start.elapsed_time(mark) / 1e3 if self.cuda else mark

        return [{"kinds": kinds, "begin": at(begin), "end": at(end)} for kinds, begin, end in self.marks]


def _kinds_of_pass(_, asks: Iterable[StepRequest]) -> list[str]:
    """Kinds of a step: CLIP if it has visual rows, WORD if it samples a token or a request has only text rows."""
    sees = any(bool(ask.prefill.rows.visual.any()) for ask in asks)
    says = any(ask.sample or bool(ask.prefill.rows.text.any() and not ask.prefill.rows.visual.any()) for ask in asks)
    return [CLIP] * sees + [WORD] * says


WRAPPED = (
    (VisionEncoder, "encode", lambda *_: [TOWER]),
    (StepRunner, "step", _kinds_of_pass),
    (StepRunner, "copy_out", lambda *_: [MOVE]),
    (StepRunner, "copy_in", lambda *_: [MOVE]),
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


def load_traced(file: str, size: str, layers: int | None, device: str):
    """Like `setup.load`, for the perception process, which writes its intervals to `file` when it exits."""
    model = load(size, layers, device)
    tracing = traced(device)
    trace = tracing.__enter__()

    def report() -> None:
        Path(file).write_text(json.dumps(trace.intervals()))
        tracing.__exit__(None, None, None)

    Finalize(None, report, exitpriority=10)
    return model


@contextmanager
def traced_perception(bench: Bench, file: Path, way: str):
    """If `way` is pipelined, use a new perception process in this context, which writes its intervals to `file`."""
    if way != "pipelined":
        yield file
        return
    bench.part()
    usual, bench.loading = bench.loading, partial(load_traced, str(file))
    try:
        yield file
    finally:
        bench.part()
        bench.loading = usual


def lanes(bench: Bench, k: int, clips: int, words: int, tokens: int, chunks: list[str]) -> dict:
    """Intervals of ROUNDS rounds in each mode, in seconds from the start of slot FIRST, and the times at which slots
    start. A clip is fed when the slot before it starts, so that one clip is always waiting, and never two. Sessions
    have room for `clips` clips and `words` tokens, and at least for ROUNDS rounds."""
    ways, room = [], (max(clips, ROUNDS), max(words, k * ROUNDS))
    for way, how in runs(bench, chunks):
        chunk, theirs = bench.chunk(how, tokens, k), []
        with (
            tempfile.TemporaryDirectory() as folder,
            traced_perception(bench, Path(folder) / "perception.json", way) as file,
        ):
            for _ in range(2):  # the first one is a warm-up
                with bench.open(way, f"wait-{k}", *room, tokens, chunk=chunk) as session, traced(bench.device) as trace:
                    feed_one_ahead(session, bench.clips(ROUNDS, tokens))
                    bench.wait()
                own, visible = trace.intervals(), list(session.log.visible)
            if way == "pipelined":
                bench.part()  # the perception process writes its intervals when it exits
                theirs = json.loads(file.read_text())
        start = visible[FIRST - 1]
        shown = [
            {"who": who, "kinds": each["kinds"], "begin": each["begin"] - start, "end": each["end"] - start}
            for who, intervals in (("own", own), ("other", theirs))
            for each in intervals
            if each["end"] > visible[0]
        ]
        each = (visible[FIRST - 1 + SHOWN] - start) / SHOWN
        name = f"{way} {how}" if way == "fused" else way
        ways.append({"way": way, "name": name, "slots": [at - start for at in visible], "intervals": shown})
        print(f"{name}: {len(shown)} intervals, {1e3 * each:.2f} ms a round", flush=True)
    return {"k": k, "tokens": tokens, "shown": SHOWN, "first": FIRST, "lanes": ways}


def feed_one_ahead(session, clips) -> None:
    """Feed each clip when the slot before it starts."""
    waiting = list(clips)
    session.feed(waiting.pop())
    while waiting or not session.idle:
        while waiting and len(session.log.arrived) <= len(session.log.visible):
            session.feed(waiting.pop())
        session.step()
