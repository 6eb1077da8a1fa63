"""What a run does: the rows of the data, the checkpoint and the settings that they are captioned with, checked before a
model loads; and the facts that decide the captions, which are written beside them."""

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from captioning import Plan
from qwen_vl_streaming.common.data_rows import hash_data, read_data_rows, row_place
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import check_videos, find_data, find_model, find_video, find_video_root, make_data
from qwen_vl_streaming.common.versions import versions
from qwen_vl_streaming.common.video_part import video_part
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.loading import load_config
from qwen_vl_streaming.model.quantization import check_precision
from qwen_vl_streaming.model.trained import check_trained, choose_schedule, end_of_slot, wait_k
from qwen_vl_streaming.timeline.positions import RULE
from qwen_vl_streaming.timeline.variants import get_variant
from qwen_vl_streaming.video.frames import choose_reader
from qwen_vl_streaming.video.pixel_budget import SIDE_FACTOR, PixelBudget
from ranks import Rank
from schedules import choose_schedules
from settings import ROOT, Settings
from tasks import Task, get_task, read_row, video_seconds


def read_data(path: str | Path, limit: int | None, task: Task) -> list[dict]:
    """The first `limit` rows of the data, which must be of `task`. Raises InputError, naming the line, for an invalid
    row, a row of another task, a caption without a word or a repeated id."""
    rows: list[dict] = []
    for number, data in read_data_rows(path):
        try:
            row = {**read_row(data, task), "duration": read_duration(data)}
            rows.append({**row, "place": row_place(path, number)} if "segments" in row else row)
        except InputError as error:
            raise InputError(f"{row_place(path, number)}: {error}") from error
    if not rows:
        raise InputError(f"{path} has no rows: {make_data(path) or 'give a file with rows'}")
    return rows[:limit]


def read_duration(data: dict) -> float:
    """The duration in a row in seconds, or that of the part of the video which it names; 0 where it has none. Raises
    InputError where it is not a duration."""
    part, seconds = video_part(data), video_seconds(data)
    return max(0.0, part.get("end", seconds) - part.get("start", 0.0))


def check_any_video(plan: Plan) -> None:
    """Raises InputError, with the reason of the first, where no video of the data is found."""
    reason = ""
    for row in plan.rows:
        try:
            find_video(row["video_path"], ROOT, plan.video_root)
            return
        except InputError as error:
            reason = reason or str(error)
    raise InputError(f"none of the {len(plan.rows)} videos of {plan.data} is found: {reason}")


def find_checkpoint(settings: Settings) -> str:
    """The checkpoint's folder or hub id. Raises InputError where it is missing; for the default checkpoint, the message
    says how to train it."""
    if Path(settings.model) == settings.trained and not settings.trained.exists():
        task = get_task(settings.task)
        train = f"QWEN2_5_VL_VARIANT={settings.variant} bash scripts/sft.sh"
        if task.subtasks:
            flag = f"--output_dir output/{settings.trained.name}"
            train = f"QWEN2_5_VL_TRAIN_DATA=dataset/{task.trained}_train.jsonl {train} {flag}"
        raise InputError(
            f"{settings.trained}, the default checkpoint of --task {task.name}, does not exist: train it with "
            f"`{train}` in code/qwen-vl-finetune, or give another with QWEN2_5_VL_EVAL_MODEL_PATH or --model"
        )
    return find_model(settings.model, ROOT)


def make_plan(settings: Settings, rank: Rank, device: str) -> Plan:
    """The plan for all rows of the data. Whatever can be checked cheaply is checked here, before a model loads: raises
    InputError."""
    variant, task = get_variant(settings.variant), get_task(settings.task)
    data = find_data(settings.data, ROOT, "the evaluation data")
    rows = read_data(data, settings.limit, task)
    video_root = find_video_root(settings.video_root, ROOT)
    if rank.local_rank == 0:
        check_videos((row["video_path"] for row in rows), ROOT, video_root)
    model = find_checkpoint(settings)
    config = load_config(model)
    if not settings.force:
        check_trained(config, model, variant, "--force to evaluate it anyway")
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    check_precision(settings.weights or None, device, getattr(torch, dtype))
    ids, budget = [row["video_id"] for row in rows], PixelBudget.trained(config, settings)
    schedule = choose_schedule(settings.schedule or None, config, model, variant)
    return Plan(
        rows=rows,
        data=data,
        out=settings.output_dir / (settings.output_file or f"{variant.name}_infer.json"),
        model=str(model_folder(model)),
        device=device,
        dtype=dtype,
        weights=settings.weights or None,
        video_root=video_root,
        variant=variant,
        schedules=choose_schedules(schedule, variant, wait_k(config), settings.seed, ids, ROOT),
        end_of_slot=end_of_slot(config),
        budget=budget,
        reader=choose_reader(os.environ),
        max_clips=config.text_config.max_position_embeddings // math.ceil(budget.min_pixels_per_frame / SIDE_FACTOR**2),
        batch_size=settings.batch_size,
        memory=settings.memory and int(settings.memory * 2**30),
        penalty=settings.repetition_penalty,
        max_new_tokens=settings.max_new_tokens,
        loaders=count_loaders(rank, device) if settings.workers is None else settings.workers,
    )


def describe(settings: Settings, plan: Plan) -> dict:
    """The facts that decide the captions. Hashes the checkpoint, which takes a while."""
    model, schedules = find_checkpoint(settings), plan.schedules
    return {
        "variant": plan.variant.name,
        "position_rule": RULE if plan.variant.after_video else None,
        "data": plan.data,
        "data_sha256": hash_data(plan.data),
        "model": model,
        "model_sha256": of_checkpoint(model),
        "video_root": str(plan.video_root.absolute()) if plan.video_root else "",
        **settings.identity(plan.budget),
        "schedule": schedules.name,
        **({"schedule_sha256": schedules.sha256} if schedules.sha256 else {}),
        **({"end_of_slot": plan.end_of_slot} if plan.end_of_slot else {}),
        "dtype": plan.dtype,
        "weights": plan.weights,
        "versions": versions(),
    }


def select(plan: Plan, video_ids: Iterable[str], world_size: int) -> Plan:
    """`plan` for `video_ids` only, the longest first: they need the most memory. Where few are left, the batch is so
    small that all of `world_size` processes get their share."""
    rows = {row["video_id"]: row for row in plan.rows}
    left = sorted((rows[video_id] for video_id in video_ids), key=lambda row: row["duration"], reverse=True)
    return replace(plan, rows=left, batch_size=max(1, min(plan.batch_size, math.ceil(len(left) / world_size))))


def count_loaders(rank: Rank, device: str) -> int:
    """Decoding processes per rank. A GPU needs several to keep up; on a CPU the model needs the cores."""
    return 2 if device == "cpu" else max(2, min(8, len(os.sched_getaffinity(0)) // rank.local_world_size - 1))
