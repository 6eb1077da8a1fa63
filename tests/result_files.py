"""Generates result files for three real videos, and runs the report on them."""

import json
import random
from pathlib import Path
from unittest.mock import patch

from qwen_vl_streaming.common.errors import run
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import read_video
from report import cli
from transformers import AutoTokenizer

METRICS = ("CIDEr", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L")


class World:
    """A folder of generated result files for three real videos."""

    def __init__(self, folder: Path, checkpoint: Path, data: Path):
        self.folder, self.checkpoint, self.data = folder, checkpoint, data
        self.page = folder.parent / "out/report.html"
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.videos = [json.loads(line) for line in data.read_text().splitlines()][:3]
        self.clips = {row["video_id"]: read_video(row["video_path"]).clips for row in self.videos}
        folder.mkdir()

    def tokens(self, caption: str) -> list[int]:
        ids = self.tokenizer(caption, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def slots(self, variant: str, schedule: str, clips: int, tokens: int) -> list[int]:
        k = int(schedule.split("-")[1])
        draw = random.Random(schedule + variant)
        counts = [k if schedule.startswith("wait") else draw.randint(1, 2 * k - 1) for _ in range(clips - 1)]
        counts = counts if VARIANTS[variant].streams else [0] * (clips - 1)
        slots = [slot for slot, count in enumerate(counts, 1) for _ in range(count)][:tokens]
        return slots + [clips] * (tokens - len(slots))

    def add(self, variant="group", schedule="wait-3", name=None, captions=(), scores=True, task="description", **args):
        """Write a result file with its arguments and, if `scores`, its scores. Returns the random metric values."""
        stem = name or f"{variant}_{schedule}"
        draw = random.Random(stem)
        rows = []
        for number, video in enumerate(self.videos):
            caption = captions[number] if number < len(captions) else video["human_caption"]
            tokens, clips = self.tokens(caption), self.clips[video["video_id"]]
            slots = self.slots(variant, schedule, clips, len(tokens))
            row = {"video_id": video["video_id"], "annotation": video["human_caption"], "result": caption.strip()}
            row |= {"task": task, "variant": variant, "schedule": [slots.count(i + 1) for i in range(clips)]}
            rows.append(row | {"tokens": tokens, "slots": slots, "clips": clips, "seconds": 0.5})
        (self.folder / f"{stem}_infer.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = {"model": str(self.checkpoint), "data": str(self.data), "video_root": "", **args}
        args |= {"variant": variant, "schedule": schedule}
        (self.folder / f"{stem}_infer.args.json").write_text(json.dumps(args))
        values = {metric: round(draw.uniform(1, 90), 4) for metric in METRICS}
        if scores:
            more = {} if scores is True else scores
            (self.folder / f"{stem}_scores.json").write_text(json.dumps({**values, "count": 3, "skipped": 0, **more}))
        return values

    def report(self, *arguments: str) -> tuple[str, str]:
        """Run the report; returns its HTML page and its Markdown."""
        with patch("sys.argv", ["report.py", *arguments, "--output", str(self.page.with_suffix(""))]):
            run(cli.main)
        return tuple(path.read_text(encoding="utf-8") for path in (self.page, self.page.with_suffix(".md")))

    @property
    def files(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*_infer.json")))
