"""Microseconds of each linear layer by the number of rows, for each way to compute it with 8-bit weights.

A CUDA graph runs the product with different weights in rotation, which together exceed the L2 cache. The rows stay the
same: in the engine, the previous kernel has just written them. Times are those of the device.

    M rows   N outputs   K inputs
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import product as pairs

import torch
from qwen_vl_streaming.engine.quantized_linear import (
    GROUP,
    Tiles,
    choose_tiles,
    converted,
    interleave,
    partial_products,
    sum_parts,
)
from qwen_vl_streaming.model.quantization import quantize, scaled_linear
from qwen_vl_streaming.model.released import SIZES
from torch import Tensor
from torch.nn.functional import linear

ROWS = (1, 16, 32, 64, 96, 128, 160, 256, 512, 1024, 4096)
KERNEL_ROWS = 512
"""Rows up to which the kernel is measured."""
CACHE = 200e6
"""Bytes of 8-bit weights in rotation, several times the L2 cache."""
WIDTHS = {
    (16, 0): ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 4, 6), (128, 8, 4)),
    (32, 0): ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 4)),
    (64, 0): ((64, 4, 4), (128, 4, 4), (128, 8, 3), (128, 8, 5), (256, 8, 3)),
    (64, 32): ((64, 4, 3), (128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3)),
    (128, 0): ((64, 4, 3), (128, 8, 3), (128, 8, 4), (256, 8, 3)),
    (128, 32): ((128, 8, 2), (128, 8, 3)),
    (256, 0): ((128, 8, 2), (128, 8, 3)),
}
"""(outputs, warps, stages) to try, by (rows, more rows) of a tile."""
PER_PROCESSOR = (0, 1, 2, 3, 4, 6)
"""Programs per multiprocessor of the GPU; 0: one program per tile."""
DEVICE = "cuda"
COMPILERS = 12
"""Processes that compile kernels in advance."""


def layer_shapes(size: str) -> dict[str, tuple[int, int]]:
    """(N, K) of the fused linear layers of a released size."""
    text = SIZES[size]
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    kv = hidden // heads * text["num_key_value_heads"]
    return {
        "qkv": (hidden + 2 * kv, hidden),
        "output": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def candidates(m: int, n: int, k: int, processors: int) -> list[Tiles]:
    """Tiles worth measuring: the narrowest that have room for all rows; for many rows, the widest."""
    widths = [width for width in WIDTHS if m <= sum(width)] or [(128, 0), (256, 0)]
    if m <= 128:
        widths = [width for width in widths if sum(width) <= 1.4 * sum(widths[0])]
    elif m > 160:
        widths = [(128, 0), (256, 0)]
    found = []
    for width in widths:
        for (height, warps, stages), each in pairs(WIDTHS[width], PER_PROCESSOR):
            tiles = Tiles(height, *width, each * processors, warps, stages)
            if each == 0 or (tiles.parts(n, k)[0] <= 12 and tiles.parts(n, k)[1] >= 2):
                found.append(tiles)
    return found


def run_kernel(x: Tensor, weight: Tensor, scale: Tensor, tiles: Tiles) -> Tensor:
    """The kernel and the sum over its parts. `x` is already interleaved. In the engine, the previous kernel interleaves
    it, and the next one sums the parts that are needed; here, all are summed."""
    parts = partial_products(x, weight, scale, list(astuple(tiles)))
    return parts[0] if len(parts) == 1 else parts.sum(0)


def compile_kernel(tiles: Tiles, kind: str) -> str | None:
    """Compile the kernel for `tiles` in a worker process; Triton keeps it on disk. Returns why it failed, or None."""
    try:
        weight, scale = quantize(torch.ones(2 * tiles.outputs, 2 * GROUP, device=DEVICE), kind)
        x = torch.ones(16, weight.shape[1], device=DEVICE, dtype=torch.bfloat16)
        run_kernel(x, weight, scale, tiles)
        torch.cuda.synchronize()
    except Exception as error:  # such as a kernel that needs too many registers or too much memory
        return f"{type(error).__name__}: {str(error).splitlines()[0]:.150}"
    return None


def without_programs(tiles: Tiles) -> Tiles:
    return replace(tiles, programs=0)


def compile_kernels(kinds: list[str]) -> set[Tiles]:
    """Compile all tiles in advance. Returns those that failed, without their programs."""
    tiles = [Tiles(shape[0], *width, programs, *shape[1:]) for width, shapes in WIDTHS.items() for shape in shapes
             for programs in (0, 4)]  # fmt: skip
    began, bad = time.perf_counter(), set()
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        todo = list(pairs(tiles, kinds))
        for (each, kind), reason in zip(todo, pool.map(compile_kernel, *zip(*todo, strict=True)), strict=True):
            if reason:
                print(f"{kind} {each}: {reason}", flush=True)
                bad.add(without_programs(each))
    print(f"{len(todo)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return bad


class Layer:
    """One linear layer with several sets of weights, which together exceed the L2 cache."""

    def __init__(self, n: int, k: int, kinds: list[str]):
        count = min(max(2, round(CACHE / (n * k))), 24)
        self.n, self.k = n, k
        self.plain = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(count)]
        self.quantized = {kind: [quantize(weight, kind) for weight in self.plain] for kind in kinds}

    def rows(self, m: int) -> Tensor:
        return torch.randn(m, self.k, device=DEVICE, dtype=torch.bfloat16)


def microseconds(work: Callable[[int], object], count: int) -> float:
    """Microseconds of one call in a CUDA graph that calls `work` with 0 … count - 1: the minimum of several replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(0)
        work(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                work(i)
        least = float("inf")
        for _ in range(4):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            least = min(least, first.elapsed_time(last))
    return 1e3 * least / count


def whole(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Convert all weights, then multiply with cuBLAS. Without the scale, which the compiler fuses with what follows."""
    return linear(x, converted(weight))


def compiled(layer: Layer, x: Tensor, kind: str) -> Callable[[int], object]:
    """The product, compiled from its plain form."""
    torch._dynamo.reset()  # otherwise later layers exceed the limit of recompilations and run uncompiled
    function = torch.compile(scaled_linear, dynamic=False, options={"coordinate_descent_tuning": True})
    return lambda i: function(x, *layer.quantized[kind][i])


class Table:
    """Rows of the result: size, layer, M, way and microseconds, or why a way failed."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, key: tuple[str, str], m: int, way: str, layer: Layer, work: Callable[[int], object], **more) -> dict:
        """Measure `work`. A way that fails is a row too."""
        row = {"size": key[0], "layer": key[1], "m": m, "way": way, "us": None, **more}
        try:
            row["us"] = microseconds(work, len(layer.plain))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), ''):.150}"
            torch.cuda.synchronize()
        self.rows.append(row)
        return row

    def best_tiles(self, key: tuple[str, str], m: int) -> Tiles | None:
        """The fastest tiles for this product, of the first kind that was measured."""
        found = [row for row in self.rows if (row["size"], row["layer"], row["m"]) == (*key, m) and row["us"]]
        best = min((row for row in found if row["way"].endswith("tiles")), key=lambda row: row["us"], default=None)
        return best and Tiles(**best["tiles"])


