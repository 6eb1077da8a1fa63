"""Microseconds of each linear layer by the number of rows, for each way to compute it with 8-bit weights.

A CUDA graph runs a product with different weights in rotation, which together exceed the L2 cache. The rows are the
same, as they come from a kernel just before. Times are those of the device.

    M rows   N outputs   K inputs
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import product as pairs

import torch
from qwen_vl_streaming.engine.hopper import hopper_processors
from qwen_vl_streaming.engine.quantized_linear import (
    Tiles,
    choose_tiles,
    converted,
    few_rows_product,
    fit_tiles,
    interleave,
    sum_parts,
)
from qwen_vl_streaming.model.quantization import quantize, scaled_linear
from torch import Tensor
from torch.nn.functional import linear

from weights.tiles import (
    DEVICE,
    FEW,
    KERNEL_ROWS,
    ROWS,
    candidates,
    compile_kernels,
    layer_shapes,
    parts_of,
    run_nth,
)

CACHE = 200e6
"""Bytes of 8-bit weights in rotation, several times the L2 cache."""
SLICE = 24 * 2**20
"""Bytes of bf16 weights that stay in the L2 cache, for conversion slice by slice."""


class Layer:
    """One linear layer, with so many different weights that they exceed the L2 cache."""

    def __init__(self, n: int, k: int, kinds: list[str]):
        count = min(max(2, round(CACHE / (n * k))), 24)
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


def whole(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """All weights are converted, then cuBLAS multiplies. The scale is left to what follows, as the compiler does."""
    return linear(x, converted(weight))


def in_slices(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `whole`, in slices that stay in the L2 cache."""
    output = x.new_empty(len(x), len(weight))
    step = max(128, SLICE // (2 * weight.shape[1]) // 128 * 128)
    for first in range(0, len(weight), step):
        torch.mm(x, converted(weight[first : first + step]).T, out=output[:, first : first + step])
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


def compiled(layer: Layer, x: Tensor, kind: str | None, **options) -> Callable[[int], object]:
    """The product as the compiler makes it from the plain form."""
    torch._dynamo.reset()  # else the limit of recompilations is reached, and what follows runs uncompiled
    if kind is None:
        function = torch.compile(lambda x, weight: linear(x, weight), dynamic=False, options=options)
        return lambda i: function(x, layer.plain[i])
    function = torch.compile(scaled_linear, dynamic=False, options=options)
    return lambda i: function(x, *layer.quantized[kind][i])


class Table:
    """Rows of the result: size, layer, M, way and microseconds, or why a way failed."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, key: tuple[str, str], m: int, way: str, layer: Layer, work: Callable[[int], object], **more) -> dict:
        """Measure `work`. A way of a library that does not support a shape is a row too."""
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


def measure_products(
    sizes: list[str], kinds: list[str], seconds: float, libraries: bool, templates: bool
) -> list[dict]:
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
                    measure_rows(table, key, layer, kind, m, kind == kinds[0], bad, libraries)
                show(table.rows, *key, kind, shape)
    for kind, key in pairs(kinds, layers):  # the compiler takes seconds for each
        if late(kind, *key, "compiled for one row"):
            break
        layer = Layer(*layers[key], [kind])
        x, options = layer.rows(1), {"coordinate_descent_tuning": True}
        row = table.add(key, 1, f"{kind} compiled", layer, compiled(layer, x, kind, **options))
        print(f"{' '.join(key)}, one row, {kind} compiled: {row['us'] or row['error']}", flush=True)
    for key in layers if templates else ():
        if late(*key, "template"):
            break
        layer = Layer(*layers[key], ["int8"])
        options = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON", "prologue_fusion": True}
        row = table.add(key, 92, "int8 template", layer, compiled(layer, layer.rows(92), "int8", **options))
        print(f"{' '.join(key)}, 92 rows, int8 template: {row['us'] or row['error']}", flush=True)
    return table.rows


def measure_rows(
    table: Table, key: tuple[str, str], layer: Layer, kind: str, m: int, first: bool, bad: set[Tiles], libraries: bool
) -> None:
    """All ways for one number of rows. The tiles of the kernel are searched for the `first` kind, and used for all."""
    x, weights = layer.rows(m), layer.quantized[kind]
    ways = library_ways(kind, m) if libraries else {}
    if m > max(FEW):
        ways |= {function.__name__: function for function in (whole, in_slices)}
    if first:
        table.add(key, m, "bf16", layer, lambda i: linear(x, layer.plain[i]))
    for way, function in ways.items():
        table.add(key, m, f"{kind} {way}", layer, lambda i, function=function: function(x, *weights[i]))
    if m > KERNEL_ROWS:
        return
    interleaved = interleave(x)
    exact = scaled_linear(x, *weights[0]).float()
    if m <= max(FEW):
        table.add(key, m, f"{kind} few rows", layer, lambda i: few_rows_product(interleaved, *weights[i]))
        check(f"{kind} {' '.join(key)}, M {m}, few rows", few_rows_product(interleaved, *weights[0]), exact)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for tiles in candidates(m, layer.n, layer.k, processors) if first and m > max(FEW) else ():
        if tiles._replace(programs=0) not in bad and fit_tiles(tiles, x.device) == tiles:
            work = partial(run_nth, interleaved, weights, tiles)
            table.add(key, m, f"{kind} tiles", layer, work, tiles=tiles._asdict())
    chosen = choose_tiles(m, layer.n, layer.k, hopper_processors(x.device))
    chosen = chosen and fit_tiles(chosen, x.device)
    for way, tiles in (("kernel", table.best_tiles(key, m)), ("chosen", chosen)):
        if tiles is not None:
            work = partial(run_nth, interleaved, weights, tiles)
            if "error" in table.add(key, m, f"{kind} {way}", layer, work, tiles=tiles._asdict()):
                continue
            parts = parts_of(interleaved, *weights[0], tiles)
            check(f"{kind} {' '.join(key)}, M {m}, {tiles}", sum_parts(parts, tiles, layer.n, layer.k), exact)


def check(what: str, found: Tensor, exact: Tensor) -> None:
    error = float((found.float() - exact).abs().max() / exact.abs().max())
    if not error < 0.02:
        print(f"WRONG: {what}: largest error {error:.3g}", flush=True)


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
        print(f"{m:>5}{line}  {tuple(Tiles(**best['tiles'])) if best else ''}", flush=True)
    for way in ways:
        if error := next((row["error"] for row in rows if row["way"] == way and "error" in row), None):
            print(f"  {way}: {error}")
