"""Refuses in one line, before the demo makes anything, an unknown variant, one that was trained for other steps, and a
GPU that is there and cannot be used."""

import json
import os
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.devices import DEVICE_HELP, choose_device, look
from qwen_vl_streaming.timeline.variants import get_variant


def check_steps(output: Path, variant: str, steps: int) -> None:
    """Raises InputError where `output` holds `variant`, trained to its end, for another number of steps."""
    trained = output / f"qwen2_5vl-pe-{variant}"
    mend = f"name another --output, or delete that folder and {output / f'evaluation/{variant}_infer.json'}"
    if not (trained / "config.json").exists():
        return
    try:
        was = json.loads((trained / "run.json").read_text(encoding="utf-8"))["arguments"]["max_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{trained} holds no run.json that says for how many steps it was trained: {mend}") from error
    if was != steps:
        raise InputError(f"{trained} was trained for {was} steps, not {steps}: {mend}")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the demo")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps that were asked for")
    parser.add_argument("--device", default="", help=DEVICE_HELP)
    parser.add_argument("variants", nargs="+")
    arguments = parser.parse_args()
    choose_device(arguments.device, look(os.environ))
    for variant in arguments.variants:
        check_steps(arguments.output, get_variant(variant).name, arguments.steps)


if __name__ == "__main__":
    run(main)
