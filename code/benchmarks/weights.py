"""Command of the benchmark of 8-bit weights; see `weights/cli.py` or `--help`."""

from qwen_vl_streaming.common.errors import run
from weights.cli import main

if __name__ == "__main__":
    run(main)
