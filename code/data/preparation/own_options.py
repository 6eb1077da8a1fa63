"""Reads the options of the data sets whose files the flags --input and --output of mani_data.py name."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_vl_streaming.common.data_rows import SEGMENT_TIMES
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_data, find_path, find_video_root

from . import own_rows, timed_rows
from .run import RunOptions
from .timed_formats import FORMATS


def own_options(arguments: argparse.Namespace, folder: Path, splits: list[str], common: dict) -> RunOptions:
    """--input and --output name the files, so `folder` and `splits` are not used. Raises InputError."""
    return own_rows.Options(**own_files(arguments, common, lambda path: find_data(path, common["root"], "--input")))


def timed_options(arguments: argparse.Namespace, folder: Path, splits: list[str], common: dict) -> RunOptions:
    """As `own_options`."""
    if arguments.caption_prefix:
        raise InputError("--caption-prefix does not apply to --dataset segments: remove it")
    if arguments.format is None:
        raise InputError(f"--dataset segments needs --format: choose one of {', '.join(FORMATS)}")
    for flag, value, choices in (
        ("--format", arguments.format, FORMATS),
        ("--segment-time", arguments.segment_time, SEGMENT_TIMES),
    ):
        if value is not None and value not in choices:
            raise InputError(f"unknown {flag} {value!r}: choose one of {', '.join(choices)}")
    given = own_files(arguments, common, lambda path: os.path.abspath(find_path(path, common["root"], "--input")))
    if os.path.isdir(given["source"]) and arguments.format in ("livecc", "activitynet"):
        raise InputError(f"--input {arguments.input} is a folder: give a file for --format {arguments.format}")
    return timed_rows.Options(format=arguments.format, segment_time=arguments.segment_time or "", **given)


def own_files(arguments: argparse.Namespace, common: dict, find: Callable[[str], str]) -> dict[str, Any]:
    """The options of a data set whose files --input, which `find` finds, and --output name. Raises InputError."""
    for name in ("input", "output"):
        if not (getattr(arguments, name) or "").strip():
            raise InputError(
                f"--dataset {arguments.dataset} needs --{name}: give the file to "
                f"{'read' if name == 'input' else 'write'}"
            )
    source, output = find(arguments.input), Path(arguments.output)
    if output.suffix != ".jsonl" or output.is_dir():
        raise InputError(f"--output {output}: give the name of a file that ends in .jsonl")
    prefix = f"{output.stem}_"
    written = (output, output.parent / f"{prefix}skipped.jsonl")
    if os.path.realpath(source) in map(os.path.realpath, written):
        raise InputError(f"--output {output} would overwrite --input: give another name")
    files = {"outputs": {Path(source).name: output}, "output_dir": output.parent, "prefix": prefix}
    video_root = find_video_root(arguments.video_root or "", common["root"])
    return {"source": source, "video_root": video_root, **common, **files}
