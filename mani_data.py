"""Prepares the rows that training and evaluation use from a data set: --dataset pe-video (default), funqa, jsonl or
segments.

pe-video: writes dataset/train_3_5.jsonl and test_3_5.jsonl. Reads JSON files with videos, or tar shards, in
dataset/PE-Video; if there are none, streams the shards from the hub. Keeps videos of 5 to 30 seconds with 3 to 5
caption tokens per second.

funqa: writes dataset/funqa_train.jsonl and funqa_test.jsonl with the description and reasoning questions (sub-tasks H2
H3 C2 C3 M2 M3). Reads FunQA_train.json and FunQA_test.json with their videos, or train.zip and test.zip, in
dataset/FunQA; if there are none, streams them from the hub. Keeps all lengths unless a bound is given.

jsonl: filters your own rows by the rules of pe-video. Reads --input, in any format that training reads, and writes the
rows that it keeps to --output, and beside it a report and a line for each other row with the reason.

segments: converts captions with times to rows with `segments`. Reads --input, a file or folder in the published shape
that --format names, and writes as jsonl does.

If a run is killed, the same command resumes it.
"""

import argparse
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import funqa.run
import pe_video.run
from preparation import own_rows, timed_rows
from preparation.own_options import own_options, timed_options
from preparation.report import SplitStatistics
from preparation.rules import Rules
from preparation.run import STATE_FOLDER, RunOptions, check_rows
from preparation.timed_formats import FORMATS
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.paths import look_up
from qwen_vl_streaming.common.progress import quiet_http

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "test")
REPORTS = ("skipped.jsonl", "report.png", "report.json")


@dataclass(frozen=True)
class DataSet:
    """A data set that this program prepares."""

    hub_name: str
    output_name: str
    """Of the file of rows of a split. Empty if --output names the file."""
    rules: Rules
    """The default bounds."""
    prepare: Callable[[Any], dict[str, SplitStatistics]]
    options: Callable[[argparse.Namespace, Path, list[str], dict], RunOptions]
    """Its options, from the arguments, its folder, the splits, and the options that all data sets share."""
    flags: tuple[str, ...] = ()
    """Arguments that only it has."""
    refused: tuple[str, ...] = ()
    """General arguments that it does not have."""
    prefix: str = ""
    """Of its reports' names."""


def pe_video_options(arguments: argparse.Namespace, folder: Path, splits: list[str], common: dict) -> RunOptions:
    folders = {"train": arguments.train_dir or folder / "train", "test": arguments.test_dir or folder / "test"}
    return pe_video.run.Options(splits={split: folders[split].absolute() for split in splits}, **common)


def funqa_options(arguments: argparse.Namespace, folder: Path, splits: list[str], common: dict) -> RunOptions:
    limits = {name: getattr(arguments, name) for name in ("max_questions", "max_references")}
    return funqa.run.Options(splits=splits, source=folder.absolute(), **limits, **common)


