"""Speed of sessions in each mode (serial, fused, pipelined), compared with a lower bound for the GPU.

    python code/benchmarks/latency.py rounds video delay live lanes --size 7B --output results
    python code/benchmarks/latency.py sweep --size 3B --minutes 8 --output results
    python code/benchmarks/latency.py many long --size 7B --output results
    python code/benchmarks/latency.py plot --output results

    rounds  seconds per round: one clip and K tokens, including vision tower and host; all clips are available
    video   seconds per video, from pixels to the last token
    delay   latency that the arrival of a clip adds to the next token
    live    sustained frames per second, with K tokens per clip
    sweep   speed-up for K x visual tokens per clip, compared with S(r) = (1 + r) / max(1, r)
    many    number of sessions that one model sustains, each with one clip per second
    long    memory and speed over a stream of thousands of clips
    steps   milliseconds of each kind of forward step; kernels of those that generate a token, and of the vision encoder
    lanes   timeline of perception and generation over a few rounds
    plot    plots of the results of the other commands; needs no GPU and no weights

Models have random weights and the shapes of the released ones. Several commands share one model. Each command prints a
table and writes OUTPUT/SIZE-COMMAND.json. A clip is 2 frames, one second of video, by default 196 x 364 pixels and 91
visual tokens. No answer ends early. Every measurement is preceded by a warm-up. Timed intervals end when the device has
finished. `floors.py` defines the floors. --size tiny, which has smaller defaults, tries commands on a CPU.

--weights measures linear layers in 8 bits, and writes OUTPUT/SIZE-WEIGHTS-COMMAND.json. --cap lets PyTorch take only so
many GiB of a GPU, and shows at the end what was needed: `video --clips 60 --modes fused --weights int8 --cap 16`.
--ordinary-launches does without programmatic dependent launch (`engine/dependent_launch.py`).
"""

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.engine import dependent_launch
from qwen_vl_streaming.model.quantization import WEIGHTS, check_precision
from qwen_vl_streaming.model.released import SIZES
from qwen_vl_streaming.sessions import MODES
from qwen_vl_streaming.timeline.variants import VARIANTS
from training import ANSWER, CLIPS

from latency.lanes import lanes
from latency.many import long, many
from latency.runs import delay, live, rounds, video
from latency.setup import AUTO, GRIDS, SPREAD, TOKENS, WHOLE, Bench, write_json
from latency.steps import steps
from latency.sweep import parse_points, sweep

COMMANDS = ("steps", "rounds", "video", "delay", "live", "sweep", "many", "long", "lanes", "plot")
"""In the order of execution. Commands before lanes share one perception process, which lanes replaces."""
FUSED_ONLY = {"steps", "many"}
"""Commands that always run in fused mode, independent of --modes."""

TINY = {
    "clips": 8,
    "answer_tokens": 30,
    "repeats": 2,
    "arrivals": 10,
    "frames": [40.0, 80.0],
    "points": ["1x16", "2x32", "4x64"],
    "sessions": [2, 4],
    "seconds": 3,
    "age": 2,
    "stream": 200,
    "window": (10, 40),
}
"""Defaults for --size tiny: each command takes less than a minute on a CPU."""


@dataclass(frozen=True)
class Settings:
    """Command-line arguments."""

    commands: list[str]
    size: str
    layers: int | None
    variant: str
    modes: list[str]
    k: int
    clips: int
    answer_tokens: int
    tokens: int
    chunks: list[str]
    """How fused steps prefill a clip; each is measured: see `Bench.prefill`."""
    repeats: int
    pixels: str
    arrivals: int
    frames: list[float]
    points: list[str] | None
    minutes: float
    sessions: list[int]
    seconds: float
    age: int
    stream: int
    window: tuple[int, int]
    weights: str | None
    cap: float | None
    ordinary_launches: bool
    output: Path

    def __post_init__(self):
        if "serial" not in self.modes and "sweep" in self.commands:
            raise InputError("sweep compares with serial: add serial to --modes")
        if self.clips < 2:
            raise InputError(f"--clips {self.clips}: give at least 2")
        if min(self.k, self.repeats, self.arrivals) < 1 or self.answer_tokens <= self.k * (self.clips - 1):
            raise InputError(
                f"--k {self.k}, --repeats {self.repeats} and --arrivals {self.arrivals} must be at least 1, and "
                f"--answer-tokens {self.answer_tokens} must exceed the {self.k * (self.clips - 1)} tokens of the slots "
                "before the last"
            )
        for how in self.chunks:
            if how not in (WHOLE, SPREAD, AUTO) and not re.fullmatch(r"(1/)?[1-9][0-9]{0,5}", how):
                raise InputError(
                    f"--chunks {how}: give {WHOLE}, {SPREAD}, {AUTO}, a part of a clip per step such as 1/4, or a "
                    "number of visual tokens per step"
                )
        if self.ordinary_launches and "pipelined" in self.modes and {*self.commands} - FUSED_ONLY:
            raise InputError("--ordinary-launches applies to one process: use --modes serial fused")
        parse_points(self.points)
        on_gpu = torch.cuda.is_available() and self.size != "tiny"
        if on_gpu:
            check_precision(self.weights, "cuda", torch.bfloat16)
        elif self.cap is not None:
            raise InputError("--cap limits the memory of a GPU, and there is none")


