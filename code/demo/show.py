"""Prints the results of the demo: the metrics of each variant, some captions with the second at which each part was
written, and the paths of all output."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from check import find_videos, first_shape_correct, read_lines
from qwen_vl_streaming.common.errors import OneLineParser, run
from qwen_vl_streaming.model.prompts import load_processor


def caption_by_second(row: dict, tokenizer) -> str:
    """The caption as `1s 'The video shows'  2s 'a red circle' …`; slot i starts at the end of second i."""
    pieces: dict[int, list[int]] = {}
    for token, slot in zip(row["tokens"], row["slots"], strict=True):
        if token != row.get("end_of_slot"):
            pieces.setdefault(slot, []).append(token)
    return "  ".join(
        f"{slot}s {tokenizer.decode(tokens, skip_special_tokens=True).strip()!r}" for slot, tokens in pieces.items()
    )


def existing_outputs(output: Path, variants: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield description and path of each existing output. A run of few steps has no loss curve."""
    entries = [
        ("videos and captions", output / "dataset"),
        ("their statistics", output / "dataset/report.png"),
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
    """A shell command that runs this Python with `arguments` from any folder."""
    return shlex.join(map(str, (sys.executable, *arguments)))


def show(output: Path, variants: list[str], examples: int = 3) -> None:
    """Print the results of `variants` in the demo's folder `output`, with `examples` captions each."""
    evaluation = output / "evaluation"
    truth = {row["video_id"]: row for row in read_lines(output / "dataset/PE-Video/truth.jsonl")}
    scores = {variant: json.loads((evaluation / f"{variant}_scores.json").read_text()) for variant in variants}
    names = ["CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L"]
    print(f"{'':<12}" + "".join(f"{name:>9}" for name in (*names, "colour", "shape", "videos")))
    rows = {variant: read_lines(evaluation / f"{variant}_infer.json") for variant in variants}
    for variant, values in scores.items():
        cells = [f"{values[name]:>9.2f}" if name in values else f"{'-':>9}" for name in names]
        share = [
            sum(hits) / len(hits)
            for hits in zip(*(first_shape_correct(row, truth) for row in rows[variant]), strict=True)
        ]
        cells += [f"{100 * value:>8.0f}%" for value in share]
        print(f"{variant:<12}" + "".join(cells) + f"{values['count']:>9}")
    print("(colour, shape: accuracy for the first shape; chance: 1 in 7, 1 in 5. Metrics as in the paper, times 100.)")

    tokenizer = load_processor(output / "model").tokenizer
    for variant in variants:
        print(f"\n{variant}: captions, with the second after which each part was written:")
        for row in rows[variant][:examples]:
            print(f"  video {row['video_id']}, {row['clips']} clips of one second")
            print(f"    reference  {row['annotation']}")
            print(f"    written    {caption_by_second(row, tokenizer)}")

    print("\noutput:")
    for what, path in existing_outputs(output, variants):
        print(f"  {what:<22} {path}")
    print("\nnext: check that the model uses the video:")
    check = [Path(__file__).resolve().with_name("check.py"), "--output", output, "--variant", variants[0]]
    print(f"  {command(*check)}")
    (video,) = find_videos(output, [rows[variants[0]][0]["video_id"]])
    print("caption a video (or a webcam) while it plays:")
    trained, source = output / f"qwen2_5vl-pe-{variants[0]}", os.path.abspath(video)
    live = ["-m", "qwen_vl_streaming.live", "--model", trained, "--source", source]
    print(f"  {command(*live)}")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="default: %(default)s")
    parser.add_argument("variants", nargs="+", help="variants to show")
    arguments = parser.parse_args()
    show(arguments.output, arguments.variants)


if __name__ == "__main__":
    run(main)
