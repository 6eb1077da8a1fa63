"""What the benchmarks of speed share: the workload, models with random weights, and the measured rates of a device.

The workload is that of the published baseline: a video of 30 clips of 196 x 364 pixels (91 visual tokens per clip), and
an answer of 117 tokens by wait-3.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.model import released
from qwen_vl_streaming.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from qwen_vl_streaming.model.prompts import Template
from qwen_vl_streaming.timeline.timeline import make_schedule
from qwen_vl_streaming.timeline.variants import Variant
from transformers import Qwen2_5_VLConfig

CLIPS, GRID, ANSWER = 30, (7, 13), 117
PATCHES = 4 * GRID[0] * GRID[1]
"""Patches of a clip before merging."""
TEMPLATE = Template(tuple(range(40)), (1, 2, 3), (4, 5, 6), 7, -1)
"""The end token is -1, which is never generated, so that no answer ends early."""
LAYOUT = TEMPLATE.layout(GRID, 2.0)
PUBLISHED = {"group": 3.9, "interleave": 3.7}
"""Seconds per video of the published code, 7B on one H200, which we measured earlier on the same workload."""
SIZES = ("tiny", *released.SIZES)
"""Choices of --size. `tiny` tries a command on a CPU."""


def answer_counts(variant: Variant) -> tuple[int, ...]:
    """Answer tokens of each slot by wait-3; for offline variants all are in the last slot."""
    return make_schedule("wait-3", variant, CLIPS).counts(ANSWER)


def find_device(size: str = "tiny") -> str:
    """Return "cuda", or "cpu" with a note on stderr if there is no GPU.

    Raises InputError if there is a GPU that cannot be used, and for a `size` other than tiny on a CPU.
    """
    device, line = choose_device("", look(os.environ), cpu="")
    if device == "cpu" and size != "tiny":
        raise InputError(f"--size {size} needs a GPU: on a CPU give --size tiny")
    if line:
        print(line, file=sys.stderr)
    return device


def device_name(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def config_of(size: str, layers: int | None = None) -> Qwen2_5_VLConfig:
    """The config of one of SIZES; a released one optionally with fewer `layers`."""
    if size != "tiny":
        return released.released_config(size, layers)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    tokens = {f"{name}_token_id": 199 - i for i, name in enumerate(("video", "image", "vision_end", "vision_start"))}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)


@contextmanager
def created_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """A context in which models are created on `device` with weights in `dtype`."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_model(size: str, device: str) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights: in bf16 on a GPU, in float32 on a CPU."""
    with created_on(device, torch.float32 if device == "cpu" else torch.bfloat16):
        return Qwen2_5_VLForConditionalGeneration(config_of(size))


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """The mean time of `repeats` calls, after two for warm-up."""
    for i in range(repeats + 2):
        if i == 2:
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def matrix_rate(device: str) -> float:
    """Measure the FLOP/s of a bf16 matrix product, of 8192 x 8192 on a GPU."""
    size = 8192 if device == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, 20, device)


def memory_rate(device: str) -> float:
    """Measure the bytes/s of reading memory."""
    block = torch.ones(2**30 if device == "cuda" else 2**20, device=device)
    return 4 * len(block) / seconds(lambda: block.sum(), 20, device)


def peak_gib(device: str) -> float:
    """The most memory that PyTorch allocated on the GPU, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")


def matrices(module: torch.nn.Module) -> int:
    """Number of weights in the matrices of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def tower_flops(model: Qwen2_5_VLForConditionalGeneration, patches: int) -> float:
    """FLOPs of the vision tower for a clip of `patches` patches, without the merger: 2 x weights x patches, and 4 x
    pairs x width in attention, where most layers attend within windows. Uses only the shapes of `model`."""
    vision, tower = model.config.vision_config, model.model.visual
    full, window = len(vision.fullatt_block_indexes), (vision.window_size // vision.patch_size) ** 2
    seen = full * patches + (vision.depth - full) * min(window, patches)
    return 2.0 * patches * (matrices(tower) - matrices(tower.merger)) + 4.0 * patches * seen * vision.hidden_size
