"""Benchmarks from outside: makes rows of their data, puts captions of eval.sh into their layout, and scores them.

    python code/evaluation/external.py livesports-rows LiveSports-3K-CC.json --output livesports.jsonl
    python code/evaluation/external.py livesports-predictions group_infer.json --benchmark LiveSports-3K-CC.json \\
        --output group.jsonl
    python code/evaluation/external.py livesports-judge group.jsonl --baseline GPT-4o.jsonl \\
        --benchmark LiveSports-3K-CC.json --judge-url http://host:8000/v1 --judge-model NAME --output judged.jsonl
    python code/evaluation/external.py activitynet-predictions group_infer.json --output group_dense.json
    python code/evaluation/external.py activitynet-soda group_dense.json --references val_1.json val_2.json

Each command has its own --help.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from qwen_vl_streaming.common.errors import OneLineParser
from qwen_vl_streaming.common.progress import quiet_libraries

from adapters import activitynet, livesports


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, text: str, output: str, required: bool = True) -> argparse.ArgumentParser:
        """A command that calls `run` with its arguments; `output` is the help of --output."""
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--output", type=Path, required=required, help=output)
        return command

    livesports.add_commands(add)
    activitynet.add_commands(add)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    arguments.run(arguments)
