"""Models, clips and sessions for latency.py. Models have the released shapes and the same weights in each process.

Knows nothing about the internals of a session, apart from its step runner, which the next session reuses.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from evaluation import rates
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object, write_file
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.model.quantization import quantize_layers
from qwen_vl_streaming.model.released import released_config
from qwen_vl_streaming.sessions import PerceptionClient, Session, open_session
from qwen_vl_streaming.timeline.timeline import Layout
from qwen_vl_streaming.timeline.variants import Variant
from torch import Tensor
from training import GRID, PROMPT, find_device
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from latency.floors import Floors

TEMPLATE = Template(tuple(range(PROMPT)), (1, 2, 3), (4, 5, 6), 7, -1)
"""The end token is -1, which is never generated, so that no answer ends early."""
TOKENS = GRID[0] * GRID[1]
GRIDS = {16: (4, 4), 32: (4, 8), 64: (8, 8), TOKENS: GRID, 128: (8, 16), 256: (16, 16), 512: (16, 32), 1024: (32, 32)}
"""Rows and columns after merging, by the number of visual tokens of a clip."""
DISTINCT = 8
"""Number of distinct clips of each grid; longer videos repeat them."""
KEPT_RUNNERS = 4
"""Number of session sizes whose step runners are kept."""
WHOLE, SPREAD, AUTO = "whole", "spread", "auto"
"""How fused steps prefill a clip: in one step; in K steps, one for each token of a slot; as `choose_chunks` says."""


def tiny_config() -> Qwen2_5_VLConfig:
    """A tiny configuration, to try the commands on a CPU."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def load(size: str, layers: int | None, device: str, weights: str | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """The model on `device`: bf16 on a GPU, float32 with one thread on a CPU, with linear layers in 8 bits if `weights`
    names a kind. All processes get the same weights, so that the tokens of all modes can be compared."""
    if device == "cpu":
        torch.set_num_threads(1)  # so that two processes do not compete for cores
    else:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    config = tiny_config() if size == "tiny" else released_config(size, layers)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config) if weights is None else quantized(config, weights, size)
    torch.set_default_dtype(torch.float32)
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
    variant: Variant
    modes: tuple[str, ...]
    layers: int | None = None
    pixels: torch.dtype = torch.float32
    """Data type of the clips; `prompts.clip_pixels` returns float32."""
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
        self.flop_rate, self.byte_rate = rates(self.device.partition(":")[0])
        if on_gpu:  # what the rates were measured with is not memory of the model
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.model = load(self.size, self.layers, self.device, self.weights)

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
        name = torch.cuda.get_device_name() if self.device != "cpu" else "CPU"
        return {
            "size": self.size,
            "layers": self.layers,
            "variant": self.variant.name,
            "device": name,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "flop_rate": self.flop_rate,
            "byte_rate": self.byte_rate,
            "pixels": str(self.pixels).removeprefix("torch."),
            "weights": self.weights,
        }

    def clips(self, count: int, tokens: int = TOKENS) -> list[Tensor]:
        """Pixels of `count` clips of `tokens` visual tokens each, in pinned memory if there is a GPU."""
        rows, columns = GRIDS[tokens]
        if (rows, columns) not in self.kept:
            merged = self.model.model.visual.spatial_merge_size**2
            width = self.model.model.visual.patch_embed.proj.weight[0].numel()
            generator = torch.Generator().manual_seed(1)
            made = torch.randn(DISTINCT, rows * columns * merged, width, generator=generator).to(self.pixels)
            self.kept[rows, columns] = list(made if self.device == "cpu" else made.pin_memory())
        return [self.kept[rows, columns][i % DISTINCT] for i in range(count)]

    def floors(self, tokens: int = TOKENS) -> Floors:
        return Floors(self.model, self.layout(tokens), self.flop_rate, self.byte_rate)

    def layout(self, tokens: int = TOKENS) -> Layout:
        return TEMPLATE.layout(GRIDS[tokens], 2.0)

    def prefill(self, how: str, tokens: int, k: int) -> dict[str, int | None]:
        """Session options for a way to prefill a clip: WHOLE, SPREAD, AUTO, 1/N of a clip per step, or a number of
        visual tokens per step, also where no token is generated."""
        if how.isdigit():
            return {"chunk": int(how), "chunks": None}
        chunks = {WHOLE: 1, SPREAD: min(k, tokens), AUTO: None}
        return {"chunk": None, "chunks": chunks[how] if how in chunks else min(int(how.removeprefix("1/")), tokens)}

    def open(self, mode: str, schedule, clips: int, answer_tokens: int, tokens: int = TOKENS, **options) -> Session:
        """A session with room for `clips` clips and `answer_tokens` tokens. It reuses the step runner of the previous
        session of the same sizes, with its compiled functions and CUDA graphs."""
        if mode == "pipelined":
            if self.perception_client is None:
                loading = partial(self.loading, self.size, self.layers, self.other, self.weights)
                self.perception_client = PerceptionClient(loading)
            options["perception_client"] = self.perception_client
        options.setdefault("chunks", 1)
        sizes = (clips, answer_tokens, tokens, *map(options.get, ("chunk", "chunks", "window")))
        options |= {
            "schedule": schedule,
            "max_clips": clips,
            "max_new_tokens": answer_tokens,
            "clock": time.perf_counter,
        }
        options["runner"] = self.runners.pop(sizes, None)
        session = open_session(self.model, self.variant, TEMPLATE, self.layout(tokens), mode=mode, **options)
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


def slot_ends(session: Session) -> list[float]:
    """Time of the last token of each slot, by the session's clock."""
    return list({each.slot: each.time for each in session.written}.values())


def write_json(path: Path, data: dict) -> None:
    """Write `data` to `path` atomically."""
    write_file(path, json.dumps(data) + "\n")


def read_json(path: Path) -> dict:
    """Read the file of a measurement. Raises InputError if it is missing or not JSON."""
    return read_object(path, "run the command that writes it first")
