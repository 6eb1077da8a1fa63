"""Starts the program, as `python -m paper`."""

from qwen_vl_streaming.common.errors import run

from .cli import main

run(main)
