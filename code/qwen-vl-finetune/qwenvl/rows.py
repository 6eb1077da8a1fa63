"""The rows of a JSONL: read and checked, held out, left out. Knows nothing of what a sample is made of."""

import random
from pathlib import Path

from qwen_vl_streaming.common.data_rows import check_characters, read_data_rows
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import make_data


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL, each with the number of its line and its own question or None. Raises InputError where
    `read_data_rows` does, and for a caption that cannot be cut into tokens."""
    rows = []
    for number, row in read_data_rows(path):
        try:
            check_characters(row, "human_caption")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        fields = {name: row.get(name) for name in ("video_id", "video_path", "human_caption", "question")}
        rows.append({"line": number, **fields})
    if not rows:
        raise InputError(f"{path} has no rows: {make_data(path) or 'give one with rows'}")
    return rows


def hold_out(rows: list[dict], share: float, samples: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`rows` without and with those to evaluate on: `samples`, or that `share`, of videos that `seed` draws.

    All rows of a video are on one side. Raises InputError where nothing would be left to train on.
    """
    wanted = samples or round(share * len(rows))
    videos: dict[str, list[dict]] = {}
    for row in rows:
        videos.setdefault(row["video_path"], []).append(row)
    held, chosen = [], set()
    for video in random.Random(seed).sample(sorted(videos), len(videos)):
        if len(held) >= wanted:
            break
        chosen.add(video)
        held += videos[video]
    left = [row for row in rows if row["video_path"] not in chosen]
    if not left:
        raise InputError(f"{len(held)} of {len(rows)} samples would be held out: lower --eval_samples or --eval_share")
    if share and not held:
        raise InputError(f"--eval_share {share} of {len(rows)} samples is none: raise it, or give --eval_samples")
    return left, held


def without(rows: list[dict], lines: list[int], least: int) -> list[dict]:
    """`rows` but those of `lines`. Raises InputError where fewer than `least` are left."""
    lines = set(lines)
    left = [row for row in rows if row["line"] not in lines]
    if len(left) < least:
        raise InputError(
            f"{len(left)} of {len(rows)} samples are left where {least} are needed: mend the data, or take less at once"
        )
    return left
