"""CUDA graphs are captured on the device of the model, with stand-ins for the functions of CUDA."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import qwen_vl_streaming
import torch
from qwen_vl_streaming.engine.cuda_graph import WARM_UP_RUNS, capture
from qwen_vl_streaming.engine.runner import Runner
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.engine.vision_encoder import VisionEncoder

LIBRARY = Path(qwen_vl_streaming.__file__).parent
GPU = torch.device("cuda:1")


class Stream:
    """Logs what waits for it."""

    def __init__(self, device=None, priority=0):
        assert device is not None, "a stream of whichever device is the current one"
        self.device, self.waited_for = torch.device(device), []

    def wait_stream(self, other):
        assert other.device == self.device
        self.waited_for.append(other)


class Graph:
    pass


@pytest.fixture
def cuda(monkeypatch):
    """The streams that are current, by device; captures, and what ran outside (None) or within each of them."""
    fake = SimpleNamespace(current={}, inside=None, captured=[], log=[])

    @contextlib.contextmanager
    def stream(chosen):
        assert isinstance(chosen, Stream)
        before, fake.current[chosen.device] = fake.current.get(chosen.device), chosen
        yield
        fake.current[chosen.device] = before

    @contextlib.contextmanager
    def graph(made, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local" and fake.current[stream.device] is stream and fake.inside is None
        fake.inside = made
        fake.captured.append((made, pool, stream))
        yield
        fake.inside = None

    def current_stream(device=None):
        assert device is not None, "the stream of whichever device is the current one"
        return fake.current.setdefault(torch.device(device), Stream(device))

    for name, stand_in in {
        "Stream": Stream, "CUDAGraph": Graph, "stream": stream, "graph": graph, "current_stream": current_stream,
        "graph_pool_handle": lambda: "pool",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return fake


def test_a_capture_is_on_the_device_of_its_stream(cuda):
    stream, runs = Stream(GPU), []

    def work():
        assert cuda.current[GPU] is stream and not torch.is_grad_enabled()
        runs.append(cuda.inside)
        return len(runs)

    graph, output = capture(work, stream, "pool")
    assert runs == [None] * WARM_UP_RUNS + [graph] and output == len(runs)
    assert cuda.captured == [(graph, "pool", stream)]
    assert stream.waited_for == [cuda.current[GPU]] and cuda.current[GPU].waited_for == [stream]
    graph, _ = capture(work, stream, runs=0)
    assert runs[-1] is graph and len(runs) == WARM_UP_RUNS + 2


def test_runners_capture_on_the_device_of_the_model(cuda):
    runner = SimpleNamespace(_decode=lambda: cuda.log.append("decode"), capture_stream=Stream(GPU), graph=None)
    Runner.capture(runner)
    assert isinstance(runner.graph, Graph) and cuda.captured[-1][2].device == GPU

    steps = SimpleNamespace(
        on_cuda=True, device=GPU, kinds=[((1, 2), False), ((1, 0), True), ((1, 2), True)], graphs={},
        _step=lambda *what: cuda.log.append(what),
    )  # fmt: skip
    steps.inputs = {shape: SimpleNamespace(set=lambda requests: None) for shape, _ in steps.kinds}
    StepRunner.warm_up(steps)
    assert list(steps.graphs) == steps.kinds[::-1]
    assert [what for what in cuda.log if what != "decode"] == [key for key in steps.graphs for _ in range(4)]
    assert {stream.device for _, _, stream in cuda.captured} == {GPU}

    visual = SimpleNamespace(
        spatial_merge_size=2, patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=torch.ones(1, 6)))
    )
    model = SimpleNamespace(
        model=SimpleNamespace(visual=visual), dtype=torch.float32, device=torch.device("cpu"),
        perceive=lambda pixels, grid: (pixels.shape, grid), tower_layout=lambda videos: videos,
    )  # fmt: skip
    encoder = SimpleNamespace(stream=Stream(GPU), model=model, graphs={})
    VisionEncoder.capture(encoder, (2, 3), [1, 4])
    assert [layout for *_, layout in encoder.graphs[2, 3].values()] == [[(1, 2, 3)], [(4, 2, 3)]]
    assert [tokens for _, _, tokens, _ in encoder.graphs[2, 3].values()] == [((n, 24, 6), (2, 3)) for n in (1, 4)]
    assert cuda.captured[-1][2] is encoder.stream


def test_the_library_names_the_device_of_streams():
    """A stream, or a graph without one, is else of the current device, where a model need not be."""
    bare = re.compile(r"cuda\.(Stream|current_stream|synchronize|mem_get_info|get_device_\w+)\(\)|cuda\.graph\(")
    found = [
        f"{path.relative_to(LIBRARY)}: {line.strip()}"
        for path in sorted(LIBRARY.rglob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if bare.search(line)
    ]
    assert len(found) == 1 and found[0].startswith("engine/cuda_graph.py: with torch.cuda.graph(graph, "), found
