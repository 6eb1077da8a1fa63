"""Validates demo.sh's flags before it creates anything: unknown variants, variants that are already trained for another
number of steps, and GPUs that cannot be used."""

import json
import os
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import DEVICE_HELP, choose_device, look
from qwen_vl_streaming.timeline.variants import get_variant


def check_steps(output: Path, variant: str, steps: int) -> None:
    """Raise InputError if `output` has `variant`, fully trained for another number of steps."""
    trained = output / f"qwen2_5vl-pe-{variant}"
    fix = f"give another --output, or delete that folder and {output / f'evaluation/{variant}_infer.json'}"
    if not (trained / "config.json").exists():
        return
    try:
        trained_steps = json.loads((trained / "run.json").read_text(encoding="utf-8"))["arguments"]["max_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{trained} has no run.json with its number of training steps: {fix}") from error
    if trained_steps != steps:
        raise InputError(f"{trained} was trained for {trained_steps} steps, not {steps}: {fix}")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="--output of demo.sh")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--device", default="", help=DEVICE_HELP)
    parser.add_argument("variants", nargs="+", help="variants to train")
    arguments = parser.parse_args()
    choose_device(arguments.device, look(os.environ))
    for variant in arguments.variants:
        check_steps(arguments.output, get_variant(variant).name, arguments.steps)


if __name__ == "__main__":
    run(main)