def parse() -> Settings:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--size", choices=["tiny", *SIZES], default="7B")
    parser.add_argument("--layers", type=int, help="use fewer layers, for a quick test")
    parser.add_argument("--variant", choices=[v for v in VARIANTS if VARIANTS[v].parallel], default="group")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--k", type=int, default=3, help="tokens per slot (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of rounds and video (default: %(default)s)")
    parser.add_argument(
        "--answer-tokens", type=int, default=ANSWER, help="length of the answer, of video (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        choices=GRIDS,
        default=TOKENS,
        help="visual tokens per clip, of rounds, steps and lanes (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks",
        nargs="+",
        default=[WHOLE],
        metavar="HOW",
        help="how fused steps prefill a clip, each of which is measured: whole, 1/N of it beside each token, spread "
        "over all tokens of a slot, auto as the program chooses, or N visual tokens per step",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median counts (default: %(default)s)")
    parser.add_argument("--pixels", choices=["float32", "bfloat16"], default="float32", help="data type of a clip")
    parser.add_argument(
        "--arrivals", type=int, default=100, help="clips of delay (default: %(default)s); live has three times as many"
    )
    parser.add_argument(
        "--frames", type=float, nargs="+", default=[60, 80, 100, 110, 120, 130, 140, 150, 160], help="of live"
    )
    parser.add_argument("--points", nargs="+", metavar="KxTOKENS", help="points of sweep (default: the whole grid)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop sweep after this; it can be resumed")
    parser.add_argument(
        "--sessions", type=int, nargs="+", default=[32, 64, 96, 128, 160, 192], help="numbers of sessions, of many"
    )
    parser.add_argument("--seconds", type=float, default=20, help="for each number of sessions (default: %(default)s)")
    parser.add_argument("--age", type=int, default=15, help="clips before timing, of many (default: %(default)s)")
    parser.add_argument("--stream", type=int, default=10_000, help="clips of long (default: %(default)s)")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(60, 400),
        help="attention window of live, many and long, in clips and tokens",
    )
    parser.add_argument("--weights", choices=WEIGHTS, help="linear layers in 8 bits (default: as they are)")
    parser.add_argument("--cap", type=float, metavar="GIB", help="memory of the GPU that this process may take")
    parser.add_argument(
        "--ordinary-launches",
        action="store_true",
        help="start each kernel of a step when the one before has completed (default on Hopper: before)",
    )
    parser.add_argument("--output", type=Path, default=Path("latency"), help="folder (default: %(default)s)")
    if parser.parse_args().size == "tiny":
        parser.set_defaults(**TINY)
    values = vars(parser.parse_args())
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def measure(settings: Settings, bench: Bench, command: str) -> None:
    """Run one command and write its JSON file."""
    parts = settings.size, settings.weights, "ordinary" if settings.ordinary_launches else None, command
    path = settings.output / f"{'-'.join(filter(None, parts))}.json"
    k, clips, repeats, chunks = settings.k, settings.clips, settings.repeats, settings.chunks
    answer_tokens, tokens = settings.answer_tokens, settings.tokens
    if command == "sweep":
        sweep(bench, parse_points(settings.points), chunks, repeats, path, settings.minutes)
        return
    if command == "rounds":
        result = rounds(bench, k, clips, answer_tokens, tokens, repeats, chunks)
    elif command == "video":
        result = video(bench, k, clips, answer_tokens, repeats, chunks)
    elif command == "delay":
        result = delay(bench, k, settings.arrivals, chunks)
    elif command == "live":
        result = live(bench, k, 3 * settings.arrivals, settings.frames, chunks, tuple(settings.window))
    elif command == "steps":
        result = steps(bench, k, clips, answer_tokens, tokens, chunks)
    elif command == "lanes":
        result = lanes(bench, k, clips, answer_tokens, tokens, chunks)
    elif command == "many":
        result = many(bench, k, settings.sessions, settings.seconds, settings.age, tuple(settings.window))
    else:
        result = long(bench, k, settings.stream, tuple(settings.window), chunks)
    write_json(path, {"about": bench.about(), **result})


def cap_memory(gib: float) -> None:
    """Let PyTorch allocate at most `gib` GiB of the GPU. What CUDA itself takes is not part of it: see
    `show_memory`."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0), 0)


def show_memory(gib: float) -> None:
    """Print the most memory that this process needed of a GPU."""
    free, total = torch.cuda.mem_get_info(0)
    tensors, reserved = torch.cuda.max_memory_allocated(0) / 2**30, torch.cuda.max_memory_reserved(0) / 2**30
    now = torch.cuda.memory_reserved(0)
    print(
        f"\nmemory under a cap of {gib:g} GiB: tensors at most {tensors:.2f} GiB, PyTorch at most {reserved:.2f} GiB; "
        f"CUDA itself, if nothing else runs on the GPU, {(total - free - now) / 2**30:.2f} GiB"
    )


def main() -> None:
    settings = parse()
    measured = [command for command in COMMANDS if command in settings.commands and command != "plot"]
    if measured:
        pixels = getattr(torch, settings.pixels)
        modes = tuple(settings.modes) if {*measured} - FUSED_ONLY else ()
        if settings.cap is not None:
            cap_memory(settings.cap)
        if settings.ordinary_launches:
            dependent_launch.is_supported = lambda device: False
        with Bench(
            settings.size, VARIANTS[settings.variant], modes, settings.layers, pixels, weights=settings.weights
        ) as bench:
            about = bench.about()
            print(
                f"{about['device']}, torch {torch.__version__}, Qwen2.5-VL {settings.size}, random weights, "
                f"{bench.model.dtype}, weights {settings.weights or 'as they are'}, {settings.variant}\n"
                f"matrix product {bench.flop_rate / 1e12:.3g} TFLOP/s, "
                f"memory bandwidth {bench.byte_rate / 1e12:.3g} TB/s",
                flush=True,
            )
            for command in measured:
                measure(settings, bench, command)
            if settings.cap is not None:
                show_memory(settings.cap)
    if "plot" in settings.commands:
        from latency.plots import plot_all  # imported here: matplotlib is not needed to measure

        plot_all(settings.output)
