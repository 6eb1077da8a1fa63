"""Finds the tar shards of a data set on the Hugging Face hub. Does not depend on samples."""

import logging
from pathlib import Path

from preparation.hub import list_dataset
from qwen_vl_streaming.common.errors import InputError

from .sources import HUB, Unit, is_shard

logger = logging.getLogger(__name__)


def find_hub_units(name: str, splits: list[str], local: Path) -> dict[str, list[Unit]]:
    """The shards of the hub's data set `name` at its newest commit, by split.

    Raises InputError if there are none or the hub cannot be read; its message says what to download to `local` instead.
    """
    fix = (
        f"where access works (see hf auth login), run hf download {name} --repo-type dataset "
        f"--include 'train/*.tar' 'test/*.tar' --local-dir {local}"
    )
    repository, sizes = list_dataset(name, local, fix, tuple(splits))
    units: dict[str, list[Unit]] = {}
    for path in sorted(filter(is_shard, sizes)):
        stamp, size = f"{repository}:{sizes[path]}", sizes[path]
        split = path.partition("/")[0]
        units.setdefault(split, []).append(Unit(HUB, split, path, path, stamp, size=size, repository=repository))
    if not units:
        raise InputError(f"{name} on the hub has no tar shards in {' or '.join(splits)}: {fix}")
    logger.info("streaming %s from the hub: %s", name, {split: len(found) for split, found in units.items()})
    return {split: units[split] for split in splits if split in units}
