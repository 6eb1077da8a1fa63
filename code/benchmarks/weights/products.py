"""Microseconds of each linear layer by the number of rows, for each way to compute it with 8-bit weights.

A CUDA graph runs a product with different weights in rotation, which together exceed the L2 cache. The rows are the
same, as they come from a kernel just before. Times are those of the device.

    M rows   N outputs   K inputs
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple
from itertools import product as pairs

import torch
from qwen_vl_streaming.engine.quantized_linear import GROUP, Tiles, choose_tiles, kernel_product
from qwen_vl_streaming.model.quantization import quantize, scaled_linear
from qwen_vl_streaming.model.released import SIZES
from torch import Tensor
from torch.nn.functional import linear

ROWS = (1, 2, 4, 16, 32, 64, 92, 128, 160, 256, 512, 1024, 4096)
KERNEL_ROWS = 512
"""Rows up to which the kernel is measured."""
CACHE = 200e6
"""Bytes of 8-bit weights in rotation, several times the L2 cache."""
SLICE = 24 * 2**20
"""Bytes of bf16 weights that stay in the L2 cache, for conversion slice by slice."""
WIDTHS = {
    16: ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 4), (128, 8, 6)),
    32: ((64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 4)),
    64: ((64, 4, 3), (64, 4, 5), (128, 4, 4), (128, 8, 3), (128, 8, 4)),
    128: ((64, 4, 3), (128, 4, 3), (128, 8, 2), (128, 8, 3), (128, 8, 4), (256, 8, 3)),
    256: ((64, 4, 2), (64, 8, 2), (128, 8, 2), (128, 8, 3)),
}
"""By the rows of a program: its outputs, warps and stages."""
SPLITS = (1, 2, 3, 4, 6, 8, 12)
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
    """Tiles worth measuring: no rows more than double, programs for at most 9 waves, and at least 4 groups of inputs
    each."""
    widths = [width for width in WIDTHS if m <= width] or [max(WIDTHS)]
    if m > 64:  # wider ones read the weights fewer times, narrower ones compute fewer rows that do not exist
        widths = [64, 128, 256]
    found = []
    for width in widths[:3] if m > 64 else widths[:1]:
        for (height, warps, stages), splits in pairs(WIDTHS[width], SPLITS):
            programs = -(-n // height) * -(-m // width) * splits
            enough = splits == 1 or (programs <= 9 * processors and k // GROUP >= 4 * splits)
            if enough and (splits == 1 or programs // splits < 4 * processors):
                found.append(Tiles(height, width, splits, warps, stages))
    return found


def compile_kernel(tiles: Tiles, kind: str) -> str | None:
    """Compile the kernel for `tiles`, in a process of its own: Triton keeps it on disk. Returns why it failed."""
    try:
        weight, scale = quantize(torch.ones(tiles.outputs, GROUP * tiles.splits, device=DEVICE), kind)
        x = torch.ones(16, weight.shape[1], device=DEVICE, dtype=torch.bfloat16)
        kernel_product(x, weight, scale, tiles)
        torch.cuda.synchronize()
    except Exception as error:  # a kernel that needs more registers or memory than there are is one candidate less
        return f"{type(error).__name__}: {str(error).splitlines()[0]:.150}"
    return None


def compile_kernels(kinds: list[str]) -> set[Tiles]:
    """Compile all tiles in advance. Returns those, without their splits, that failed."""
    tiles = [Tiles(height, width, splits, *rest) for width, shapes in WIDTHS.items() for height, *rest in shapes
             for splits in (1, 2)]  # fmt: skip
    began, bad = time.perf_counter(), set()
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        todo = list(pairs(tiles, kinds))
        for (each, kind), reason in zip(todo, pool.map(compile_kernel, *zip(*todo, strict=True)), strict=True):
            if reason:
                print(f"{kind} {each}: {reason}", flush=True)
                bad.add(Tiles(each.outputs, each.rows, 0, each.warps, each.stages))
    print(f"{len(todo)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return bad


class Layer:
    """One linear layer, with so many different weights that they exceed the L2 cache."""

    def __init__(self, n: int, k: int, kinds: list[str]):
        count = max(2, round(CACHE / (n * k)))
        self.n, self.k = n, k
        self.plain = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(count)]
        self.quantized = {kind: [quantize(weight, kind) for weight in self.plain] for kind in kinds}

    def rows(self, m: int) -> Tensor:
        return torch.randn(m, self.k, device=DEVICE, dtype=torch.bfloat16)


def microseconds(work: Callable[[int], object], count: int) -> float:
    """Of one call, of a graph that calls `work` with 0 … count - 1: the least of several replays."""
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


def converted(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """All weights are converted, then cuBLAS multiplies. The scale is left to what follows, as the compiler does."""
    return linear(x, weight.to(x.dtype))


def in_slices(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `converted`, in slices that stay in the L2 cache."""
    output = x.new_empty(len(x), len(weight))
    step = max(128, SLICE // (2 * weight.shape[1]) // 128 * 128)
    for first in range(0, len(weight), step):
        torch.mm(x, weight[first : first + step].to(x.dtype).T, out=output[:, first : first + step])
    return output


def library_ways(kind: str, m: int) -> dict[str, Callable]:
    """What PyTorch ships for this kind of weight and number of rows. Names that end in * round activations too."""
    ways: dict[str, Callable] = {}
    if kind == "int8" and m <= 128:
        ways["_weight_int8pack_mm"] = lambda x, w, s: torch._weight_int8pack_mm(x, w, s.to(x.dtype))
    if kind == "int8" and m > 16:
        ways["_int_mm*"] = lambda x, w, s: torch._int_mm(x.to(torch.int8), w.T)
    if kind == "fp8" and m >= 16:
        ways["_scaled_mm*"] = lambda x, w, s: torch._scaled_mm(
            x.to(torch.float8_e4m3fn), w.T, x.float().amax(1, keepdim=True), s[None], out_dtype=x.dtype
        )
    return ways


def compiled_rows(layer: Layer, x: Tensor, kind: str | None, **options) -> Callable[[int], object]:
    """The product as the compiler makes it from the plain form."""
    if kind is None:
        function = torch.compile(lambda x, weight: linear(x, weight), dynamic=False, options=options)
        return lambda i: function(x, layer.plain[i])
    function = torch.compile(scaled_linear, dynamic=False, options=options)
    return lambda i: function(x, *layer.quantized[kind][i])


def measure_products(sizes: list[str], kinds: list[str], seconds: float, templates: bool) -> list[dict]:
    """A row for each layer, M and way, with its microseconds. Stops starting measurements after `seconds`, the least
    important last."""
    began, table = time.perf_counter(), []
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    bad = compile_kernels(kinds)
    layers = {(size, name): shape for size in sizes for name, shape in layer_shapes(size).items()}

    def late(what: str) -> bool:
        if time.perf_counter() - began > seconds:
            print(f"not measured, {seconds:g} s are over: {what}", flush=True)
            return True
        return False

    def add(size: str, name: str, m: int, how: str, us: float | None, **more) -> None:
        table.append({"size": size, "layer": name, "m": m, "way": how, "us": us, **more})

    def attempt(size: str, name: str, m: int, how: str, layer: Layer, work: Callable[[int], object]) -> None:
        try:
            add(size, name, m, how, microseconds(work, len(layer.plain)))
        except Exception as error:  # a library's way that does not support this shape: shown in the table
            reason = next(iter(str(error).splitlines()), "")
            add(size, name, m, how, None, error=f"{type(error).__name__}: {reason:.150}")
            torch.cuda.synchronize()

    for order, kind in enumerate(kinds):
        for (size, name), (n, k) in layers.items():
            if late(f"{kind} {size} {name}"):
                continue
            layer = Layer(n, k, [kind])
            weights = layer.quantized[kind]
            for m in ROWS:
                x = layer.rows(m)
                if order == 0:
                    attempt(size, name, m, "bf16", layer, lambda i, x=x, layer=layer: linear(x, layer.plain[i]))
                if m >= 64:
                    for function in (converted, in_slices):
                        way = f"{kind} {function.__name__}"
                        attempt(size, name, m, way, layer, lambda i, x=x, w=weights, f=function: f(x, *w[i]))
                for way, function in library_ways(kind, m).items():
                    attempt(size, name, m, f"{kind} {way}", layer, lambda i, x=x, w=weights, f=function: f(x, *w[i]))
                best = None
                for tiles in candidates(m, n, k, processors) if m <= KERNEL_ROWS else []:
                    if Tiles(tiles.outputs, tiles.rows, 0, tiles.warps, tiles.stages) in bad:
                        continue
                    way = f"{kind} tiles"
                    attempt(size, name, m, way, layer, lambda i, x=x, w=weights, t=tiles: kernel_product(x, *w[i], t))
                    table[-1]["tiles"] = asdict(tiles)
                    if (us := table[-1]["us"]) is not None and (best is None or us < best[0]):
                        best = us, tiles
                if best:
                    add(size, name, m, f"{kind} kernel", best[0], tiles=asdict(best[1]))
                    exact, found = scaled_linear(x, *weights[0]), kernel_product(x, *weights[0], best[1])
                    error = float((found - exact).float().abs().max() / exact.float().abs().max())
                    if not error < 0.02:
                        print(f"WRONG: {kind} {size} {name} M {m} {best[1]}: largest error {error:.3g}", flush=True)
                    chosen = choose_tiles(m, n, k)
                    way = f"{kind} chosen"
                    attempt(size, name, m, way, layer, lambda i, x=x, w=weights, t=chosen: kernel_product(x, *w[i], t))
            show(table, size, name, kind, n * k)
            del layer, weights
    for kind, (size, name) in pairs(kinds, layers):  # the compiler takes seconds for each
        if late(f"{kind} compiled {size} {name}, one row"):
            break
        layer = Layer(*layers[size, name], [kind])
        work = compiled_rows(layer, layer.rows(1), kind, coordinate_descent_tuning=True)
        attempt(size, name, 1, f"{kind} compiled", layer, work)
        if kind == kinds[0]:
            work = compiled_rows(layer, layer.rows(1), None, coordinate_descent_tuning=True)
            attempt(size, name, 1, "bf16 compiled", layer, work)
        for row in table[-2:]:
            if row["layer"] == name and "compiled" in row["way"]:
                print(f"{size} {name:<8} one row, {row['way']}: {row['us'] or row['error']}", flush=True)
    if templates:
        for size, name in layers:
            if late(f"templates {size} {name}"):
                break
            layer = Layer(*layers[size, name], ["int8"])
            options = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON", "prologue_fusion": True}
            attempt(size, name, 92, "int8 template", layer, compiled_rows(layer, layer.rows(92), "int8", **options))
            print(f"{size} {name} 92 rows, template: {table[-1]['us'] or table[-1]['error']}", flush=True)
    return table


def show(table: list[dict], size: str, name: str, kind: str, weights: int) -> None:
    """Print the rows of one layer: microseconds by M, and the best tiles."""
    rows = [row for row in table if (row["size"], row["layer"]) == (size, name)]
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] == "bf16" or row["way"].startswith(kind)))
    ways = [way for way in ways if not way.endswith("tiles")]
    print(
        f"\n{size} {name}, {weights / 1e6:.1f} M weights, microseconds\n{'M':>5}"
        + "".join(f"{way:>24}" for way in ways)
    )
    for m in dict.fromkeys(row["m"] for row in rows):
        found = {row["way"]: row for row in rows if row["m"] == m}
        cells = [found.get(way) for way in ways]
        line = "".join(f"{(c['us'] and round(c['us'], 1)) or 'failed' if c else '':>24}" for c in cells)
        best = found.get(f"{kind} kernel")
        print(f"{m:>5}{line}  {astuple(Tiles(**best['tiles'])) if best else ''}", flush=True)
    for row in rows:
        if row.get("error") and row["way"] in ways:
            print(f"  {row['way']}, M {row['m']}: {row['error']}")
            break
