"""The rows of the training data: reading, holding out, excluding. Does not know what a sample consists of."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from qwen_vl_streaming.common.data_rows import check_characters, read_data_rows, row_place
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_video, make_data
from qwen_vl_streaming.common.video_part import FIELDS as PART


def read_rows(source: str) -> list[dict]:
    """The rows of a data set, each with its number as `line` and its own question or None; those with `segments` also
    have a `place` for messages. Raises InputError where `read_data_rows` does, and for a caption that cannot be
    tokenized."""
    rows = []
    for number, row in read_data_rows(source):
        try:
            check_characters(row, "human_caption")
        except InputError as error:
            raise InputError(f"{row_place(source, number)}: {error}") from error
        fields = {name: row.get(name) for name in ("video_id", "video_path", *PART, "human_caption", "question")}
        if row.get("segments") is not None:
            timed = {name: row.get(name) for name in ("segments", "segment_time")}
            fields |= {**timed, "place": row_place(source, number)}
        rows.append({"line": number, **fields})
    if not rows:
        raise InputError(f"{source} has no rows: {make_data(source) or 'give a file with rows'}")
    return rows


def file_of(video_path: str, root: Path, video_root: Path | None) -> str:
    """The file that `find_video` finds, by which the same video is recognized; `video_path` itself if there is none."""
    try:
        return os.path.realpath(find_video(video_path, root, video_root))
    except InputError:
        return video_path


def hold_out(
    rows: list[dict], share: float, samples: int, seed: int, file_of: Callable[[str], str] = str
) -> tuple[list[dict], list[dict]]:
    """Split `rows` by video into a training and an evaluation set, which has `samples` rows or that `share` of them.

    All rows of a video are on one side; rows are of one video if `file_of` returns the same for their `video_path`.
    `seed` draws the videos. Raises InputError where either side would be empty.
    """
    wanted = samples or round(share * len(rows))
    if not wanted and not share:
        return rows, []
    paths = dict.fromkeys(row["video_path"] for row in rows)
    first: dict[str, str] = {}
    name = {path: first.setdefault(file_of(path), path) for path in paths}
    videos: dict[str, list[dict]] = {}
    for row in rows:
        videos.setdefault(name[row["video_path"]], []).append(row)
    held_out, chosen = [], set()
    for video in random.Random(seed).sample(sorted(videos), len(videos)):
        if len(held_out) >= wanted:
            break
        chosen.add(video)
        held_out += videos[video]
    training = [row for row in rows if name[row["video_path"]] not in chosen]
    if not training:
        raise InputError(
            f"{len(held_out)} of {len(rows)} samples would be held out: lower --eval_samples or --eval_share"
        )
    if share and not held_out:
        raise InputError(f"--eval_share {share} of {len(rows)} samples is 0: raise it, or give --eval_samples")
    return training, held_out


def exclude(rows: list[dict], lines: list[int], minimum: int) -> list[dict]:
    """`rows` without those whose `line` is in `lines`. Raises InputError where fewer than `minimum` remain."""
    lines = set(lines)
    remaining = [row for row in rows if row["line"] not in lines]
    if len(remaining) < minimum:
        raise InputError(
            f"only {len(remaining)} of {len(rows)} samples remain, and at least {minimum} are needed: fix the data, or "
            "lower the batch size"
        )
    return remaining
