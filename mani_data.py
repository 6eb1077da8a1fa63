"""A data set to the rows that training and evaluation use: --dataset pe-video (default) or funqa.

pe-video: dataset/train_3_5.jsonl and test_3_5.jsonl. Reads folders of JSON and videos or tar shards under
dataset/PE-Video, else streams the hub's shards, and keeps the samples whose captions have a speaking rate that a stream
can follow.

funqa: dataset/funqa_train.jsonl and funqa_test.jsonl, the description and reasoning questions (sub-tasks H2 H3 C2 C3 M2
M3). Reads FunQA_train.json and FunQA_test.json with their videos, or train.zip and test.zip, under dataset/FunQA, else
streams the hub's. All lengths are kept unless a bound is given.

A killed run goes on where it was.
"""

import argparse
import logging
import math
import os
from pathlib import Path

import funqa.run
import pe_video.run
from funqa.run import prepare_funqa
from pe_video.run import STATE_FOLDER, prepare_dataset
from preparation.rules import Rules
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.paths import look_up
from qwen_vl_streaming.common.progress import quiet_http

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "test")
DATASETS = ("pe-video", "funqa")
HUB_NAMES = {"pe-video": "facebook/PE-Video", "funqa": "fesvhtr/FunQA"}
OUTPUT_NAMES = {"pe-video": "{}_3_5.jsonl", "funqa": "funqa_{}.jsonl"}
RULES = {"pe-video": Rules(), "funqa": Rules(0.0, math.inf, 0.0, math.inf)}
PE_VIDEO_ONLY = ("train_dir", "test_dir")
FUNQA_ONLY = ("max_questions", "max_references")
REPORTS = ("skipped.jsonl", "report.png", "report.json", "funqa_skipped.jsonl", "funqa_report.png", "funqa_report.json")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pe-video", metavar="NAME", help="pe-video or funqa (default: pe-video)")
    parser.add_argument("--split", choices=SPLITS, help="only this one (default: both)")
    where = parser.add_argument_group("where things are")
    where.add_argument("--source", type=Path, metavar="DIR", help="the folder that the data set lies in, see above")
    where.add_argument("--dataset-root", type=Path, default=ROOT / "dataset", help="holds PE-Video (default: dataset)")
    where.add_argument("--dataset-name", help=f"dataset on the hub (default: {' or '.join(HUB_NAMES.values())})")
    where.add_argument("--train-dir", type=Path, help="pe-video's train (default: PE-Video/train in --dataset-root)")
    where.add_argument("--test-dir", type=Path, help="pe-video's test (default: PE-Video/test in --dataset-root)")
    where.add_argument("--output-dir", type=Path, help="rows and report go here (default: --dataset-root)")
    where.add_argument("--train-output-name", help="default: train_3_5.jsonl or funqa_train.jsonl")
    where.add_argument("--test-output-name", help="default: test_3_5.jsonl or funqa_test.jsonl")
    where.add_argument(
        "--tokenizer-model-id", default="Qwen/Qwen2.5-VL-7B-Instruct", help="hub id or folder (default: %(default)s)"
    )
    rules = parser.add_argument_group("what is kept; each bound is itself allowed")
    for bound in ("min_seconds", "max_seconds", "min_tokens_per_second", "max_tokens_per_second"):
        flag = "--" + bound.replace("_", "-")
        default = getattr(RULES["pe-video"], bound)
        rules.add_argument(flag, type=float, help=f"default: {default:g}; none for funqa")
    rules.add_argument(
        "--caption-prefix", default="", help='how a caption must begin; the published script had "the video shows"'
    )
    rules.add_argument("--max-samples", type=int, help="at most so many training rows (paper: 20000; default: all)")
    rules.add_argument("--seed", type=int, default=0, help="for --max-samples: which rows are drawn (default: 0)")
    rules.add_argument(
        "--max-questions", type=int, help="funqa: at most so many wordings of each test question (default: all)"
    )
    rules.add_argument(
        "--max-references", type=int, help="funqa: at most so many reference answers to each of them (default: all)"
    )
    parser.add_argument(
        "--workers", type=int, help="default: the cores; for the hub, which has to be waited for, four times"
    )
    return parser.parse_args()


