"""Command of the latency benchmark; see `latency/cli.py` or `--help`."""

from latency.cli import main
from qwen_vl_streaming.common.errors import run

if __name__ == "__main__":
    run(main)
