"""Does the demo's model look at the video, and only at what has arrived?

    python code/demo/check.py --output demo_output --variant group

1. In the captions that eval.sh wrote for held-out videos, is the first shape's colour and shape named right, and does
   that fall to chance when the captions are shuffled among the videos?
2. Where the pixels of clip j are replaced by noise, does anything change that was written before slot j?
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
from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.timeline.timeline import make_schedule
from qwen_vl_streaming.timeline.variants import get_variant
from qwen_vl_streaming.video.frames import PixelBudget, read_video
from scenes import COLOURS, SHAPES

SHUFFLES = 1000


def named(row: dict, truth: dict[str, dict]) -> tuple[bool, bool]:
    """Whether the caption of `row` names the first shape's colour, and its shape, right."""
    event = truth[row["video_id"]]["events"][0]
    return first_named(row["result"], COLOURS) == event["colour"], first_named(row["result"], SHAPES) == event["shape"]


def first_named(text: str, words) -> str | None:
    return next((word for word in re.findall(r"\w+", text) if word in words), None)


def check_captions(rows: list[dict], truth: dict[str, dict], seed: int = 0) -> list[str]:
    """Lines that tell how often the first colour and shape are right, and how often with shuffled videos."""
    draw, lines = random.Random(seed), []
    for name, words in (("colour", COLOURS), ("shape", SHAPES)):
        said = [first_named(row["result"], words) for row in rows]
        seen = [truth[row["video_id"]]["events"][0][name] for row in rows]
        right = sum(a == b for a, b in zip(said, seen, strict=True)) / len(rows)
        shuffled = 0.0
        for _ in range(SHUFFLES):
            others = draw.sample(seen, len(seen))
            shuffled += sum(a == b for a, b in zip(said, others, strict=True)) / len(rows) / SHUFFLES
        lines.append(
            f"first {name:<6} named right in {100 * right:5.1f}% of {len(rows)} held-out videos; "
            f"{100 * shuffled:.1f}% with shuffled videos; by chance {100 / len(words):.1f}%"
        )
    return lines


def check_pixels(model, processor, variant, schedule: str, paths: list[Path], budget: PixelBudget, seed: int = 0):
    """For each video and each clip j, replace clip j by noise: (tokens written before slot j that changed, videos and
    clips tried, those in which something written later changed)."""
    template = make_template(processor, QUESTIONS[-1])
    generator = torch.Generator().manual_seed(seed)
    earlier = tried = later = 0
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
        schedules = [make_schedule(schedule, variant, len(pixels))] * len(versions)
        plain, *changed = caption(streams, clips, schedules)
        for j, other in enumerate(changed, 1):
            before = [[t for t, s in zip(c.tokens, c.slots, strict=True) if s < j] for c in (plain, other)]
            earlier += before[0] != before[1]
            later += plain.tokens != other.tokens
            tried += 1
    return earlier, tried, later


def find_videos(output: Path, video_ids: list[str]) -> list[Path]:
    """The test videos of the demo in `output`, which may have been moved since. Raises InputError for one that is
    gone."""
    data = (output / "dataset/test_3_5.jsonl").read_text(encoding="utf-8").splitlines()
    video_of = {row["video_id"]: row["video_path"] for row in map(json.loads, data)}
    return [find_video(video_of[video_id], PROJECT, output / "dataset/PE-Video/videos/test") for video_id in video_ids]


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="what demo.sh was given")
    parser.add_argument("--variant", default="group")
    parser.add_argument("--videos", type=int, default=10, help="videos whose pixels are changed")
    arguments = parser.parse_args()
    quiet_libraries()
    variant, output = get_variant(arguments.variant), look_up(arguments.output, PROJECT)
    captions = output / f"evaluation/{variant.name}_infer.json"
    if not captions.exists():
        raise InputError(f"{captions} is missing: run QWEN2_5_VL_VARIANT={variant.name} bash demo.sh first")
    rows = [json.loads(line) for line in captions.read_text(encoding="utf-8").splitlines()]
    lines = (output / "dataset/PE-Video/truth.jsonl").read_text(encoding="utf-8").splitlines()
    truth = {row["video_id"]: row for row in map(json.loads, lines)}
    print(f"{variant.name}, captions that eval.sh wrote:")
    for line in check_captions(rows, truth):
        print("  " + line)

    checkpoint = output / f"qwen2_5vl-pe-{variant.name}"
    model = load_model(checkpoint, "sdpa", torch.float32).eval()
    paths = find_videos(output, [row["video_id"] for row in rows[: arguments.videos]])
    processor, schedule = load_processor(checkpoint), f"wait-{model.config.wait_k}"
    earlier, tried, later = check_pixels(model, processor, variant, schedule, paths, PixelBudget.trained(model.config))
    print(f"{variant.name}, clip j of a video replaced by noise, every j of {len(paths)} videos, {tried} times in all:")
    print(f"  something written before slot j changed in {earlier}; something at all changed in {later}")


if __name__ == "__main__":
    run(main)