def options_from(arguments: argparse.Namespace) -> pe_video.run.Options | funqa.run.Options:
    """The options that the command line asks for. Raises InputError where they cannot be."""
    dataset = arguments.dataset
    if dataset not in DATASETS:
        raise InputError(f"unknown --dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    for name in FUNQA_ONLY if dataset == "pe-video" else PE_VIDEO_ONLY:
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is no flag of --dataset {dataset}: leave it out")
    for name in ("dataset_name", "train_output_name", "test_output_name"):
        if getattr(arguments, name) == "":
            raise InputError(f"--{name.replace('_', '-')} is empty: name one, or leave it out")
    for name in ("workers", "max_samples", *FUNQA_ONLY):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if arguments.source and (arguments.train_dir or arguments.test_dir):
        raise InputError("--source names both splits: leave out --train-dir and --test-dir")
    for name in ("source", "train_dir", "test_dir"):
        if folder := getattr(arguments, name):
            setattr(arguments, name, look_up(folder, ROOT))
            if not look_up(folder, ROOT).is_dir():
                raise InputError(f"folder {folder} does not exist: check the path")
    hub_name = arguments.dataset_name or HUB_NAMES[dataset]
    raw = arguments.dataset_root / Path(hub_name).name
    base = arguments.source or raw
    splits = [arguments.split] if arguments.split else list(SPLITS)
    output_dir = arguments.output_dir or arguments.dataset_root
    names = {
        split: getattr(arguments, f"{split}_output_name") or OUTPUT_NAMES[dataset].format(split) for split in SPLITS
    }
    check_names(names, output_dir, raw / "videos")
    bounds = {
        name: getattr(RULES[dataset], name) if (value := getattr(arguments, name)) is None else value
        for name in ("min_seconds", "max_seconds", "min_tokens_per_second", "max_tokens_per_second")
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
    }
    if dataset == "funqa":
        return funqa.run.Options(
            splits=splits,
            source=base.absolute(),
            max_questions=arguments.max_questions,
            max_references=arguments.max_references,
            **common,
        )
    folders = {"train": arguments.train_dir or base / "train", "test": arguments.test_dir or base / "test"}
    return pe_video.run.Options(splits={split: folders[split].absolute() for split in splits}, **common)


def check_names(names: dict[str, str], output_dir: Path, videos: Path) -> None:
    """Raises InputError where the rows of a split would take the place of something else that is written."""

    def place(path: Path) -> Path:  # a link in a file's own place is replaced, those on the way are followed
        return Path(os.path.realpath(path.parent), path.name)

    taken = {place(output_dir / name): f"the program's own {name}" for name in (*REPORTS, STATE_FOLDER)}
    taken[place(videos)] = "the videos"
    for split, name in names.items():
        flag, here = f"--{split}-output-name", place(output_dir / name)
        if Path(name).name in ("", "..") or os.path.isdir(here):
            raise InputError(f"{flag} {name} is a folder: name a file")
        for other, what in taken.items():
            if here == other or here in other.parents or other in here.parents:
                raise InputError(f"{flag} {name} is in the way of {what}: give it another name")
        taken[here] = flag


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(format="%(levelname)s %(message)s")
    quiet_http()
    for name in ("pe_video", "funqa"):
        logging.getLogger(name).setLevel(logging.INFO)
    options = options_from(arguments)
    prefix = "" if arguments.dataset == "pe-video" else "funqa_"
    for split, tally in (prepare_funqa if prefix else prepare_dataset)(options).items():
        numbers = tally.numbers()
        print(f"{split}: {numbers['samples']} samples, {tally.rows} rows in {options.outputs[split]}")
        if tally.tasks:
            print("  rows of each sub-task: " + ", ".join(f"{task} {count}" for task, count in tally.tasks.items()))
        for rule, count in numbers["dropped"].items():
            print(f"  {count:8d} dropped: {rule}")
        print(f"  {numbers['bad']:8d} bad (see {options.output_dir / f'{prefix}skipped.jsonl'})")
        for reason, count in numbers["bad_reasons"].items():
            print(f"  {count:8d}   {reason}")
        if tally.not_drawn:
            print(f"  {tally.not_drawn:8d} left out by --max-samples")
        if tally.without_video:
            print(f"  {tally.without_video} rows have no video yet: put each where its video_path says")
    print(f"distributions: {options.output_dir / f'{prefix}report.png'}")


if __name__ == "__main__":
    run(main)
