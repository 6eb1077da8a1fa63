"""How many viewers the server keeps up with, beside the engine alone, and what random clients do to it.

    python code/benchmarks/serving.py load --size 7B --sessions 1 128 144 160 176
    python code/benchmarks/serving.py fuzz --clients 200

`load` drives one session pool without a server, then `python -m qwen_vl_streaming.serve` by clients on the loopback
that send two JPEG frames a second each. Both have the same model, frames and window. Sessions start one by one: the
largest number of them within `--ramp` seconds, fewer at the same rate. Clips count from `--age` seconds after the last
start on. A number of sessions is sustained if 95% of these clips have all their tokens within a second of the clip, and
the median lag of the last quarter exceeds that of the first by at most a quarter of a second. The server's share of a
token's age is what the model does not account for: from a frame's sending to its clip's arrival in the model's process,
and from the token to its receipt. The client's own work, of sending a frame and reading a token, is not part of it.

Weights are random; `--size tiny` tries it on a CPU.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from inputs import make_checkpoint
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.model.trained import training_keys
from qwen_vl_streaming.timeline.variants import VARIANTS
from serving_clients import random_client
from serving_load import HEIGHT, SIDES, WIDTH, load, server
from websockets.asyncio.client import connect


def checkpoint_of(size: str, layers: int | None, folder: Path, k: int) -> Path:
    """A checkpoint with random weights that takes frames of WIDTH x HEIGHT, trained as group."""
    checkpoint = make_checkpoint(size, layers, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    pixels = WIDTH * HEIGHT
    budget = {"min_pixels_per_frame": pixels, "max_pixels_per_frame": pixels, "max_pixels_per_video": 60 * pixels}
    config.update(training_keys(VARIANTS["group"], k), pixel_budget={**budget, "budget": "stream"})
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def fuzz(arguments: argparse.Namespace, flags: list[str]) -> None:
    """Random clients, eight at a time or so; then nothing may be left behind."""
    with server(flags) as (address, process):
        before = psutil.Process(process.pid)
        files, began = before.num_fds(), time.monotonic()

        async def all_of_them() -> list[str]:
            gate = asyncio.Semaphore(16)

            async def one(number: int) -> str:
                async with gate, asyncio.timeout(120):
                    return await random_client(connect(address), random.Random(f"{arguments.seed} {number}"))

            return await asyncio.gather(*map(one, range(arguments.clients)))

        ends = asyncio.run(all_of_them())
        time.sleep(1)
        left = before.num_fds() - files
        print(f"{arguments.clients} clients in {time.monotonic() - began:.1f} s: {dict(Counter(ends))}")
        print(f"{left} open files left, {before.memory_info().rss / 2**20:.0f} MiB")
        if left > 2 or process.poll() is not None:
            sys.exit("error: something was left behind")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("load", "fuzz"))
    add("--size", choices=("tiny", "3B", "7B"), default="tiny")
    add("--layers", type=int, help="fewer layers, to try it out")
    add("--sessions", type=int, nargs="+", default=[1, 64, 128, 144, 160, 176], help="of load")
    add("--seconds", type=int, default=20, help="of video that is measured (default: 20)")
    add("--age", type=int, default=15, help="seconds from the last start to that (default: 15)")
    add("--ramp", type=float, default=10, help="seconds in which the most sessions start (default: 10)")
    add("--sides", choices=SIDES, nargs="+", default=[*SIDES], help="what to measure (default: both)")
    add("--k", type=int, default=3, help="tokens a clip (default: 3)")
    add("--window", type=int, nargs=2, default=(60, 400), help="clips and tokens (default: 60 400)")
    add("--clients", type=int, default=200, help="of fuzz (default: 200)")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, default=Path("serving"), help="of checkpoint and records (default: serving)")
    add("--output", type=Path, default=Path("serving/serving.json"), help="of load (default: serving/serving.json)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(arguments.size, arguments.layers, arguments.folder, arguments.k)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as records:
        flags = ["--model", str(checkpoint), "--port", "0", "--records", records, "--sessions-per-client", "9999"]
        flags += ["--window", *map(str, arguments.window), "--sessions"]
        if arguments.command == "load":
            load(arguments, [*flags, str(max(arguments.sessions))], Path(records))
        else:
            fuzz(arguments, [*flags, "8", "--max-new-tokens", "20", "--window", "8", "40"])


if __name__ == "__main__":
    run(main)
