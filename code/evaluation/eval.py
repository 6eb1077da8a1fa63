"""Caption videos with a checkpoint, in batches, on one GPU or many, and score the captions. Started by eval.sh.

A run that was killed resumes when the same command is given again, with any number of processes. The `seconds` of a row
are the time since the previous row of the same process; the number of rows divided by the sum of their `seconds` is the
throughput of one process in videos per second.
"""

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from captioning import Plan, caption_videos
from identity import NOT_COMPARED, describe_model, keep_arguments
from json_lines import write_rows
from metrics.scorecard import prepare_scoring, score_rows
from planning import check_any_video, describe, make_plan, select
from processes import check_gpus
from qwen_vl_streaming.common.ending import leave
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.common.paths import find_path
from qwen_vl_streaming.common.progress import Progress, quiet_libraries
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.launch.failing import run_rank
from qwen_vl_streaming.launch.signals import LAUNCHER, RESUMES
from ranks import Rank, VideoQueue
from results import (
    CAPTION_FIELDS,
    SKIPPED,
    check_row,
    count_skipped,
    exclusive_writer,
    load_all,
    load_finished,
    load_skipped,
    merge_parts,
    shared_marker,
    sibling,
)
from settings import ROOT, Settings, parse
from tasks import check_captions, get_task
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

GPU = "lower --batch-size, --memory or --max-pixels-per-video"
HOST = "lower --workers or --batch-size, or provide more memory"
"""What to do where memory runs out."""
SHOWN = 10
"""Skipped videos whose reasons are logged; the file has all of them."""


def lead(settings: Settings, rank: Rank, device: str, queue: VideoQueue, note: str) -> None:
    """Rank 0: find the videos without a caption, caption them together with the other ranks, merge the rows and score
    them. `note` is logged if anything is left to do."""
    scoring = prepare_scoring(settings)
    plan = make_plan(settings, rank, device)
    facts = describe(settings, plan)
    out, ids = plan.out, [row["video_id"] for row in plan.rows]
    with exclusive_writer(out):
        finished = resume(plan, facts)
        logger.info("%s: checkpoint %s", plan.variant.name, describe_model(plan.model, facts["data_sha256"]))
        logger.info("data %s, %d videos", plan.data, len(ids))
        left = [video_id for video_id in ids if video_id not in finished]
        if finished:
            logger.info("resuming: %d of %d videos already have a caption", len(finished), len(ids))
        if left and note:
            logger.info(note)
        token = secrets.token_hex(8)
        if rank.several_nodes:
            write_file(shared_marker(out, token), "")
        queue.publish({"facts": facts, "left": left, "token": token})
        caption_left(select(plan, left, rank.world_size), rank, queue, len(ids))
        skipped = load_skipped(out)
        skipped_rows = [skipped[video_id] for video_id in ids if video_id in skipped]
        write_rows(sibling(out, SKIPPED), skipped_rows)
        rows = load_all(out, ids)
        merge_parts(out, rows)
    log_skipped(skipped_rows, sibling(out, SKIPPED))
    if missing := len(ids) - len(rows) - len(skipped_rows):  # a network file system may not show them yet
        raise InputError(f"{out}: {missing} of {len(ids)} videos have no caption{RESUMES}")
    if rows:
        print(f"captions: {out}")
    score_rows(rows, out, sibling(out, "scores.json"), len(skipped_rows), scoring)


def resume(plan: Plan, facts: dict) -> set[str]:
    """Merge the parts of earlier runs; returns the ids of the videos that have a caption. Raises InputError where those
    were made with other data, another checkpoint or other settings, and where there are none and no video is found."""
    out, ids = plan.out, [row["video_id"] for row in plan.rows]
    before = load_all(out, ids)
    if not before:
        check_any_video(plan)
    keep_arguments(out, facts, begun=bool(before))
    for row in before:
        if row["variant"] != plan.variant.name:
            raise InputError(
                f"{out} has rows of {row['variant']:.80}, not {plan.variant.name}: "
                "give another --output-file, or delete it to start over"
            )
        check_row(f"{out}, video {row['video_id']!r}", row, plan.variant.name)
    merge_parts(out, before)
    return {row["video_id"] for row in before}


