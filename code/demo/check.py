"""Checks that the demo's model uses the video, and only the clips that have arrived.

    python code/demo/check.py --output demo_output --variant group

1. How often do the captions of eval.sh for held-out videos name the colour and kind of the first shape correctly, and
   does that drop to chance level when captions are shuffled among the videos?
2. If the pixels of clip j are replaced by noise, does any token change that was written before slot j?
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from qwen_vl_streaming.common.errors import InputError, OneLineParser, run
from qwen_vl_streaming.common.paths import PROJECT, find_video, look_up
from qwen_vl_streaming.common.progress import quiet_libraries
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from qwen_vl_streaming.model.trained import choose_schedule, end_of_slot
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.timeline.timeline import ModelSchedule, make_schedule, model_schedule_most
from qwen_vl_streaming.timeline.variants import get_variant
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from scenes import COLOURS, SHAPES

SHUFFLES = 1000


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_shape_correct(row: dict, truth: dict[str, dict]) -> tuple[bool, bool]:
    """Whether the caption of `row` names the colour and the kind of the first shape correctly."""
    event = truth[row["video_id"]]["events"][0]
    return first_named(row["result"], COLOURS) == event["colour"], first_named(row["result"], SHAPES) == event["shape"]


def first_named(text: str, words) -> str | None:
    """The first word of `text` that is in `words`."""
    return next((word for word in re.findall(r"\w+", text) if word in words), None)


def check_captions(rows: list[dict], truth: dict[str, dict]) -> list[str]:
    """Lines with the accuracy of the first colour and shape, also with captions shuffled among the videos."""
    draw, lines = random.Random(0), []
    for name, words in (("colour", COLOURS), ("shape", SHAPES)):
        predicted = [first_named(row["result"], words) for row in rows]
        expected = [truth[row["video_id"]]["events"][0][name] for row in rows]
        right = sum(a == b for a, b in zip(predicted, expected, strict=True)) / len(rows)
        shuffled = 0.0
        for _ in range(SHUFFLES):
            others = draw.sample(expected, len(expected))
            shuffled += sum(a == b for a, b in zip(predicted, others, strict=True)) / len(rows) / SHUFFLES
        lines.append(
            f"first {name:<6} correct in {100 * right:5.1f}% of {len(rows)} held-out videos; "
            f"{100 * shuffled:.1f}% with shuffled captions; chance {100 / len(words):.1f}%"
        )
    return lines


def check_pixels(model, processor, variant, schedule: str, paths: list[Path], budget: PixelBudget):
    """For each video and each clip j, caption the video with clip j replaced by noise.

    Returns (number of captions in which a token before slot j changed, number of captions, number of captions that
    changed at all).
    """
    template = make_template(processor, QUESTIONS[-1], end_of_slot(model.config))
    generator = torch.Generator().manual_seed(0)
    earlier = tried = changed = 0
    for path in paths:
        video = read_video(path, budget=budget)
        pixels, grid = clip_pixels(processor, video.frames)
        versions = [pixels]
        for j in range(len(pixels)):
            versions.append(pixels.clone())
            versions[-1][j] = torch.randn(pixels[j].shape, generator=generator)
        steps = model.config.vision_config.tokens_per_second * video.seconds_per_clip
        streams = Streams(model, variant, [template] * len(versions), [template.layout(grid, steps)] * len(versions))
        with torch.no_grad():
            clips = [model.perceive(version, grid) for version in versions]
        most = model_schedule_most(schedule)
        own = ModelSchedule(len(pixels), most) if most else make_schedule(schedule, variant, len(pixels))
        plain, *altered = caption(streams, clips, [own] * len(versions))
        for j, other in enumerate(altered, 1):
            before = [[t for t, s in zip(c.tokens, c.slots, strict=True) if s < j] for c in (plain, other)]
            earlier += before[0] != before[1]
            changed += plain.tokens != other.tokens
            tried += 1
    return earlier, tried, changed


def find_videos(output: Path, video_ids: list[str]) -> list[Path]:
    """The test videos with these ids in the demo's folder `output`, even if it was moved. Raises InputError for a
    missing one."""
    video_of = {row["video_id"]: row["video_path"] for row in read_lines(output / "dataset/test_3_5.jsonl")}
    return [find_video(video_of[video_id], PROJECT, output / "dataset/PE-Video/videos/test") for video_id in video_ids]


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="default: %(default)s")
    parser.add_argument("--variant", default="group", help="default: %(default)s")
    parser.add_argument("--videos", type=int, default=10, help="number of videos for check 2 (default: %(default)s)")
    arguments = parser.parse_args()
    quiet_libraries()
    variant, output = get_variant(arguments.variant), look_up(arguments.output, PROJECT)
    captions = output / f"evaluation/{variant.name}_infer.json"
    if not captions.exists():
        raise InputError(f"{captions} does not exist: run QWEN2_5_VL_VARIANT={variant.name} bash demo.sh first")
    rows = read_lines(captions)
    truth = {row["video_id"]: row for row in read_lines(output / "dataset/PE-Video/truth.jsonl")}
    print(f"{variant.name}, captions of eval.sh:")
    for line in check_captions(rows, truth):
        print("  " + line)

    checkpoint = output / f"qwen2_5vl-pe-{variant.name}"
    model = load_model(checkpoint, "sdpa", torch.float32).eval()
    paths = find_videos(output, [row["video_id"] for row in rows[: arguments.videos]])
    processor, schedule = load_processor(checkpoint), choose_schedule(None, model.config, str(checkpoint), variant)
    earlier, tried, changed = check_pixels(
        model, processor, variant, schedule, paths, PixelBudget.trained(model.config)
    )
    print(f"{variant.name}, clip j replaced by noise, for every j of {len(paths)} videos ({tried} captions):")
    print(f"  tokens before slot j changed in {earlier}; any tokens changed in {changed}")


if __name__ == "__main__":
    run(main)
