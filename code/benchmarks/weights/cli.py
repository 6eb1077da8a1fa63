"""Speed and quality of 8-bit weights.

    python code/benchmarks/weights.py products --output results
    python code/benchmarks/weights.py quality --models DIR ... --data FILE --output results
    python code/benchmarks/weights.py agreement --sizes 7B --output results

    products  microseconds of each linear layer of the released sizes by the number of rows, for each way to compute it;
              needs a GPU
    quality   captions of checkpoints with weights as they are and in 8 bits: metrics, share of equal tokens, margins
    agreement scores of random weights of the released shapes over the same tokens, as they are and in 8 bits

On a GPU, `products --weights int8 --tiles FILE` measures the tiles of the engine's kernel for GPUs other than Hopper
and writes their table, quantized_tiles.py in code/qwen-vl-utils/src/qwen_vl_streaming/engine. The kernel for Hopper has
no table; it is measured as `chosen`. Then `latency.py steps rounds --modes fused --weights int8 --cap 16` measures
sessions, and memory under a cap. Each takes one to two minutes.

Each command prints tables and writes OUTPUT/weights-COMMAND.json.
"""

import argparse
import json
from pathlib import Path

import torch
from latency.setup import TEMPLATE
from latency.setup import load as load_random
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.model.quantization import WEIGHTS, quantize_model
from qwen_vl_streaming.model.released import SIZES
from qwen_vl_streaming.timeline.timeline import make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from training import GRID

from weights.products import measure_products
from weights.quality import Forced, measure_agreement, measure_quality
from weights.tiles import tiles_file

AGREEMENT = (12, 3)
"""Clips, and tokens of each slot, of agreement."""


def parse() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("products", "quality", "agreement"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["7B", "3B"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--seconds", type=float, default=90, help="of products: start nothing after this (default: 90)")
    parser.add_argument("--libraries", action="store_true", help="of products: also what PyTorch ships")
    parser.add_argument("--tiles", type=Path, metavar="FILE", help="of products: write the engine's quantized_tiles.py")
    parser.add_argument("--templates", action="store_true", help="of products: also the compiler's templates, slow")
    parser.add_argument("--layers", type=int, help="of agreement: use fewer layers, for a quick test")
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="of quality: folders of checkpoints")
    parser.add_argument("--data", type=Path, help="of quality: the test data, as for eval.sh")
    parser.add_argument("--video-root", type=Path, metavar="DIR", help="of quality: their folder, as for eval.sh")
    parser.add_argument("--limit", type=int, help="of quality: only the first N videos")
    parser.add_argument("--device", default="", help="of quality: cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, default=Path("weights"), help="folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    device = "cuda" if on_gpu else "cpu"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    kinds = [kind for kind in WEIGHTS if kind in arguments.weights]
    print(f"{name}, torch {torch.__version__}", flush=True)
    if arguments.command == "products":
        if not on_gpu:
            raise InputError("products needs a GPU, and there is none")
        more = arguments.libraries, arguments.templates
        result = measure_products(arguments.sizes, kinds, arguments.seconds, *more)
        if arguments.tiles:
            write_file(arguments.tiles, tiles_file(result, kinds[0], name))
    elif arguments.command == "quality":
        if not arguments.models or arguments.data is None:
            raise InputError("quality needs --models and --data: give folders of checkpoints and the test data")
        flags = ["--limit", str(arguments.limit)] if arguments.limit else []
        where = arguments.data, arguments.video_root
        result = measure_quality(arguments.models, *where, kinds, device, arguments.output, flags)
    else:
        result = [row for size in arguments.sizes for row in agreement(size, arguments.layers, kinds, device)]
    data = {"device": name, "torch": torch.__version__, arguments.command: result}
    write_file(arguments.output / f"weights-{arguments.command}.json", json.dumps(data) + "\n")


def agreement(size: str, layers: int | None, kinds: list[str], device: str) -> list[dict]:
    """Rows of `measure_agreement` for a released size."""
    clips, k = AGREEMENT
    layout = TEMPLATE.layout(GRID, 2.0)
    timeline = make_timeline(VARIANTS["group"], layout, [k] * clips)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 150_000, (k * clips,), generator=draw).tolist()
    pixels = torch.randn(clips, 4 * layout.tokens_per_clip, 1176, generator=draw)

    def load(kind: str | None):
        model = load_random(size, layers, device)
        if kind is not None:
            quantize_model(model, kind)
        return model

    print(f"{size}, random weights, {clips} clips of {layout.tokens_per_clip} visual tokens, {k} tokens each")
    rows = measure_agreement(load, kinds, [Forced(timeline, TEMPLATE, tokens, pixels)])
    return [{"size": size, **row} for row in rows]
