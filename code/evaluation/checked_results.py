"""Result files that eval.sh has written, for the programs that read them: rows that agree with the arguments beside
them, and the rows of the data that they were made from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from identity import ARGUMENTS, read_arguments
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_data
from qwen_vl_streaming.timeline.variants import get_variant
from results import Row, check_row, load_finished
from settings import ROOT


def load_checked(
    path: Path, fields: Mapping[str, type | tuple[type, ...]] = ARGUMENTS, whole: bool = True
) -> tuple[dict, dict[str, Row]]:
    """The arguments of the result file at `path`, with at least `fields`, and its rows, at least one, by video id.

    Raises InputError if one of the two is missing or invalid, or if they contradict each other. `whole` is as for
    `load_finished`.
    """
    rows = load_finished(path, whole=whole)
    if not rows:
        raise InputError(f"{path} has no rows: give a result file written by eval.sh")
    made = read_arguments(path, fields)
    variant = get_variant(made["variant"])
    for video_id, row in rows.items():
        check_row(f"{path}, video {video_id!r}", row, variant.name)
    return made, rows


def source_rows(path: Path, made: dict, video_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The data that the result file at `path`, with the arguments `made`, was made from, by video id. Raises InputError
    if they cannot be read or lack one of `video_ids`."""
    data = find_data(made["data"], ROOT, "the evaluation data")
    rows = {str(row["video_id"]): row for _, row in read_data_rows(data)}
    if gone := [video_id for video_id in video_ids if video_id not in rows]:
        raise InputError(f"{data} has no row for video {gone[0]}: {path.name} was made from other data")
    return rows