def caption_left(plan: Plan, rank: Rank, queue: VideoQueue, total: int) -> None:
    """Rank 0: caption `plan.rows`, the last of `total`, together with the other ranks, under one progress bar."""
    before = total - len(plan.rows)
    with (
        logging_redirect_tqdm(),
        Progress(
            desc=f"captioning, {plan.variant.name}",
            total=total,
            initial=before,
            unit=" videos",
            smoothing=0,
            disable=not plan.rows,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        ) as bar,
    ):

        def show(done: int) -> None:
            bar.update(before + done - bar.n)

        caption_videos(plan, rank, queue.claims(), lambda: show(queue.finish_one()))
        queue.wait_for_others(show)


def follow(settings: Settings, rank: Rank, device: str, queue: VideoQueue, note: str) -> None:
    """The other ranks: caption what rank 0 has published."""
    published = queue.receive()
    plan = make_plan(settings, rank, device)
    if rank.node and rank.local_rank == 0:
        check_same(describe(settings, plan), published["facts"])
        wait_for_marker(shared_marker(plan.out, published["token"]))
        if note:
            logger.info(note)
    plan = select(plan, published["left"], rank.world_size)
    caption_videos(plan, rank, queue.claims(), queue.finish_one)
    queue.leave()
    if rank.local_rank == 0:
        logger.info("node %d has finished its part; node 0 merges the rows", rank.node)


def check_same(mine: dict, published: dict) -> None:
    """Raise InputError where this node would caption with other data or settings than node 0 has `published`."""
    for key in mine.keys() - NOT_COMPARED:
        if f"{key}_sha256" not in mine and published.get(key) != mine[key]:
            raise InputError(f"{key} is {mine[key]!r} here and {published.get(key)!r} on node 0: they must be equal")


def wait_for_marker(path: Path) -> None:
    """Wait for a file that node 0 has written: a network file system may take some seconds to show it."""
    end = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > end:
            raise InputError(f"{path}, written by node 0, is missing here: --output-dir must be shared by all nodes")
        time.sleep(0.5)


def log_skipped(skipped: Iterable[dict], where: Path) -> None:
    """Log the first of the skipped videos, with the reasons."""
    for number, row in enumerate(skipped):
        if number == SHOWN:
            logger.warning("and more: see %s", where)
            break
        logger.warning("skipped %s: %s", row["video_id"], row["reason"])


def find_device(settings: Settings, rank: Rank) -> tuple[str, str]:
    """The device of this node's processes, and a line that says so where it is the CPU and was not asked for. Raises
    InputError where there are too few GPUs."""
    if settings.processes not in (0, rank.local_world_size):
        raise InputError(f"--processes {settings.processes}: eval.py runs as one process, start it with eval.sh")
    if settings.device == "cpu":
        return "cpu", ""
    devices = look(os.environ)
    device, note = choose_device(settings.device, devices)
    check_gpus(rank.local_world_size, settings.device, devices.usable if device != "cpu" else 0)
    return device, note


def score_file(settings: Settings) -> None:
    """--score-only: score the captions of a file."""
    path = find_path(settings.score_only, ROOT, "the result file")
    rows = list(load_finished(path, CAPTION_FIELDS, whole=True).values())
    check_captions(path, rows, get_task(settings.task))
    score_rows(rows, path, sibling(path, "scores.json"), count_skipped(path), prepare_scoring(settings))


def main() -> None:
    rank = Rank.from_environment()
    settings = parse(OneLineParser(prog="eval.sh", description=__doc__))
    logging.basicConfig(level=logging.WARNING if rank.local_rank else logging.INFO, format="%(message)s")
    quiet_libraries(first=rank.local_rank == 0)
    if settings.score_only:
        score_file(settings)
        return
    device, note = find_device(settings, rank)
    part = follow if rank.rank else lead
    part(settings, rank, device, VideoQueue(rank), note)


def stop(number: int, frame: object) -> None:
    if LAUNCHER not in os.environ:  # else the launcher says so
        print(f"\nstopped by {signal.Signals(number).name}{RESUMES}", file=sys.stderr)
    leave(128 + number)


def program() -> None:
    """`main`, which ends the process at once, with one line, whatever happens."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    run_rank(main, GPU, HOST)


if __name__ == "__main__":
    program()
