"""Merges sorted files in bounded memory and resolves duplicate ids. Does not depend on rules or videos."""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from preparation.report import SplitStatistics
from preparation.rules import BAD, KEPT
from qwen_vl_streaming.common.files import atomic_write

from .stages import Record

FAN_IN = 200  # files open at the same time; the usual limit of a process is 1,024


def merge_lines(paths: list[Path], scratch: Path) -> Iterator[str]:
    """Yield the lines of sorted files in sorted order. Intermediate files go to `scratch` if there are many."""
    level = 0
    while len(paths) > FAN_IN:
        merged = []
        for start in range(0, len(paths), FAN_IN):
            merged.append(scratch / f"merge-{level}-{start}.tsv")
            with atomic_write(merged[-1], sync=False) as file:
                file.writelines(merge_lines(paths[start : start + FAN_IN], scratch))
        paths, level = merged, level + 1
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, encoding="utf-8", newline="\n")) for path in paths]
        yield from heapq.merge(*files)


def resolve_duplicates(lines: Iterable[str], statistics: SplitStatistics) -> Iterator[Record]:
    """Yield the kept and the bad records among sorted `lines`.

    Of the records with the same id, the first that is not bad keeps its outcome; later ones become bad, also in
    `statistics`.
    """
    for video_id, group in groupby(lines, key=_id_of):
        first = None
        for line in group:
            outcome = line.split("\t", 4)[3]
            if outcome == BAD or not video_id:
                yield Record.parse(line)
            elif first is None:
                first = line
                if outcome == KEPT:
                    yield Record.parse(line)
            else:
                yield Record.parse(line).as_bad(f"duplicate id: first in {Record.parse(first).where}", statistics)


def _id_of(line: str) -> str:
    return line[: line.index("\t")]
