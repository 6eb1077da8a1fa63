"""Measures attention alone, with the shapes of the engine's steps: FlexAttention with several kernel_options, and the
kernel of `hopper_attention.py` where the engine uses it. The options in `model_runner.py`, `split_kv.py` and
`ragged_attention.py` were chosen with it.

    python code/benchmarks/attention.py --size 7B
    python code/benchmarks/attention.py --size 7B --steps clip --options 64x64x4x2 128x64x8x3 --splits 3 6

    decode  one decode row in each batch slot
    clip    a clip and a decode row in one batch slot, as in live sessions, or several clips, as in a pool
    clips   clips in some batch slots and decode rows in others, as in batches of `interleave`

Measures the attention of all layers, captured as one CUDA graph. Options are BLOCK_M x BLOCK_N x warps x stages; for
decode, they are warps x stages. The engine's kernel for clips is measured first, and then its own options.
--splits divides the keys of a clip's step into other numbers of splits than the engine does. The floor is the larger of
two times: 4 x pairs x width FLOPs at the measured rate of a bf16 matrix product, and the bytes of the visible keys and
values at the measured memory bandwidth. --size tiny tries the command on a CPU, without compiling.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from arithmetic import seconds
from evaluation import rates
from latency.setup import tiny_config
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.engine import ragged_attention
from qwen_vl_streaming.engine.chunk_attention import SIZE
from qwen_vl_streaming.engine.hopper import hopper_processors
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.model_runner import ModelRunner
from qwen_vl_streaming.engine.paged_attention import PagedAttention
from qwen_vl_streaming.engine.prefill import padded_query_blocks
from qwen_vl_streaming.engine.ragged_attention import RaggedAttention, query_blocks_of
from qwen_vl_streaming.engine.split_kv import (
    CHUNK_KERNEL_OPTIONS,
    flex_split_kv,
    kernel_settings,
    num_kernel_splits,
    num_splits,
)
from qwen_vl_streaming.model.released import SIZES, released_config
from torch import Tensor
from training import find_device

NAMES = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
CHUNK_OPTIONS = (
    *("64x64x4x2", "64x64x4x3", "64x128x4x2", "64x128x4x3"),
    *("128x64x4x2", "128x64x4x3", "128x64x8x2", "128x64x8x3", "128x128x8x2", "128x128x8x3"),
)
DECODE_OPTIONS = ("4x3", "2x3", "4x2", "8x2")
TEXT_TOKENS = 100
"""Text tokens that are allocated for each batch slot."""


@dataclass(frozen=True)
class Shape:
    """The rows of a forward step."""

    kind: str
    clips: int
    """Batch slots with a clip of `tokens` rows."""
    tokens: int
    decoding: int
    """Batch slots with a decode row. In a step of kind clip, it is the batch slot of the only clip."""
    seen: int
    """Visual tokens that a decode row and the last row of a clip attend to."""

    def __str__(self) -> str:
        parts = [f"{self.clips} x {self.tokens} of clips"] if self.clips else []
        return ", ".join([*parts, f"{self.decoding} decode rows", f"{self.seen} visual tokens"])

    def seen_by_row(self) -> list[Tensor]:
        """For each batch slot, the number of visual tokens that each of its rows attends to."""
        clip = torch.arange(self.seen - self.tokens, self.seen) + 1
        decode = torch.tensor([self.seen])
        if self.kind == "clip" and self.decoding:
            return [torch.cat([decode - self.tokens, clip])]
        return [clip] * self.clips + [decode] * self.decoding


GPU_SHAPES = (
    Shape("decode", 0, 0, 1, 5460),
    Shape("decode", 0, 0, 64, 1365),
    Shape("clip", 1, 91, 1, 5460),
    *(Shape("clip", clips, 91, 0, 5460) for clips in (2, 4, 8)),
    Shape("clip", 1, 256, 1, 3072),
    Shape("clip", 1, 1024, 1, 6144),
    Shape("clips", 11, 91, 21, 1365),
    Shape("clips", 64, 91, 0, 1365),
)
CPU_SHAPES = Shape("decode", 0, 0, 2, 140), Shape("clip", 1, 9, 1, 140), Shape("clips", 2, 9, 1, 140)


class Bench:
    def __init__(self, size: str):
        self.device = find_device()
        self.config = (tiny_config() if size == "tiny" else released_config(size, None)).text_config
        self.layers, self.heads = self.config.num_hidden_layers, self.config.num_attention_heads
        self.groups = self.heads // self.config.num_key_value_heads
        self.size = self.config.hidden_size // self.heads
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        if self.device == "cpu":
            ragged_attention.compiled_flex = lambda: flex_split_kv
        self.config.num_hidden_layers = 1  # all measurements use the cache of one layer

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def cache(self, shape: Shape) -> PagedKVCache:
        batch_slots = len(shape.seen_by_row())
        each = PagedKVCache.blocks_needed(shape.seen, TEXT_TOKENS)
        cache = PagedKVCache(self.config, batch_slots, batch_slots * each, each, self.dtype, self.device)
        for batch_slot in range(batch_slots):
            cache.allocate(batch_slot, shape.seen, TEXT_TOKENS)
        cache.store.normal_()
        return cache

    def layer(self, shape: Shape, options: dict | None, splits: int | None = None) -> Callable[[], Tensor]:
        """A function that runs one layer's attention in a step of `shape`. `options` are None for the kernel. `splits`
        is for steps of kind clip; None is the engine's number."""
        cache, rows, scale = self.cache(shape), shape.seen_by_row(), self.size**-0.5
        layer_cache, counts = cache.layers[0], [len(own) for own in rows]
        if shape.kind == "clips":
            assert options is not None
            ragged_attention.KERNEL_OPTIONS, ragged_attention.QUERY_BLOCK = options, options["BLOCK_M"]
            blocks = sum(query_blocks_of(count, self.groups) for count in counts)
            attention = RaggedAttention(cache, padded_query_blocks(blocks), self.groups, True)
            attention.set_rows(range(len(rows)), counts)
            seen = torch.cat(rows).to(self.device)
            attention.update(torch.zeros_like(seen), seen, torch.ones_like(seen))
            query = self.random(1, self.heads // self.groups, len(attention.row), self.size)
            return lambda: attention.attend(query, layer_cache, scale)
        seen = torch.stack(rows).to(self.device)
        if shape.kind != "clip":
            settings = kernel_settings(cache, *seen.shape, self.groups, options or {})
        else:
            if options is None:
                settings = {"splits": num_kernel_splits(cache, *seen.shape, self.groups), "use_kernel": True}
            else:
                queries = seen.numel() * self.groups * CHUNK_KERNEL_OPTIONS["BLOCK_M"] // options["BLOCK_M"]
                settings = {"splits": num_splits(cache, queries), "kernel_options": options}
            settings["splits"] = splits or settings["splits"]
        slots = torch.arange(len(rows), device=self.device)
        attention = PagedAttention(cache, slots, None, seen, torch.ones_like(seen), self.groups, True, **settings)
        query = self.random(len(rows), self.heads, seen.shape[1], self.size)
        attend = torch.compile(attention.attend, dynamic=False) if self.device == "cuda" else attention.attend
        return lambda: attend(query, layer_cache, scale)

    def measure(self, shape: Shape, options: dict | None, splits: int | None = None) -> float:
        """Seconds that the attention of all layers takes."""
        torch._dynamo.reset()
        layer = self.layer(shape, options, splits)
        if self.device == "cpu":
            return self.layers * seconds(layer, 3, self.device)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(self.layers):
                layer()
        return seconds(graph.replay, 20, self.device)

    def floor(self, shape: Shape, flop_rate: float, byte_rate: float) -> float:
        """The floor in seconds; the module docstring defines it."""
        rows = shape.seen_by_row()
        pairs, keys = sum(int(own.sum()) for own in rows), sum(int(own.max()) for own in rows)
        width = self.heads * self.size
        bytes_seen = 2 * keys * width / self.groups * self.dtype.itemsize
        return self.layers * max(4 * pairs * width / flop_rate, bytes_seen / byte_rate)


def parse_options(text: str, names: tuple[str, ...]) -> dict:
    numbers = text.split("x")
    sizes = [int(number) if number.isdigit() else 0 for number in numbers]
    if len(sizes) != len(names) or min(sizes) < 1 or any(size & (size - 1) for size in sizes[:-1]):
        raise InputError(f"--options {text}: give {' x '.join(names)}, such as 64x64x4x2, or 4x3 for decode")
    return dict(zip(names, sizes, strict=True))


def options_to_try(kind: str, requested: list[str] | None, kernel: bool) -> Iterator[dict | None]:
    """Kernel options for steps of `kind`: None for the engine's `kernel`, if it has one, its options, then the
    `requested` ones, or a default list if None."""
    if kind == "clip" and kernel:
        yield None
    decode = kind == "decode"
    used = {
        "decode": ModelRunner.kernel_options,
        "clip": CHUNK_KERNEL_OPTIONS,
        "clips": ragged_attention.KERNEL_OPTIONS,
    }[kind]
    yield used
    own = [text for text in requested or () if decode == (text.count("x") == 1)]
    for text in own if requested else DECODE_OPTIONS if decode else CHUNK_OPTIONS:
        options = parse_options(text, NAMES[2:] if decode else NAMES)
        if options != used:
            yield options


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SIZES], default="7B")
    parser.add_argument("--steps", nargs="+", choices=["decode", "clip", "clips"], default=["decode", "clip", "clips"])
    parser.add_argument(
        "--options", nargs="+", metavar="MxNxWxS", help="options to try beside the engine's (default: a list)"
    )
    parser.add_argument("--splits", type=int, nargs="+", help="splits of a clip's keys to try (default: the engine's)")
    arguments = parser.parse_args()
    if min(arguments.splits or [1]) < 1:
        raise InputError(f"--splits {min(arguments.splits)}: give positive numbers")
    bench = Bench(arguments.size)
    gpu = bench.device == "cuda"
    kernel = gpu and bench.size == SIZE and hopper_processors(torch.device("cuda", 0)) > 0
    wanted = [shape for shape in (GPU_SHAPES if gpu else CPU_SHAPES) if shape.kind in arguments.steps]
    every = [(shape, [*options_to_try(shape.kind, arguments.options, kernel)]) for shape in wanted]

    flop_rate, byte_rate = rates(bench.device)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, attention of Qwen2.5-VL {arguments.size}, {bench.layers} layers")
    print(f"matrix product {flop_rate / 1e12:.1f} TFLOP/s, memory bandwidth {byte_rate / 1e12:.2f} TB/s")
    for shape, choices in every:
        floor = bench.floor(shape, flop_rate, byte_rate)
        print(
            f"\n{shape.kind}: {shape}; floor {1e3 * floor:.3f} ms\n{'options':<16}{'ms':>9} {'x floor':>9}", flush=True
        )
        other = arguments.splits or [] if shape.kind == "clip" else []
        for number, (options, splits) in enumerate(product(choices, [None, *other])):
            took = bench.measure(shape, options, splits)
            mine = "  the engine's" if number == 0 else f"  {splits} splits" if splits else ""
            what = "the kernel" if options is None else "x".join(map(str, options.values()))
            print(f"{what:<16}{1e3 * took:>9.3f} {took / floor:>9.2f}{mine}", flush=True)


if __name__ == "__main__":
    run(main)
