"""Prints the table of docs/training.md: what the planner predicts for common GPUs, in Markdown.

python -m qwenvl.planner.table
"""

from pathlib import Path

from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.model.released import SIZES, released_config

from ..arguments import ModelArguments
from .constants import GIB
from .gpus import parse_gpus
from .lengths import assumed_lengths
from .plan import Given, choose
from .shape import find_shape
from .text import recomputed

MACHINES = ("RTX4080", "RTX4090", "L40S", "A100-80GB", "H100-80GB", "4xL40S", "4xA100-80GB", "8xH100-80GB", "8xH200")
SAMPLES = 20_000
"""Those of the paper."""


def rows() -> list[str]:
    """The lines of the table."""
    lines = [
        f"| GPUs | size | trained | plan | GiB a GPU | tokens/s | hours for {SAMPLES:,} samples |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    here, lengths = str(Path(__file__).parent), assumed_lengths(8192, SAMPLES)
    for machine in MACHINES:
        for size in SIZES:
            for lora in (False, True):
                shape = find_shape(released_config(size), ModelArguments(here, lora_enable=lora))
                gpus = parse_gpus(machine)
                name = machine.removeprefix(f"{gpus.count}x")
                start = f"| {gpus.count} x {name} | {size} | {'LoRA' if lora else 'full'} |"
                try:
                    plan = choose(shape, lengths, gpus, Given())
                except InputError:
                    lines.append(f"{start} does not fit | | | |")
                    continue
                settings = plan.settings
                how = [settings.zero.title, f"{settings.samples} a row", recomputed(plan, shape)]
                how += ["compiled"] if settings.compiled else []
                hours = SAMPLES * lengths.mean / plan.speed.tokens / 3600
                gib, tokens = plan.memory.peak / GIB, plan.speed.tokens
                lines.append(f"{start} {', '.join(how)} | {gib:.1f} | {tokens:,.0f} | {hours:.1f} |")
    return lines


def main() -> None:
    OneLineParser(prog="python -m qwenvl.planner.table", description=__doc__.split("\n\n")[0]).parse_args()
    print("\n".join(rows()))


if __name__ == "__main__":
    run(main)
