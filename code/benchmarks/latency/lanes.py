"""When perception and generation were at work in a few rounds: two lanes for each way.

The passes of a session are wrapped from outside, in this process and, through the function that loads its model, in the
one that perceives. On a GPU an interval lies between two events of the stream, which the clock of this machine is laid
beside once; on a CPU the clock itself is read. A pass that takes a clip's tokens in and writes a word is both.
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
"""Of which SHOWN are drawn, from the FIRST on."""
FIRST, SHOWN = 4, 3


class Trace:
    """What passes did when, by this machine's monotonic clock, which all its processes share."""

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
        """A method, whose calls are marked with what `kinds` says of their arguments."""

        def wrapped(of, *args):
            mine = kinds(of, *args)
            stream = of.stream if TOWER in mine else None  # the tower runs on a stream of its own
            begin = self._now(stream)
            result = function(of, *args)
            if mine:
                self.marks.append((mine, begin, self._now(stream)))
            return result

        return wrapped

    def intervals(self) -> list[dict]:
        """Each with its kinds, and begin and end in seconds."""
        if self.cuda:
            torch.cuda.synchronize()

        def at(mark) -> float:
            return self.began + self.start.elapsed_time(mark) / 1e3 if self.cuda else mark

        return [{"kinds": kinds, "begin": at(begin), "end": at(end)} for kinds, begin, end in self.marks]


def _kinds_of_pass(_, asks: Iterable[StepRequest]) -> list[str]:
    """A pass takes a clip in where it has visual rows, and is generation where it writes or holds text alone."""
    sees = any(bool(ask.prefill.rows.visual.any()) for ask in asks)
    says = any(ask.sample or bool(ask.prefill.rows.text.any() and not ask.prefill.rows.visual.any()) for ask in asks)
    return [CLIP] * sees + [WORD] * says


WRAPPED = (
    (VisionEncoder, "encode", lambda *_: [TOWER]),
    (StepRunner, "step", _kinds_of_pass),
    (StepRunner, "copy_out", lambda *_: [MOVE]),
    (StepRunner, "copy_in", lambda *_: [MOVE]),
)
"""Methods, and the kinds of what a call does."""


@contextmanager
def traced(device: str):
    """A Trace of all passes of this process in the meantime."""
    trace, kept = Trace(device), [(of, name, getattr(of, name)) for of, name, _ in WRAPPED]
    for (of, name, function), (_, _, kinds) in zip(kept, WRAPPED, strict=True):
        setattr(of, name, trace.wrap(function, kinds))
    try:
        yield trace
    finally:
        for of, name, function in kept:
            setattr(of, name, function)


def load_traced(file: str, size: str, layers: int | None, device: str):
    """As `setup.load`, in the process that perceives: at its end it writes its intervals to `file`."""
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
    """If `way` is pipelined: inside, another perception process runs, which writes its intervals to `file`."""
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
    """Intervals of ROUNDS rounds in each way, in seconds from the begin of slot FIRST, and when slots began. A clip
    arrives as the slot before it begins, so that there is always one to be taken in, and never two. Sessions have room
    for `clips` clips and `words` words, or ROUNDS rounds."""
    ways, room = [], (max(clips, ROUNDS), max(words, k * ROUNDS))
    for way, how in runs(bench, chunks):
        chunk, theirs = bench.chunk(how, tokens, k), []
        with (
            tempfile.TemporaryDirectory() as folder,
            traced_perception(bench, Path(folder) / "perception.json", way) as file,
        ):
            for _ in range(2):  # the first warms up
                with bench.open(way, f"wait-{k}", *room, tokens, chunk=chunk) as session, traced(bench.device) as trace:
                    feed_one_ahead(session, bench.clips(ROUNDS, tokens))
                    bench.wait()
                own, visible = trace.intervals(), list(session.visible)
            if way == "pipelined":
                bench.part()  # it writes them at its end
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
    """Feed a clip as the slot before it begins."""
    waiting = list(clips)
    session.feed(waiting.pop())
    while waiting or not session.idle:
        while waiting and len(session.arrived) <= len(session.visible):
            session.feed(waiting.pop())
        session.step()
