"""Ends the demo: the metrics of each variant, a few captions with the second at which each word was written, and where
everything lies."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from check import find_videos, named
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.model.prompts import load_processor


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told_by_second(row: dict, tokenizer) -> str:
    """The caption as `1s "The video shows"  2s " a red circle" …`: slot i opens when second i is over."""
    pieces: dict[int, list[int]] = {}
    for token, slot in zip(row["tokens"], row["slots"], strict=True):
        pieces.setdefault(slot, []).append(token)
    return "  ".join(
        f"{slot}s {tokenizer.decode(tokens, skip_special_tokens=True).strip()!r}" for slot, tokens in pieces.items()
    )


def made(output: Path, variants: list[str]) -> Iterator[tuple[str, Path]]:
    """What there is in `output`, each with its path. A run of few steps logs no loss, and so draws none."""
    entries = [
        ("videos and captions", output / "dataset"),
        ("what was kept of them", output / "dataset/report.png"),
        ("untrained model", output / "model"),
    ]
    for variant in variants:
        trained, evaluation = output / f"qwen2_5vl-pe-{variant}", output / "evaluation"
        entries += [
            (f"{variant:<11} checkpoint", trained),
            (f"{'':<11} loss curve", trained / "loss.png"),
            (f"{'':<11} captions", evaluation / f"{variant}_infer.json"),
            (f"{'':<11} scores", evaluation / f"{variant}_scores.json"),
        ]
    return ((what, path) for what, path in entries if path.exists())


def command(*arguments: str | Path) -> str:
    """What a shell takes, from wherever it stands, to run this Python with `arguments`."""
    return shlex.join(map(str, (sys.executable, *arguments)))


def show(output: Path, variants: list[str], examples: int = 3) -> None:
    evaluation = output / "evaluation"
    truth = {row["video_id"]: row for row in read_lines(output / "dataset/PE-Video/truth.jsonl")}
    scores = {variant: json.loads((evaluation / f"{variant}_scores.json").read_text()) for variant in variants}
    names = ["CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L"]
    print(f"{'':<12}" + "".join(f"{name:>9}" for name in (*names, "colour", "shape", "videos")))
    rows = {variant: read_lines(evaluation / f"{variant}_infer.json") for variant in variants}
    for variant, values in scores.items():
        cells = [f"{values[name]:>9.2f}" if name in values else f"{'-':>9}" for name in names]
        share = [sum(hits) / len(hits) for hits in zip(*(named(row, truth) for row in rows[variant]), strict=True)]
        cells += [f"{100 * value:>8.0f}%" for value in share]
        print(f"{variant:<12}" + "".join(cells) + f"{values['count']:>9}")
    print(
        "(colour, shape: the first shape named right; by chance 1 in 7 and 1 in 5. Metrics as in the paper, times 100.)"
    )

    tokenizer = load_processor(output / "model").tokenizer
    for variant in variants:
        print(f"\n{variant}, what was said and after which second:")
        for row in rows[variant][:examples]:
            print(f"  video {row['video_id']}, {row['clips']} clips of a second")
            print(f"    reference  {row['annotation']}")
            print(f"    written    {told_by_second(row, tokenizer)}")

    print("\nwhat was made:")
    for what, path in made(output, variants):
        print(f"  {what:<22} {path}")
    print("\nnext: does it look at the video? Ask it:")
    check = [Path(__file__).resolve().with_name("check.py"), "--output", output, "--variant", variants[0]]
    print(f"  {command(*check)}")
    (film,) = find_videos(output, [rows[variants[0]][0]["video_id"]])
    print("and hear it speak while a video happens, or a webcam:")
    trained, source = output / f"qwen2_5vl-pe-{variants[0]}", os.path.abspath(film)
    live = ["-m", "qwen_vl_streaming.live", "--model", trained, "--source", source]
    print(f"  {command(*live)}")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="what demo.sh was given")
    parser.add_argument("variants", nargs="+")
    arguments = parser.parse_args()
    show(arguments.output, arguments.variants)


if __name__ == "__main__":
    run(main)
