"""Speed and quality of 8-bit weights.

    python code/benchmarks/weights.py products --output results
    python code/benchmarks/weights.py quality --models DIR ... --data FILE --output results

    products  microseconds of each linear layer of the released sizes by the number of rows, for each way to compute it;
              needs a GPU
    quality   captions of checkpoints with weights as they are and in 8 bits: metrics, share of equal tokens, margins

Each command prints tables and writes OUTPUT/weights-COMMAND.json.
"""

import argparse
import json
from pathlib import Path

import torch
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.model.quantization import WEIGHTS
from qwen_vl_streaming.model.released import SIZES

from weights.products import measure_products


def parse() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("products",))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["7B", "3B"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--seconds", type=float, default=90, help="of products: start nothing after this (default: 90)")
    parser.add_argument("--templates", action="store_true", help="of products: also the compiler's templates, slow")
    parser.add_argument("--output", type=Path, default=Path("weights"), help="folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.command == "products":
        if not torch.cuda.is_available():
            raise InputError("products needs a GPU, and there is none")
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        rows = measure_products(arguments.sizes, arguments.weights, arguments.seconds, arguments.templates)
        data = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "products": rows}
        write_file(arguments.output / "weights-products.json", json.dumps(data) + "\n")
