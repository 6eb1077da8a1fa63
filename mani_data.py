"""PE-Video -> dataset/train_3_5.jsonl and dataset/test_3_5.jsonl, the rows that training and evaluation use.

Reads folders of JSON and videos or tar shards under dataset/PE-Video, else streams the hub's shards, and keeps the
samples whose captions have a speaking rate that a stream can follow. A killed run goes on where it was.
"""

import argparse
import logging
from pathlib import Path

from pe_video.rules import Rules
from pe_video.run import Options, prepare_dataset
from qwen_vl_streaming.errors import InputError, OneLineParser, run

ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "test")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("where things are")
    where.add_argument("--source", type=Path, metavar="DIR", help="folder whose train and test hold JSON or tar shards")
    where.add_argument("--dataset-root", type=Path, default=ROOT / "dataset", help="holds PE-Video (default: dataset)")
    where.add_argument("--dataset-name", default="facebook/PE-Video", help="dataset on the hub (default: %(default)s)")
    where.add_argument("--train-dir", type=Path, help="the train split (default: PE-Video/train in --dataset-root)")
    where.add_argument("--test-dir", type=Path, help="the test split (default: PE-Video/test in --dataset-root)")
    where.add_argument("--output-dir", type=Path, help="rows and report go here (default: --dataset-root)")
    where.add_argument("--train-output-name", default="train_3_5.jsonl", help="default: %(default)s")
    where.add_argument("--test-output-name", default="test_3_5.jsonl", help="default: %(default)s")
    where.add_argument(
        "--tokenizer-model-id", default="Qwen/Qwen2.5-VL-7B-Instruct", help="hub id or folder (default: %(default)s)"
    )
    rules = parser.add_argument_group("what is kept; each bound is itself allowed")
    defaults = Rules()
    for bound in ("min_seconds", "max_seconds", "min_tokens_per_second", "max_tokens_per_second"):
        flag = "--" + bound.replace("_", "-")
        rules.add_argument(flag, type=float, default=getattr(defaults, bound), help="default: %(default)s")
    rules.add_argument(
        "--caption-prefix", default="", help='how a caption must begin; the published script had "the video shows"'
    )
    rules.add_argument("--max-samples", type=int, help="at most so many training rows (paper: 20000; default: all)")
    rules.add_argument("--seed", type=int, default=0, help="for --max-samples: which rows are drawn (default: 0)")
    parser.add_argument(
        "--workers", type=int, help="default: the cores; for the hub, which has to be waited for, four times"
    )
    return parser.parse_args()


def options_from(arguments: argparse.Namespace) -> Options:
    """The options that the command line asks for. Raises InputError where they cannot be."""
    if arguments.workers is not None and arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers} must be at least 1")
    if arguments.max_samples is not None and arguments.max_samples < 1:
        raise InputError(f"--max-samples {arguments.max_samples} must be at least 1")
    if arguments.source and (arguments.train_dir or arguments.test_dir):
        raise InputError("--source names both splits: leave out --train-dir and --test-dir")
    raw = arguments.dataset_root / Path(arguments.dataset_name).name
    base = arguments.source or raw
    splits = dict(
        zip(SPLITS, (arguments.train_dir or base / "train", arguments.test_dir or base / "test"), strict=True)
    )
    for folder in filter(None, (arguments.source, arguments.train_dir, arguments.test_dir)):
        if not folder.is_dir():
            raise InputError(f"folder {folder} does not exist: check the path")
    output_dir = arguments.output_dir or arguments.dataset_root
    return Options(
        splits={split: folder.absolute() for split, folder in splits.items()},
        outputs={"train": output_dir / arguments.train_output_name, "test": output_dir / arguments.test_output_name},
        root=ROOT,
        videos=raw.absolute() / "videos",
        output_dir=output_dir,
        hub_name="" if arguments.source or arguments.train_dir or arguments.test_dir else arguments.dataset_name,
        rules=Rules(
            min_seconds=arguments.min_seconds,
            max_seconds=arguments.max_seconds,
            min_tokens_per_second=arguments.min_tokens_per_second,
            max_tokens_per_second=arguments.max_tokens_per_second,
            caption_prefix=arguments.caption_prefix,
        ),
        tokenizer=arguments.tokenizer_model_id,
        max_samples=arguments.max_samples,
        seed=arguments.seed,
        workers=arguments.workers,
    )


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("pe_video").setLevel(logging.INFO)
    options = options_from(arguments)
    for split, tally in prepare_dataset(options).items():
        numbers = tally.numbers()
        print(f"{split}: {numbers['samples']} samples, {tally.rows} rows in {options.outputs[split]}")
        for rule, count in numbers["dropped"].items():
            print(f"  {count:8d} dropped: {rule}")
        print(f"  {numbers['bad']:8d} bad (see {options.output_dir / 'skipped.jsonl'})")
        for reason, count in numbers["bad_reasons"].items():
            print(f"  {count:8d}   {reason}")
        if tally.not_drawn:
            print(f"  {tally.not_drawn:8d} left out by --max-samples")
        if tally.without_video:
            print(f"  {tally.without_video} rows have no video yet: put each where its video_path says")
    print(f"distributions: {options.output_dir / 'report.png'}")


if __name__ == "__main__":
    run(main)