def measure_products(sizes: list[str], kinds: list[str], seconds: float) -> list[dict]:
    """A row for each layer, M and way, with its microseconds. Starts no measurement after `seconds`; the least
    important come last."""
    began, table = time.perf_counter(), Table()
    bad = compile_kernels(kinds)
    layers = {(size, name): shape for size in sizes for name, shape in layer_shapes(size).items()}

    def late(*what: str) -> bool:
        over = time.perf_counter() - began > seconds
        if over:
            print(f"not measured, {seconds:g} s are over: {' '.join(what)}", flush=True)
        return over

    for kind in kinds:
        for key, shape in layers.items():
            if not late(kind, *key):
                layer = Layer(*shape, [kind])
                for m in ROWS:
                    measure_rows(table, key, layer, kind, m, kind == kinds[0], bad)
                show(table.rows, *key, kind, shape)
    for kind, key in pairs(kinds, layers):  # the compiler takes seconds for each
        if late(kind, *key, "compiled for one row"):
            break
        layer = Layer(*layers[key], [kind])
        row = table.add(key, 1, f"{kind} compiled", layer, compiled(layer, layer.rows(1), kind))
        print(f"{' '.join(key)}, one row, {kind} compiled: {row['us'] or row['error']}", flush=True)
    return table.rows


