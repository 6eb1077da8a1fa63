"""Let a checkpoint watch videos and speak, in batches, on one GPU or many, and score what it said. Launched by eval.sh.

A run that was killed goes on where it was when the same command is given again, with any number of processes. In a row,
`seconds` is the wall time of its process since the row before it: over the rows of a process it adds up to the time
that the process took, so that the rows over the sum of their seconds are videos per second of one process.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from crew import GPU, HOST, Crew, LostRun, Place
from identity import NOT_COMPARED, describe_model, keep_arguments
from metrics.scorecard import prepare_scoring, score_rows
from qwen_vl_streaming.common.data_rows import hash_data, read_data_rows, row_place
from qwen_vl_streaming.common.ending import explain, leave, run_to_end, say
from qwen_vl_streaming.common.errors import InputError, OneLineParser
from qwen_vl_streaming.common.paths import check_videos, find_data, find_folder, find_model, find_path, make_data
from qwen_vl_streaming.common.progress import Progress, quiet_libraries
from qwen_vl_streaming.common.versions import versions
from qwen_vl_streaming.devices import choose_device, look
from qwen_vl_streaming.model.checkpoint import of_checkpoint
from qwen_vl_streaming.model.hub import model_folder
from qwen_vl_streaming.model.modeling_qwen2_5_vl import load_config
from qwen_vl_streaming.model.trained import check_trained
from qwen_vl_streaming.timeline.positions import RULE
from qwen_vl_streaming.timeline.variants import get_variant
from qwen_vl_streaming.video.frames import SIDE_FACTOR, PixelBudget, choose_reader
from results import (
    CAPTION_FIELDS,
    SKIPPED,
    bring_together,
    check_row,
    count_left_out,
    load_all,
    load_finished,
    load_skipped,
    only_writer,
    shared_mark,
    sibling,
    write_whole,
)
from schedules import choose_schedules
from settings import ROOT, Settings, parse
from tasks import Task, check_captions, get_task, read_row
from tqdm.contrib.logging import logging_redirect_tqdm
from watching import Work, watch

logger = logging.getLogger(__name__)

GO_ON = "the same command goes on from what is finished"
SHOWN = 10
"""Videos that were left out and whose reasons are told; the file has all."""


def read_data(path: str | Path, limit: int | None, task: Task) -> list[dict]:
    """Rows of `task` to evaluate. Raises InputError, naming the line, for a bad one, one of another task, a wordless
    caption or a repeated id."""
    rows: list[dict] = []
    for number, data in read_data_rows(path):
        try:
            rows.append({**read_row(data, task), "duration": read_duration(data)})
        except InputError as error:
            raise InputError(f"{row_place(path, number)}: {error}") from error
    if not rows:
        raise InputError(f"{path} has no rows: {make_data(path) or 'give a file with rows'}")
    return rows[:limit]


def read_duration(data: dict) -> float:
    """Seconds that a row claims, 0 where it claims none. Raises InputError where they are none."""
    claimed = data.get("video_duration_in_s") or 0
    try:
        seconds = math.nan if isinstance(claimed, bool) else float(claimed)
    except (ValueError, TypeError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"video_duration_in_s is {str(claimed)[:40]!r}: give seconds, or delete this line")
    return seconds


def make_work(settings: Settings, processes: int, gpus: int) -> tuple[Work, dict]:
    """What each of `processes` on this machine is to do, with all rows of the data, and what decides the captions: the
    facts that go beside them.

    All that is cheap to see is checked here, before a model loads: raises InputError.
    """
    variant, task = get_variant(settings.variant), get_task(settings.task)
    data = find_data(settings.data, ROOT, "the evaluation data")
    rows = read_data(data, settings.limit, task)
    video_root = find_folder(settings.video_root, ROOT, "the video root")
    check_videos((row["video_path"] for row in rows), ROOT, video_root)
    model = find_checkpoint(settings)
    config = load_config(model)
    if not settings.force:
        check_trained(config, model, variant, "--force to evaluate it all the same")
    ids, budget = [row["video_id"] for row in rows], PixelBudget.trained(config, settings)
    wait_k = getattr(config, "wait_k", 3)
    schedules = choose_schedules(settings.schedule, variant, wait_k, settings.seed, ids, ROOT)
    device = settings.device or ("cuda" if gpus else "cpu")
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    work = Work(
        rows=rows,
        out=settings.output_dir / (settings.output_file or f"{variant.name}_infer.json"),
        model=str(model_folder(model)),  # so that no process asks the hub again
        device=device,
        dtype=dtype,
        root=ROOT,
        video_root=video_root,
        variant=variant,
        schedules=schedules,
        budget=budget,
        reader=choose_reader(os.environ),
        max_clips=config.text_config.max_position_embeddings // math.ceil(budget.min_pixels_per_frame / SIDE_FACTOR**2),
        batch_size=settings.batch_size,
        memory=settings.memory and int(settings.memory * 2**30),
        penalty=settings.repetition_penalty,
        max_new_tokens=settings.max_new_tokens,
        loaders=count_loaders(processes, device) if settings.workers is None else settings.workers,
        threads=None if processes == 1 or "OMP_NUM_THREADS" in os.environ else max(1, os.cpu_count() // processes),
    )
    facts = {
        "variant": variant.name,
        "position_rule": RULE if variant.after_video else None,
        "data": data,
        "data_sha256": hash_data(data),
        "model": model,
        "model_sha256": of_checkpoint(model),
        "video_root": str(video_root.absolute()) if video_root else "",
        **settings.identity(budget),
        "schedule": schedules.name,
        **({"schedule_sha256": schedules.sha256} if schedules.sha256 else {}),
        "dtype": dtype,
        "versions": versions(),
    }
    return work, facts


def find_checkpoint(settings: Settings) -> str:
    """The checkpoint's folder or hub id. Raises InputError, with how it is trained, where it is the default and not
    there."""
    if Path(settings.model) == settings.trained and not settings.trained.exists():
        task = get_task(settings.task)
        train = f"QWEN2_5_VL_VARIANT={settings.variant} bash scripts/sft.sh"
        if task.subtasks:
            flag = f"--output_dir output/{settings.trained.name}"
            train = f"QWEN2_5_VL_TRAIN_DATA=dataset/{task.trained}_train.jsonl {train} {flag}"
        raise InputError(
            f"{settings.trained}, the default checkpoint of --task {task.name}, is not there: train it with "
            f"`{train}` in code/qwen-vl-finetune, or name another with QWEN2_5_VL_EVAL_MODEL_PATH or --model"
        )
    return find_model(settings.model, ROOT)


def take(work: Work, video_ids: Iterable[str], everyone: int) -> Work:
    """`work` for those videos, the longest first: they need the most memory. Where there are few, none of the
    processes, `everyone` of them, seats more than its share."""
    rows = {row["video_id"]: row for row in work.rows}
    left = sorted((rows[video_id] for video_id in video_ids), key=lambda row: row["duration"], reverse=True)
    return replace(work, rows=left, batch_size=max(1, min(work.batch_size, math.ceil(len(left) / everyone))))


def lead(settings: Settings, processes: int, gpus: int, crew: Crew | None, line: str) -> None:
    """Machine 0: see what is left, have it captioned, bring the rows together and score them. `line` is what to say of
    the device, if anything."""
    scoring = prepare_scoring(settings)
    work, facts = make_work(settings, processes, gpus)
    out, ids = work.out, [row["video_id"] for row in work.rows]
    with only_writer(out):
        finished = begin(work, facts)
        logger.info("%s: checkpoint %s", work.variant.name, describe_model(work.model))
        logger.info("data %s, %d videos", facts["data"], len(ids))
        left = [video_id for video_id in ids if video_id not in finished]
        if finished:
            logger.info("%d of %d videos were captioned before: going on", len(finished), len(ids))
        if left and line:
            logger.info(line)
        token = secrets.token_hex(8)
        if crew and settings.nodes > 1:
            write_whole(shared_mark(out, token), b"")
            crew.announce({"facts": facts, "left": left, "token": token})
        lost = caption_left(take(work, left, processes * settings.nodes), crew, len(ids))
        skipped = load_skipped(out)
        left_out = [skipped[video_id] for video_id in ids if video_id in skipped]
        write_whole(sibling(out, SKIPPED), "".join(json.dumps(row) + "\n" for row in left_out).encode())
        rows = load_all(out, ids)
        bring_together(out, rows)
    tell_left_out(left_out, sibling(out, SKIPPED))
    missing = len(ids) - len(rows) - len(left_out)
    if missing:
        raise LostRun(f"{'; '.join(lost)}: {missing} of {len(ids)} videos are not captioned")
    for line in lost:
        logger.warning("%s, when its videos were finished", line)
    if rows:
        print(f"captions: {out}")
    score_rows(rows, out, sibling(out, "scores.json"), len(left_out), scoring)


def begin(work: Work, facts: dict) -> set[str]:
    """Bring together what earlier runs have finished; returns its video ids. Raises InputError where that was made from
    something else."""
    out, ids = work.out, [row["video_id"] for row in work.rows]
    before = load_all(out, ids)
    keep_arguments(out, facts, begun=bool(before))
    for row in before:
        if row["variant"] != work.variant.name:
            raise InputError(
                f"{out} has rows of {row['variant']:.80}, not {work.variant.name}: "
                "give another --output-file, or delete it to start anew"
            )
        check_row(f"{out}, video {row['video_id']!r}", row, work.variant.name)
    bring_together(out, before)
    return {row["video_id"] for row in before}


def caption_left(work: Work, crew: Crew | None, total: int) -> list[str]:
    """Caption `work.rows`, the last of `total`, here or by all machines; returns a line for each process lost."""
    before = total - len(work.rows)
    with (
        logging_redirect_tqdm(),
        Progress(
            desc=f"watching, {work.variant.name}",
            total=total,
            initial=before,
            unit=" videos",
            smoothing=0,
            disable=not work.rows,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        ) as bar,
    ):
        if crew:
            return crew.work(watch, work, count=len(work.rows), moved=lambda done: bar.update(before + done - bar.n))
        watch(work, Place(), iter(range(len(work.rows))), bar.update)
        return []


def assist(settings: Settings, processes: int, gpus: int, crew: Crew, line: str) -> None:
    """A machine other than 0: caption what machine 0 says is left."""
    work, facts = make_work(settings, processes, gpus)
    plan = crew.plan()
    for key in facts.keys() - NOT_COMPARED:
        if f"{key}_sha256" not in facts and plan["facts"].get(key) != facts[key]:
            raise InputError(f"{key} is {facts[key]!r} here and {plan['facts'].get(key)!r} on machine 0: give both one")
    wait_for_mark(shared_mark(work.out, plan["token"]))
    work = take(work, plan["left"], processes * settings.nodes)
    if line:
        logger.info(line)
    if lost := crew.work(watch, work, count=len(work.rows), moved=lambda done: None):
        raise LostRun("; ".join(lost))
    logger.info("machine %d has done its part; machine 0 brings the rows together", settings.node_rank)


def wait_for_mark(mark: Path, patience: float = 60) -> None:
    """Network file systems may take some seconds to show a new file."""
    end = time.monotonic() + patience
    while not mark.exists():
        if time.monotonic() > end:
            raise InputError(f"{mark}, which machine 0 has written, is not here: --output-dir must be shared by all")
        time.sleep(0.5)


def tell_left_out(skipped: Iterable[dict], where: Path) -> None:
    for number, row in enumerate(skipped):
        if number == SHOWN:
            logger.warning("and more: see %s", where)
            break
        logger.warning("left out %s: %s", row["video_id"], row["reason"])


def count_processes(settings: Settings) -> tuple[int, int, str]:
    """Processes to start on this machine, GPUs to use there, and a line that tells of the CPU where nobody asked for
    it. Raises InputError where there are too few of those."""
    gpus, line = 0, ""
    if settings.device != "cpu":
        # Asking starts the CUDA runtime, and a process that has started it cannot be forked into others.
        with ProcessPoolExecutor(1, get_context("fork")) as apart:
            devices = apart.submit(look, dict(os.environ)).result()
        device, line = choose_device(settings.device, devices)
        gpus = devices.usable if device != "cpu" else 0
    processes = settings.processes or (1 if ":" in settings.device or not gpus else slurm_gpus() or gpus)
    if gpus and processes > (1 if ":" in settings.device else gpus):
        raise InputError(f"{processes} processes for {gpus} GPUs: give each its own, or --device cpu")
    return processes, gpus, line


def slurm_gpus() -> int:
    """GPUs that SLURM gave this job on this machine; 0 where it does not say."""
    said = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(said) if said.isdecimal() else 0


def count_loaders(processes: int, device: str) -> int:
    """A GPU is faster than a few cores can decode for it; on a CPU they are needed for the model."""
    return 2 if device == "cpu" else max(2, min(8, len(os.sched_getaffinity(0)) // processes - 1))


def stop(number: int, frame: object) -> None:
    print(f"\nstopped by {signal.Signals(number).name}: {GO_ON}", file=sys.stderr)
    leave(128 + number)


def main() -> None:
    settings = parse(OneLineParser(prog="eval.sh", description=__doc__))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    if settings.score_only:
        path = find_path(settings.score_only, ROOT, "the result file")
        rows = list(load_finished(path, CAPTION_FIELDS, whole=True).values())
        check_captions(path, rows, get_task(settings.task))
        score_rows(rows, path, sibling(path, "scores.json"), count_left_out(path), prepare_scoring(settings))
        return
    processes, gpus, line = count_processes(settings)
    alone = processes == settings.nodes == 1
    where = (settings.nodes, settings.node_rank, settings.master_addr, settings.master_port)
    try:
        with contextlib.nullcontext() if alone else Crew(processes, *where) as crew:  # before all else: see there
            part = lead if settings.node_rank == 0 else assist
            part(settings, processes, gpus, crew, line)
    except LostRun as error:
        print(f"error: {error}: {GO_ON}", file=sys.stderr)
        sys.exit(1)


def program() -> None:
    """`main`, and the end of the process in one line, whatever happens."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    run_to_end(main, failed)


def failed(error: BaseException) -> None:
    if isinstance(error, Exception):
        say(error, explain(error, GPU, HOST), f": {GO_ON}")


if __name__ == "__main__":
    program()