FOLDERS = ("split", "source", "dataset_root", "dataset_name", "output_dir", "train_output_name", "test_output_name")
OWN_FILES = ("input", "output", "video_root")
BOUNDS = ("min_seconds", "max_seconds", "min_tokens_per_second", "max_tokens_per_second")
DATASETS = {
    "pe-video": DataSet(
        "facebook/PE-Video",
        "{}_3_5.jsonl",
        Rules(),
        pe_video.run.prepare_dataset,
        pe_video_options,
        ("train_dir", "test_dir"),
    ),
    "funqa": DataSet(
        "fesvhtr/FunQA",
        "funqa_{}.jsonl",
        Rules(0.0, math.inf, 0.0, math.inf),
        funqa.run.prepare_funqa,
        funqa_options,
        ("max_questions", "max_references"),
        prefix="funqa_",
    ),
    "jsonl": DataSet("", "", Rules(), own_rows.prepare_own_rows, own_options, OWN_FILES, FOLDERS),
    "segments": DataSet(
        "",
        "",
        Rules(0.0, math.inf, 0.0, math.inf),
        timed_rows.prepare_timed_rows,
        timed_options,
        (*OWN_FILES, "format", "segment_time"),
        (*FOLDERS, *BOUNDS, "max_samples"),
    ),
}
"""Add a data set here."""


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", default="pe-video", metavar="NAME", help="pe-video, funqa, jsonl or segments (default: pe-video)"
    )
    parser.add_argument("--split", choices=SPLITS, help="prepare only this split (default: both)")
    where = parser.add_argument_group("paths")
    where.add_argument("--source", type=Path, metavar="DIR", help="folder of the data set, see above")
    where.add_argument("--dataset-root", type=Path, help="parent of the data sets (default: dataset)")
    hub_names = " or ".join(each.hub_name for each in DATASETS.values() if each.hub_name)
    where.add_argument("--dataset-name", help=f"data set on the hub (default: {hub_names})")
    where.add_argument("--train-dir", type=Path, help="pe-video: train split (default: <dataset-root>/PE-Video/train)")
    where.add_argument("--test-dir", type=Path, help="pe-video: test split (default: <dataset-root>/PE-Video/test)")
    where.add_argument("--output-dir", type=Path, help="folder for rows and report (default: --dataset-root)")
    where.add_argument("--train-output-name", help="default: train_3_5.jsonl or funqa_train.jsonl")
    where.add_argument("--test-output-name", help="default: test_3_5.jsonl or funqa_test.jsonl")
    where.add_argument(
        "--input",
        help="jsonl: JSON Lines, Parquet, a folder of save_to_disk, or hf://datasets/OWNER/NAME[:SPLIT]; segments: a "
        "file or folder in the format that --format names",
    )
    where.add_argument(
        "--output", help="jsonl, segments: file to write, such as my_3_5.jsonl; the reports are named after it"
    )
    where.add_argument("--video-root", help="jsonl, segments: folder of the videos, as --video_root in training")
    timed = parser.add_argument_group("captions with times (--dataset segments)")
    timed.add_argument("--format", help=f"the shape of --input: {', '.join(FORMATS)}")
    own = ", ".join(f"{name}: {each.segment_time}" for name, each in FORMATS.items())
    timed.add_argument(
        "--segment-time",
        help="when the text of a segment may be written: from its end, from its start, or spread word by word from "
        f"start to end (default: {own})",
    )
    where.add_argument(
        "--tokenizer-model-id", default="Qwen/Qwen2.5-VL-7B-Instruct", help="hub id or folder (default: %(default)s)"
    )
    rules = parser.add_argument_group("filtering; bounds are inclusive")
    for bound in BOUNDS:
        flag = "--" + bound.replace("_", "-")
        default = getattr(DATASETS["pe-video"].rules, bound)
        rules.add_argument(flag, type=float, help=f"default: {default:g}; none for funqa; not for segments")
    rules.add_argument(
        "--caption-prefix",
        default="",
        help='required start of a caption; the published script has "the video shows"',
    )
    rules.add_argument("--max-samples", type=int, help="maximum number of training rows (paper: 20000; default: all)")
    rules.add_argument("--seed", type=int, default=0, help="random seed of --max-samples (default: 0)")
    rules.add_argument(
        "--max-questions", type=int, help="funqa: maximum number of wordings of each test question (default: all)"
    )
    rules.add_argument(
        "--max-references", type=int, help="funqa: maximum number of reference answers per test question (default: all)"
    )
    parser.add_argument(
        "--workers", type=int, help="worker processes (default: one per core; four per core when reading from the hub)"
    )
    return parser.parse_args(words)


