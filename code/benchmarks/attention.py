"""FlexAttention alone, in the passes of the engine and by its kernel_options: from what those of `runner.py`,
`paged_attention.py` and `ragged_attention.py` are chosen.

    python code/benchmarks/attention.py --size 7B
    python code/benchmarks/attention.py --size 7B --passes clip --options 64x64x4x2 128x64x8x3

    words   a word in each of some seats
    clip    a clip of one seat and its word, as live sessions are fed
    clips   clips of some seats and words of others, as `interleave` is fed in batches

What is measured is the attention of all layers, recorded as a CUDA graph. Options are BLOCK_M x BLOCK_N x warps x
stages, for words warps x stages; the engine's come first. The floor is 4 x pairs x width at the measured rate of a bf16
matrix product, or the bytes of the keys and values that are seen at the measured rate of reading memory, whichever
takes longer. On a CPU --size tiny tries the command out, uncompiled.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from evaluation import rates
from latency.setup import tiny_config
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.engine import ragged_attention
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.paged_attention import PIECES, PagedAttention, flex_in_shares, shares_of
from qwen_vl_streaming.engine.prefill import room_for
from qwen_vl_streaming.engine.ragged_attention import RaggedAttention, blocks_of
from qwen_vl_streaming.engine.runner import Runner
from torch import Tensor
from training import SHAPES, find_device, make_config, seconds

NAMES = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
TRIED = (
    *("64x64x4x2", "64x64x4x3", "64x128x4x2", "64x128x4x3"),
    *("128x64x4x2", "128x64x4x3", "128x64x8x2", "128x64x8x3", "128x128x8x2", "128x128x8x3"),
)
TRIED_FOR_WORDS = ("4x3", "2x3", "4x2", "8x2")
TEXT = 100
"""Words that a stream has room for."""


@dataclass(frozen=True)
class Shape:
    """Rows of some seats in one pass."""

    kind: str
    clips: int
    """Seats that are fed a clip, of `tokens` rows."""
    tokens: int
    words: int
    """Seats that are fed a word; of kind clip the same."""
    seen: int
    """Visual tokens that a word sees, and the last row of a clip."""

    def __str__(self) -> str:
        parts = [f"{self.clips} x {self.tokens} of clips"] if self.clips else []
        return ", ".join([*parts, f"{self.words} words", f"{self.seen} seen"])

    def seen_by_row(self) -> list[Tensor]:
        """For each seat how many visual tokens its rows see."""
        clip = torch.arange(self.seen - self.tokens, self.seen) + 1
        word = torch.tensor([self.seen])
        if self.kind == "clip":
            return [torch.cat([word - self.tokens, clip])]
        return [clip] * self.clips + [word] * self.words


GPU_SHAPES = (
    Shape("words", 0, 0, 1, 5460),
    Shape("words", 0, 0, 64, 1365),
    Shape("clip", 1, 91, 1, 5460),
    Shape("clip", 1, 256, 1, 3072),
    Shape("clip", 1, 1024, 1, 6144),
    Shape("clips", 11, 91, 21, 1365),
    Shape("clips", 64, 91, 0, 1365),
)
CPU_SHAPES = Shape("words", 0, 0, 2, 140), Shape("clip", 1, 9, 1, 140), Shape("clips", 2, 9, 1, 140)


class Bench:
    def __init__(self, size: str):
        self.device = find_device()
        self.config = (tiny_config() if size == "tiny" else make_config(size, None)).text_config
        self.layers, self.heads = self.config.num_hidden_layers, self.config.num_attention_heads
        self.groups = self.heads // self.config.num_key_value_heads
        self.size = self.config.hidden_size // self.heads
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        if self.device == "cpu":
            ragged_attention._compiled = flex_in_shares
        self.config.num_hidden_layers = 1  # of which every pass here has the keys and values

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def cache(self, shape: Shape) -> PagedKVCache:
        batch_slots = len(shape.seen_by_row())
        each = PagedKVCache.blocks_needed(shape.seen, TEXT)
        cache = PagedKVCache(self.config, batch_slots, batch_slots * each, each, self.dtype, self.device)
        for batch_slot in range(batch_slots):
            cache.allocate(batch_slot, shape.seen, TEXT)
        cache.store.normal_()
        return cache

    def layer(self, shape: Shape, options: dict) -> Callable[[], Tensor]:
        """One layer's attention in a pass of `shape`."""
        cache, rows, scale = self.cache(shape), shape.seen_by_row(), self.size**-0.5
        pool, counts = cache.layers[0], [len(own) for own in rows]
        if shape.kind == "clips":
            ragged_attention.KERNEL_OPTIONS, ragged_attention.QUERY_BLOCK = options, options["BLOCK_M"]
            blocks = sum(blocks_of(count, self.groups) for count in counts)
            view = RaggedAttention(cache, room_for(blocks), self.groups, True)
            view.lay_out(range(len(rows)), counts)
            seen = torch.cat(rows).to(self.device)
            view.place(torch.zeros_like(seen), seen, torch.ones_like(seen))
            asked = self.random(1, self.heads // self.groups, len(view.row), self.size)
            return lambda: view._mix(asked, pool, scale)
        seen = torch.stack(rows).to(self.device)
        shares = 1
        if shape.kind == "clip":
            shares = shares_of(cache, seen.numel() * self.groups * PIECES["BLOCK_M"] // options["BLOCK_M"])
        whose = torch.arange(len(rows), device=self.device)
        view = PagedAttention(
            cache, whose, None, seen, torch.ones_like(seen), self.groups, True, options, shares=shares
        )
        query = self.random(len(rows), self.heads, seen.shape[1], self.size)
        mix = torch.compile(view.mix, dynamic=False) if self.device == "cuda" else view.mix
        return lambda: mix(query, pool, scale)

    def measure(self, shape: Shape, options: dict) -> float:
        """Seconds of all layers."""
        torch._dynamo.reset()
        layer = self.layer(shape, options)
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
        """Seconds, by the rule at the head of this file."""
        rows = shape.seen_by_row()
        pairs, keys = sum(int(own.sum()) for own in rows), sum(int(own.max()) for own in rows)
        width = self.heads * self.size
        bytes_seen = 2 * keys * width / self.groups * self.dtype.itemsize
        return self.layers * max(4 * pairs * width / flop_rate, bytes_seen / byte_rate)


def parse_options(text: str, names: tuple[str, ...]) -> dict:
    numbers = text.split("x")
    sizes = [int(number) if number.isdigit() else 0 for number in numbers]
    if len(sizes) != len(names) or min(sizes) < 1 or any(size & (size - 1) for size in sizes[:-1]):
        raise InputError(f"--options {text}: give {' x '.join(names)}, such as 64x64x4x2, or for words 4x3")
    return dict(zip(names, sizes, strict=True))


def tried(kind: str, asked: list[str] | None) -> Iterator[dict]:
    """Kernel options for passes of `kind`: the engine's, then those that are `asked` for, or all."""
    words = kind == "words"
    engines = {"words": Runner.options, "clip": PIECES, "clips": ragged_attention.KERNEL_OPTIONS}[kind]
    yield engines
    own = [text for text in asked or () if words == (text.count("x") == 1)]
    for text in own if asked else TRIED_FOR_WORDS if words else TRIED:
        options = parse_options(text, NAMES[2:] if words else NAMES)
        if options != engines:
            yield options


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", *SHAPES], default="7B")
    parser.add_argument("--passes", nargs="+", choices=["words", "clip", "clips"], default=["words", "clip", "clips"])
    parser.add_argument("--options", nargs="+", metavar="MxNxWxS", help="beside the engine's (default: a list of them)")
    arguments = parser.parse_args()
    bench = Bench(arguments.size)
    wanted = [
        shape for shape in (GPU_SHAPES if bench.device == "cuda" else CPU_SHAPES) if shape.kind in arguments.passes
    ]
    every = [(shape, [*tried(shape.kind, arguments.options)]) for shape in wanted]

    flop_rate, byte_rate = rates(bench.device)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, attention of Qwen2.5-VL {arguments.size}, {bench.layers} layers")
    print(f"matrix product {flop_rate / 1e12:.1f} TFLOP/s, reading memory {byte_rate / 1e12:.2f} TB/s")
    for shape, choices in every:
        floor = bench.floor(shape, flop_rate, byte_rate)
        print(f"\n{shape.kind}: {shape}; floor {1e3 * floor:.3f} ms\n{'options':<16}{'ms':>9} {'times':>9}", flush=True)
        for number, options in enumerate(choices):
            took = bench.measure(shape, options)
            mine = "  the engine's" if number == 0 else ""
            print(
                f"{'x'.join(map(str, options.values())):<16}{1e3 * took:>9.3f} {took / floor:>9.2f}{mine}", flush=True
            )


if __name__ == "__main__":
    run(main)