def measure_rows(
    table: Table, key: tuple[str, str], layer: Layer, kind: str, m: int, first: bool, bad: set[Tiles]
) -> None:
    """Measure all ways for one number of rows. Tiles are searched for the `first` kind and used for all."""
    x, weights = layer.rows(m), layer.quantized[kind]
    if first:
        table.add(key, m, "bf16", layer, lambda i: linear(x, layer.plain[i]))
    if m > 1:
        table.add(key, m, f"{kind} whole", layer, lambda i: whole(x, *weights[i]))
    if m > KERNEL_ROWS:
        return
    interleaved = interleave(x)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for tiles in candidates(m, layer.n, layer.k, processors) if first else ():
        if without_programs(tiles) not in bad:
            work = partial(run_nth, interleaved, weights, tiles)
            table.add(key, m, f"{kind} tiles", layer, work, tiles=asdict(tiles))
    exact = scaled_linear(x, *weights[0]).float()
    for way, tiles in (("kernel", table.best_tiles(key, m)), ("chosen", choose_tiles(m, layer.n, layer.k))):
        if tiles is not None:
            work = partial(run_nth, interleaved, weights, tiles)
            table.add(key, m, f"{kind} {way}", layer, work, tiles=asdict(tiles))
            parts = partial_products(interleaved, *weights[0], list(astuple(tiles)))
            total = sum_parts(parts, tiles, layer.n, layer.k).float()
            error = float((total - exact).abs().max() / exact.abs().max())
            if not error < 0.02:
                print(f"WRONG: {kind} {' '.join(key)}, M {m}, {tiles}: largest error {error:.3g}", flush=True)


def run_nth(x: Tensor, weights: list[tuple[Tensor, Tensor]], tiles: Tiles, i: int) -> Tensor:
    return run_kernel(x, *weights[i], tiles)


def tiles_file(rows: list[dict], kind: str, device: str) -> str:
    """The text of `quantized_tiles.py`: the fastest tiles by shape and rows, or None where another way is faster. For
    one row, the kernel must be a tenth faster than the compiler's product, which is fused with its neighbours."""
    lines = []
    for size, name in dict.fromkeys((row["size"], row["layer"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["layer"]) == (size, name) and row["us"]]
        lines.append(f"    {layer_shapes(size)[name]}: (  # {size} {name}")
        for m in (m for m in ROWS if m <= KERNEL_ROWS):
            found = {row["way"]: row for row in mine if row["m"] == m}
            kernel = found.get(f"{kind} kernel")
            others = [found[f"{kind} {way}"]["us"] for way in ("whole", "compiled") if f"{kind} {way}" in found]
            best = kernel and (not others or kernel["us"] <= min(others) * (0.9 if m == 1 else 1.0))
            lines.append(f"        ({m}, {astuple(Tiles(**kernel['tiles'])) if best else None}),")
        lines.append("    ),")
    body = "\n".join(lines)
    return f'''"""Made by `code/benchmarks/weights.py products` on an {device}; do not edit by hand.

By outputs and inputs of a linear layer: up to how many rows the kernel for 8-bit weights uses which tiles. With more
rows, and where there are none, another way is faster: see `quantized_linear.py`.
"""

TILES: dict[tuple[int, int], tuple[tuple[int, tuple[int, int, int, int, int, int] | None], ...]] = {{
{body}
}}
'''


def show(rows: list[dict], size: str, name: str, kind: str, shape: tuple[int, int]) -> None:
    """Print the rows of one layer: microseconds by M, and the best tiles."""
    rows = [row for row in rows if (row["size"], row["layer"]) == (size, name) and not row["way"].endswith("tiles")]
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] == "bf16" or row["way"].startswith(kind)))
    read = shape[0] * shape[1] / 4.8e6
    print(f"\n{size} {name} {shape}, microseconds; reading its weights at 4.8 TB/s takes {read:.1f} in 8 bits")
    print(f"{'M':>5}" + "".join(f"{way.removeprefix(kind + ' '):>20}" for way in ways) + "  best tiles")
    for m in ROWS:
        found = {row["way"]: row for row in rows if row["m"] == m}
        line = ""
        for way in ways:
            us = found[way]["us"] if way in found else ""
            line += f"{'failed':>20}" if us is None else f"{us:>20.5g}" if us else f"{'':>20}"
        best = found.get(f"{kind} kernel")
        print(f"{m:>5}{line}  {astuple(Tiles(**best['tiles'])) if best else ''}", flush=True)
    for way in ways:
        if error := next((row["error"] for row in rows if row["way"] == way and "error" in row), None):
            print(f"  {way}: {error}")
