"""Models, clips and sessions for latency.py. Models have the released shapes and the same weights in each process.

Knows nothing about the internals of a session, apart from its step runner, which the next session reuses.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.quantization import quantize_layers
from qwen_vl_streaming.sessions import PerceptionClient, Session, open_session
from qwen_vl_streaming.timeline.timeline import Layout
from qwen_vl_streaming.timeline.variants import VARIANTS
from torch import Tensor
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from workload import GRID, TEMPLATE, config_of, created_on, device_name, find_device, matrix_rate, memory_rate

from latency.floors import Floors

VARIANT = VARIANTS["group"]
TOKENS = GRID[0] * GRID[1]
GRIDS = {16: (4, 4), 32: (4, 8), 64: (8, 8), TOKENS: GRID, 128: (8, 16), 256: (16, 16), 512: (16, 32), 1024: (32, 32)}
"""Rows and columns after merging, by the number of visual tokens of a clip."""
DISTINCT = 8
"""Number of distinct clips of each grid; longer videos repeat them."""
KEPT_RUNNERS = 4
"""Number of session sizes whose step runners are kept."""
TIMEOUT = 600.0
"""Timeout of the perception process for a clip, in seconds. Its first clip includes compilation."""


def load(size: str, device: str, weights: str | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """The model on `device`: bf16 on a GPU, float32 with one thread on a CPU, with linear layers in 8 bits if `weights`
    names a kind. All processes get the same weights, so that the tokens of all modes can be compared."""
    if device == "cpu":
        torch.set_num_threads(1)  # so that two processes do not compete for cores
    else:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    config = config_of(size)
    with created_on(device, torch.float32 if device == "cpu" else torch.bfloat16):
        model = Qwen2_5_VLForConditionalGeneration(config) if weights is None else quantized(config, weights, size)
    if size == "tiny" and weights is None:
        enliven(model)
    return model.eval()


def enliven(module: torch.nn.Module) -> None:
    """Larger weights for a tiny model: at the default scale its output is nearly constant."""
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2)


def quantized(config: Qwen2_5_VLConfig, weights: str, size: str) -> Qwen2_5_VLForConditionalGeneration:
    """A model whose layers are made and quantized one by one, so that it never takes the memory of all in bf16."""
    text = config.text_config
    count, kinds = text.num_hidden_layers, text.layer_types
    text.num_hidden_layers, text.layer_types = 1, kinds[:1]
    model = Qwen2_5_VLForConditionalGeneration(config)
    made, text = model.model.language_model.layers, model.model.language_model.config
    for each in (text, model.config.text_config):
        each.num_hidden_layers, each.layer_types = count, kinds
    if size == "tiny":
        enliven(model)
    quantize_layers(made, weights)
    for index in range(1, count):
        layer = Qwen2_5_VLDecoderLayer(text, index)
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.2 if size == "tiny" else text.initializer_range)
            elif name.endswith("bias"):
                parameter.data.zero_()
        quantize_layers(layer, weights)
        made.append(layer)
    return model


@dataclass
class Bench:
    """A model and its sessions. As a context manager, it stops the perception process at the end."""

    size: str
    modes: Sequence[str]
    weights: str | None = None
    """The precision of the linear layers, as in `load`."""
    loading: Callable = load
    """Loads the model of the perception process; takes the same arguments as `load`."""
    perception_client: PerceptionClient | None = None
    runners: dict[tuple, StepRunner] = field(default_factory=dict)
    """Step runners of the latest sessions, by session sizes, the newest last. Sessions of the same sizes reuse them."""
    kept: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        on_gpu = find_device(self.size) == "cuda"
        self.device, self.other = ("cuda:0", "cuda:1") if on_gpu else ("cpu", "cpu")
        if "pipelined" in self.modes and on_gpu and torch.cuda.device_count() < 2:
            raise InputError("pipelined needs two GPUs, and there is one: use --modes serial fused")
        kind = self.device.partition(":")[0]
        self.flop_rate, self.byte_rate = matrix_rate(kind), memory_rate(kind)
        if on_gpu:  # what the rates were measured with is not memory of the model
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.model = load(self.size, self.device, self.weights)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop_perception()

    def release(self) -> None:
        """Release the kept step runners and their memory."""
        self.runners.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def stop_perception(self) -> None:
        """Stop the perception process. The next pipelined session starts a new one."""
        if self.perception_client is not None:
            self.perception_client.close()
            self.perception_client = None

    def about(self) -> dict:
        """Model, device, versions and measured rates, for the JSON files."""
        return {
            "size": self.size,
            "variant": VARIANT.name,
            "device": device_name(self.device),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "flop_rate": self.flop_rate,
            "byte_rate": self.byte_rate,
            "weights": self.weights,
        }

    def clips(self, count: int, tokens: int = TOKENS) -> list[Tensor]:
        """Pixels of `count` clips of `tokens` visual tokens each, in pinned memory if there is a GPU."""
        rows, columns = GRIDS[tokens]
        if (rows, columns) not in self.kept:
            merged = self.model.model.visual.spatial_merge_size**2
            width = self.model.model.visual.patch_embed.proj.weight[0].numel()
            generator = torch.Generator().manual_seed(1)
            made = torch.randn(DISTINCT, rows * columns * merged, width, generator=generator)
            self.kept[rows, columns] = list(made if self.device == "cpu" else made.pin_memory())
        return [self.kept[rows, columns][i % DISTINCT] for i in range(count)]

    def floors(self, tokens: int = TOKENS) -> Floors:
        return Floors(self.model, self.layout(tokens), self.flop_rate, self.byte_rate)

    def layout(self, tokens: int = TOKENS) -> Layout:
        return TEMPLATE.layout(GRIDS[tokens], 2.0)

    def open(self, mode: str, schedule, clips: int, answer_tokens: int, tokens: int = TOKENS, window=None) -> Session:
        """A session with room for `clips` clips and `answer_tokens` tokens. It reuses the step runner of the previous
        session of the same sizes, with its compiled functions and CUDA graphs."""
        options = {"schedule": schedule, "max_clips": clips, "max_new_tokens": answer_tokens, "window": window}
        if mode == "pipelined":
            if self.perception_client is None:
                loading = partial(self.loading, self.size, self.other, self.weights)
                self.perception_client = PerceptionClient(loading, TIMEOUT)
            options["perception_client"] = self.perception_client
        sizes = (clips, answer_tokens, tokens, window)
        session = open_session(
            self.model,
            VARIANT,
            TEMPLATE,
            self.layout(tokens),
            mode=mode,
            clock=time.perf_counter,
            runner=self.runners.pop(sizes, None),
            **options,
        )
        self.runners[sizes] = session.runner  # now the newest
        if len(self.runners) > KEPT_RUNNERS:
            self.runners.pop(next(iter(self.runners)))
        self.wait()
        return session

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def play(bench: Bench, session: Session, clips: Sequence[Tensor], ends: bool = False) -> float:
    """Feed all `clips` at once and step the session until it is idle. Returns the seconds until the device has
    finished. `ends`: the last clip ends the video."""
    bench.wait()
    began = time.perf_counter()
    for number, clip in enumerate(clips, 1):
        session.feed(clip, last=ends and number == len(clips))
    while not session.idle:
        session.step()
    bench.wait()
    return time.perf_counter() - began


def feed_one_ahead(session: Session, clips: Sequence[Tensor]) -> Iterator[int]:
    """Step `session` until it is idle. Feeds each clip when the slot before it starts, so that one clip is always
    waiting. Yields the number of slots that have started after each step."""
    arrived, started = session.log.arrived, session.log.visible
    while len(arrived) < len(clips) or not session.idle:
        while len(arrived) < len(clips) and len(arrived) <= len(started):
            session.feed(clips[len(arrived)])
        session.step()
        yield len(started)


def slot_ends(session: Session) -> list[float]:
    """Time of the last token of each slot, by the session's clock."""
    return list({each.slot: each.time for each in session.written}.values())


def write_json(path: Path, data: dict) -> None:
    """Write `data` to `path` atomically."""
    write_file(path, json.dumps(data) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises InputError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): run the command that writes it first") from error
