"""Let a checkpoint watch videos and speak, in batches, and score what it said. Launched by eval.sh."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from qwen_vl_streaming.errors import InputError, OneLineParser, find_path, run
from qwen_vl_streaming.modeling_qwen2_5_vl import load_config, load_model
from qwen_vl_streaming.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from qwen_vl_streaming.streaming import Streams, caption
from qwen_vl_streaming.timeline import make_schedule
from qwen_vl_streaming.variants import Variant, get_variant
from qwen_vl_streaming.video import PixelBudget, choose_reader, read_video
from results import CAPTION_FIELDS, Appender, finish, load_finished, write_whole
from scoring import check_java, score, write_scores
from settings import ROOT, Settings, parse
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Watched:
    """A video ready for the vision tower, or the reason why there is none."""

    row: dict
    pixels: torch.Tensor | None = None  # (N, patches, pixels of a patch)
    grid: tuple[int, int] = (0, 0)
    seconds_per_clip: float = 0.0
    reason: str = ""


class Videos(Dataset):
    """Decodes videos in worker processes, ahead of the model."""

    def __init__(self, rows: list[dict], root: Path, processor, budget: PixelBudget, reader: str | None):
        self.rows, self.root, self.processor, self.budget, self.reader = rows, root, processor, budget, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Watched:
        row = self.rows[index]
        try:
            video = read_video(self.root / row["video_path"], budget=self.budget, reader=self.reader)
        except InputError as error:
            return Watched(row, reason=str(error))
        return Watched(row, *clip_pixels(self.processor, video.frames), video.seconds_per_clip)


def read_data(path: Path, limit: int | None) -> list[dict]:
    """Rows to evaluate. Raises InputError, naming the line, for a bad one, a wordless caption or a repeated id."""
    rows: list[dict] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            row = {key: str(row[key]) for key in ("video_id", "video_path", "human_caption")}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: {error!r}: make the file again with mani_data.py") from error
        if row["video_id"] in seen or not any(map(str.isalnum, row["human_caption"])):
            fault = "comes twice" if row["video_id"] in seen else "has a caption without a word"
            raise InputError(f"{path}, line {number}: video {row['video_id']} {fault}: mend or delete this line")
        seen.add(row["video_id"])
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty: make it with `python mani_data.py`")
    return rows[:limit]


def choose_schedule(config, variant: Variant, settings: Settings) -> str:
    """The schedule to evaluate with. Refuses a checkpoint that was trained under another variant, unless forced."""
    trained = getattr(config, "streaming_variant", None)
    if trained not in (None, variant.name) and not settings.force:
        raise InputError(
            f"{settings.model} was trained as {trained}, not {variant.name}: "
            f"set QWEN2_5_VL_VARIANT={trained}, or give --force to evaluate it all the same"
        )
    schedule = settings.schedule or f"wait-{getattr(config, 'wait_k', 3)}"
    make_schedule(schedule, variant, clips=1)  # an unknown one is refused here, before the model loads
    return schedule


def watch_and_speak(model, processor, variant: Variant, schedule: str, settings: Settings, batch: list[Watched]):
    """Captions of one batch: (Caption, text) for each video."""
    template = make_template(processor, QUESTIONS[-1])
    steps = model.config.vision_config.tokens_per_second
    with torch.no_grad():
        clips = [model.perceive(video.pixels.to(model.device), video.grid) for video in batch]
    streams = Streams(
        model,
        variant,
        [template] * len(batch),
        [template.layout(video.grid, steps * video.seconds_per_clip) for video in batch],
        settings.repetition_penalty,
    )
    schedules = [
        make_schedule(schedule, variant, len(video.pixels), f"{settings.seed} {video.row['video_id']}")
        for video in batch
    ]
    for written in caption(streams, clips, schedules, settings.max_new_tokens):
        yield written, processor.tokenizer.decode(written.tokens, skip_special_tokens=True).strip()


def evaluate(rows: list[dict], settings: Settings, variant: Variant, out: Path) -> list[dict]:
    """Caption every video of `rows` that has no row in `out` yet; returns those that had to be left out."""
    processor = load_processor(settings.model)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device == "cuda" else "float32"))
    schedule = choose_schedule(load_config(settings.model), variant, settings)
    keep_arguments(out, settings, variant, schedule)
    model = load_model(settings.model, "sdpa", dtype).to(device).eval()

    finished = load_finished(out)
    if strangers := finished.keys() - {row["video_id"] for row in rows}:
        raise InputError(f"{out} has a row for {min(strangers)}, which the data lacks: give another --output-dir")
    left = [row for row in rows if row["video_id"] not in finished]
    if finished:
        logger.info("%d of %d videos were captioned before: going on", len(rows) - len(left), len(rows))
    root = find_path(settings.video_root, ROOT, "the video root") if settings.video_root else ROOT
    videos = Videos(left, root, processor, settings.budget, choose_reader(os.environ))
    loader = DataLoader(videos, settings.batch_size, collate_fn=list, num_workers=settings.workers)
    skipped = []
    with Appender(out) as appender, tqdm(total=len(left), unit="video", desc=f"watching, {variant.name}") as bar:
        for batch in loader:
            for video in batch:
                if video.reason:
                    logger.warning("left out %s: %s", video.row["video_id"], video.reason)
                    skipped.append({"video_id": video.row["video_id"], "reason": video.reason})
            ready = [video for video in batch if not video.reason]
            for row in caption_rows(model, processor, variant, schedule, settings, ready):
                appender.append(row)
            bar.update(len(batch))
    return skipped


def caption_rows(model, processor, variant, schedule, settings, ready: list[Watched]) -> Iterator[dict]:
    if not ready:
        return
    began = time.perf_counter()
    spoken = list(watch_and_speak(model, processor, variant, schedule, settings, ready))
    seconds = (time.perf_counter() - began) / len(ready)
    for video, (written, text) in zip(ready, spoken, strict=True):
        yield {
            "video_id": video.row["video_id"],
            "annotation": video.row["human_caption"],
            "task": "description",
            "result": text,
            "variant": variant.name,
            "schedule": written.schedule,
            "tokens": written.tokens,
            "slots": written.slots,
            "clips": len(video.pixels),
            "seconds": round(seconds, 4),
        }


def keep_arguments(out: Path, settings: Settings, variant: Variant, schedule: str) -> None:
    """Write down what makes a result file what it is. Raises InputError where `out` was begun with something else."""
    path = out.with_suffix(".args.json")
    mine = {**settings.identity(), "variant": variant.name, "schedule": schedule}
    if out.exists() and path.exists():
        before = json.loads(path.read_text())
        for key, value in mine.items():
            if before.get(key) != value:
                raise InputError(
                    f"{out} was begun with {key} {before.get(key)!r}, not {value!r}: "
                    "give another --output-dir, or delete it to start anew"
                )
    write_whole(path, json.dumps(mine, indent=2).encode() + b"\n")


def print_scores(scores: dict, where: Path) -> None:
    print(f"\n{'metric':<10}{'value':>8}")
    for name, value in scores.items():
        if isinstance(value, float):
            print(f"{name:<10}{value:>8.2f}")
    for name, reason in scores.get("not_computed", {}).items():
        print(f"{name:<10}{'-':>8}  {reason}")
    print(f"{scores['count']} videos scored, {scores['skipped']} left out\nscores: {where}")


def score_rows(rows: list[dict], where: Path, skipped: int) -> None:
    scores = score(
        {row["video_id"]: row["annotation"] for row in rows}, {row["video_id"]: row["result"] for row in rows}
    )
    write_scores(where, scores, count=len(rows), skipped=skipped)
    print_scores(json.loads(where.read_text()), where)


def main() -> None:
    settings = parse(OneLineParser(prog="eval.sh", description=__doc__))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_java()
    if settings.score_only:
        path = find_path(settings.score_only, ROOT, "the result file")
        score_rows(list(load_finished(path, CAPTION_FIELDS).values()), path.with_suffix(".scores.json"), skipped=0)
        return
    variant = get_variant(settings.variant)
    rows = read_data(find_path(settings.data, ROOT, "the evaluation data"), settings.limit)
    out = settings.output_dir / (settings.output_file or f"{variant.name}_infer.json")
    skipped = evaluate(rows, settings, variant, out)
    finished = finish(out, [row["video_id"] for row in rows])
    lines = "".join(json.dumps(row) + "\n" for row in skipped)
    write_whole(out.with_name(f"{variant.name}_skipped.jsonl"), lines.encode())
    print(f"captions: {out}")
    score_rows(finished, out.with_name(f"{variant.name}_scores.json"), len(skipped))


if __name__ == "__main__":
    run(main)
