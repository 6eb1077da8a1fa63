"""The rows of a JSONL: read and checked, held out, left out. Knows nothing of what a sample is made of."""

import json
import random
import re
from pathlib import Path

from qwen_vl_streaming.errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")
"""In a text from JSON: one half without the other."""


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL, each with the number of its line and its own question or None. Raises InputError, naming the
    line, for one that is not JSON, lacks a field, has an empty question, half a character or the id of another."""
    rows, lines_of = [], {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                fields = {key: row[key] for key in ("video_id", "video_path", "human_caption")}
                if wrong := [key for key in ("video_path", "human_caption") if not isinstance(fields[key], str)]:
                    raise TypeError(f"{wrong[0]} is no text")
                fields["question"] = read_question(row)
                if wrong := [key for key, value in fields.items() if SURROGATE.search(str(value))]:
                    raise ValueError(f"{wrong[0]} holds half of a surrogate pair, which is no character")
                rows.append({"line": number, **fields})
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: {error!r}: correct or delete this line") from error
            video_id = str(fields["video_id"])
            if (other := lines_of.setdefault(video_id, number)) != number:
                raise InputError(f"{path}, lines {other} and {number} both have the video_id {video_id}: rename one")
    return rows


def read_question(row: dict) -> str | None:
    """The question of a row that has one. Raises ValueError where it is no text or empty."""
    question = row.get("question")
    if question is not None and not (isinstance(question, str) and question.strip()):
        raise ValueError(f"question {question!r:.40}")
    return question


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
