"""Speed of sessions in each mode (serial, fused, pipelined), compared with a lower bound for the GPU.

    python code/benchmarks/latency.py rounds video delay live lanes --size 7B --output results
    python code/benchmarks/latency.py sweep --size 3B --output results
    python code/benchmarks/latency.py many long --size 7B --output results
    python code/benchmarks/latency.py plot --output results

    rounds  seconds per round: one clip and K tokens, including vision tower and host; all clips are available
    video   seconds per video, from pixels to the last token
    delay   latency that the arrival of a clip adds to the next token
    live    sustained frames per second, with K tokens per clip
    sweep   speed-up for K x visual tokens per clip, compared with S(r) = (1 + r) / max(1, r); if it is stopped, the
            same command continues
    many    number of sessions that one model sustains, each with one clip per second
    long    memory and speed over a stream of thousands of clips
    steps   milliseconds of each kind of forward step; kernels of those that generate a token, and of the vision encoder
    lanes   timeline of perception and generation over a few rounds
    plot    plots of the results of sweep and lanes; needs no GPU and no weights

Models have random weights and the shapes of the released ones. Several commands share one model. Each command prints a
table and writes OUTPUT/SIZE-COMMAND.json. A clip is 2 frames, one second of video, of 196 x 364 pixels and 91 visual
tokens; sweep has other sizes. No answer ends early. Every measurement is preceded by a warm-up. Timed intervals end
when the device has finished. `floors.py` defines the floors. --size tiny, which has smaller defaults, tries commands on
a CPU.

--weights measures linear layers in 8 bits, and writes OUTPUT/SIZE-WEIGHTS-COMMAND.json. --cap lets PyTorch take only so
many GiB of a GPU, and shows at the end what was needed: `video --clips 60 --modes fused --weights int8 --cap 16`.
"""

import argparse
from pathlib import Path

import torch
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.model.quantization import WEIGHTS, check_weights
from qwen_vl_streaming.sessions import MODES
from workload import ANSWER, CLIPS, SIZES

from latency.lanes import lanes
from latency.many import long, many
from latency.runs import delay, live, rounds, video
from latency.setup import Bench, write_json
from latency.steps import steps
from latency.sweep import parse_points, sweep

MEASUREMENTS = {
    "steps": steps,
    "rounds": rounds,
    "video": video,
    "delay": delay,
    "live": live,
    "sweep": sweep,
    "many": many,
    "long": long,
    "lanes": lanes,
}
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


def parse() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = (*MEASUREMENTS, "plot")
    add = parser.add_argument
    add("commands", nargs="+", choices=commands, metavar="COMMAND", help=", ".join(commands))
    add("--size", choices=SIZES, default="7B")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    add("--k", type=int, default=3, help="tokens per slot (default: %(default)s)")
    add("--clips", type=int, default=CLIPS, help="clips of rounds, video, steps and lanes (default: %(default)s)")
    add("--answer-tokens", type=int, default=ANSWER, help="length of the answer, of video (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timed runs; the median counts (default: %(default)s)")
    add("--arrivals", type=int, default=100, help="clips of delay (default: %(default)s); live has three times as many")
    add("--frames", type=float, nargs="+", default=[60, 80, 100, 110, 120, 130, 140, 150, 160], help="of live")
    add("--points", nargs="+", metavar="KxTOKENS", help="points of sweep (default: the whole grid)")
    add("--sessions", type=int, nargs="+", default=[32, 64, 96, 128, 160, 192], help="numbers of sessions, of many")
    add("--seconds", type=float, default=20, help="for each number of sessions (default: %(default)s)")
    add("--age", type=int, default=15, help="clips before timing, of many (default: %(default)s)")
    add("--stream", type=int, default=10_000, help="clips of long (default: %(default)s)")
    help_ = "attention window of live, many and long, in clips and tokens"
    add("--window", type=int, nargs=2, default=(60, 400), help=help_)
    add("--weights", choices=WEIGHTS, help="linear layers in 8 bits (default: as they are)")
    add("--cap", type=float, metavar="GIB", help="memory of the GPU that this process may take")
    add("--output", type=Path, default=Path("latency"), help="folder (default: %(default)s)")
    if parser.parse_args().size == "tiny":
        parser.set_defaults(**TINY)
    arguments = parser.parse_args()
    arguments.window = tuple(arguments.window)
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for arguments that no command accepts."""
    k, clips, answer_tokens = arguments.k, arguments.clips, arguments.answer_tokens
    if "serial" not in arguments.modes and "sweep" in arguments.commands:
        raise InputError("sweep compares with serial: add serial to --modes")
    if clips < 2:
        raise InputError(f"--clips {clips}: give at least 2")
    if min(k, arguments.repeats, arguments.arrivals) < 1 or answer_tokens <= k * (clips - 1):
        raise InputError(
            f"--k {k}, --repeats {arguments.repeats} and --arrivals {arguments.arrivals} must be at least 1, and "
            f"--answer-tokens {answer_tokens} must exceed the {k * (clips - 1)} tokens of the slots before the last"
        )
    parse_points(arguments.points)
    if torch.cuda.is_available() and arguments.size != "tiny":
        check_weights(arguments.weights, "cuda", torch.bfloat16)
    elif arguments.cap is not None:
        raise InputError("--cap limits the memory of a GPU, and there is none")


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
    arguments = parse()
    measured = [command for command in MEASUREMENTS if command in arguments.commands]
    if measured:
        modes = arguments.modes if {*measured} - FUSED_ONLY else ()
        if arguments.cap is not None:
            cap_memory(arguments.cap)
        with Bench(arguments.size, modes, arguments.weights) as bench:
            about = bench.about()
            print(
                f"{about['device']}, torch {torch.__version__}, Qwen2.5-VL {arguments.size}, random weights, "
                f"{bench.model.dtype}, weights {arguments.weights or 'as they are'}, {about['variant']}\n"
                f"matrix product {bench.flop_rate / 1e12:.3g} TFLOP/s, "
                f"memory bandwidth {bench.byte_rate / 1e12:.3g} TB/s",
                flush=True,
            )
            for command in measured:
                name = "-".join(filter(None, (arguments.size, arguments.weights, command)))
                path = arguments.output / f"{name}.json"
                if command == "sweep":
                    sweep(bench, arguments, path)
                else:
                    write_json(path, {"about": about, **MEASUREMENTS[command](bench, arguments)})
            if arguments.cap is not None:
                show_memory(arguments.cap)
    if "plot" in arguments.commands:
        from latency.plots import plot_all  # imported here: matplotlib is not needed to measure

        plot_all(arguments.output)
