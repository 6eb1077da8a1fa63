"""Writes a report on result files; see `report/cli.py`, or `--help`."""

from qwen_vl_streaming.common.errors import run
from report.cli import main

if __name__ == "__main__":
    run(main)