def options_from(arguments: argparse.Namespace) -> RunOptions:
    """Validate the command line and convert it to options. Raises InputError."""
    if arguments.dataset not in DATASETS:
        raise InputError(f"unknown --dataset {arguments.dataset!r}: choose one of {', '.join(DATASETS)}")
    data_set = DATASETS[arguments.dataset]
    of_others = (name for each in DATASETS.values() for name in each.flags if name not in data_set.flags)
    for name in (*of_others, *data_set.refused):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} does not apply to --dataset {arguments.dataset}: remove it")
    for name in ("dataset_name", "train_output_name", "test_output_name"):
        if getattr(arguments, name) == "":
            raise InputError(f"--{name.replace('_', '-')} is empty: give a name, or remove the flag")
    for name in ("workers", "max_samples", "max_questions", "max_references"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if arguments.source and (arguments.train_dir or arguments.test_dir):
        raise InputError("--source gives both splits: remove it, or remove --train-dir and --test-dir")
    for name in ("source", "train_dir", "test_dir"):
        if folder := getattr(arguments, name):
            setattr(arguments, name, look_up(folder, ROOT))
            if not look_up(folder, ROOT).is_dir():
                raise InputError(f"folder {folder} does not exist: check the path")
    hub_name = arguments.dataset_name or data_set.hub_name
    root = arguments.dataset_root or ROOT / "dataset"
    raw = root / Path(hub_name).name
    base = arguments.source or raw
    splits = [arguments.split] if arguments.split else list(SPLITS)
    output_dir = arguments.output_dir or root
    names = {
        split: getattr(arguments, f"{split}_output_name") or data_set.output_name.format(split) for split in SPLITS
    }
    if data_set.output_name:
        check_names(names, output_dir, raw / "videos")
    bounds = {
        name: getattr(data_set.rules, name) if (value := getattr(arguments, name)) is None else value for name in BOUNDS
    }
    common = {
        "outputs": {split: output_dir / names[split] for split in SPLITS},
        "root": ROOT,
        "videos": raw.absolute() / "videos",
        "output_dir": output_dir,
        "hub_name": "" if arguments.source or arguments.train_dir or arguments.test_dir else hub_name,
        "rules": Rules(**bounds, caption_prefix=arguments.caption_prefix),
        "tokenizer": arguments.tokenizer_model_id,
        "max_samples": arguments.max_samples,
        "seed": arguments.seed,
        "workers": arguments.workers,
        "prefix": data_set.prefix,
    }
    return data_set.options(arguments, base, splits, common)


def check_names(names: dict[str, str], output_dir: Path, videos: Path) -> None:
    """Raise InputError if the rows of a split would overwrite another file of the program."""

    def resolve(path: Path) -> Path:  # writing replaces a link at the path itself, but follows links in its folders
        return Path(os.path.realpath(path.parent), path.name)

    reports = [f"{each.prefix}{name}" for each in DATASETS.values() for name in REPORTS]
    taken = {resolve(output_dir / name): f"the program's {name}" for name in (*reports, STATE_FOLDER)}
    taken[resolve(videos)] = "the videos"
    for split, name in names.items():
        flag, path = f"--{split}-output-name", resolve(output_dir / name)
        if Path(name).name in ("", "..") or os.path.isdir(path):
            raise InputError(f"{flag} {name} is a folder: give the name of a file")
        for taken_path, what in taken.items():
            if path == taken_path or path in taken_path.parents or taken_path in path.parents:
                raise InputError(f"{flag} {name} conflicts with {what}: give it a different name")
        taken[path] = flag


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(format="%(levelname)s %(message)s")
    quiet_http()
    for name in ("preparation", "pe_video", "funqa"):
        logging.getLogger(name).setLevel(logging.INFO)
    options = options_from(arguments)
    prepared = DATASETS[arguments.dataset].prepare(options)
    for split, statistics in prepared.items():
        summary = statistics.summary()
        where = f" in {options.outputs[split]}" if statistics.rows else ""
        print(f"{split}: {summary['samples']} samples, {statistics.rows} rows{where}")
        if statistics.tasks:
            print(
                "  rows of each sub-task: " + ", ".join(f"{task} {count}" for task, count in statistics.tasks.items())
            )
        for rule, count in summary["dropped"].items():
            if count:
                print(f"  {count:8d} dropped: {rule}")
        print(f"  {summary['bad']:8d} bad (see {options.skipped})")
        for reason, count in summary["bad_reasons"].items():
            print(f"  {count:8d}   {reason}")
        if statistics.not_drawn:
            print(f"  {statistics.not_drawn:8d} not sampled because of --max-samples")
        if statistics.without_video:
            print(f"  {statistics.without_video} rows have no video file yet: put the videos at their video_path")
    print(f"distributions: {options.output_dir / f'{options.prefix}report.png'}")
    check_rows(prepared, options)


if __name__ == "__main__":
    run(main, "stopped by SIGINT: the same command resumes")
