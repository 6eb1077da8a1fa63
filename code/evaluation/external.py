"""Benchmarks from outside; see `adapters/cli.py`, or `--help`."""

from adapters.cli import main
from qwen_vl_streaming.common.errors import run

if __name__ == "__main__":
    run(main)
