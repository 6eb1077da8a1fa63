"""Tar shards on the Hugging Face hub, read in the ranges that are needed. Knows nothing about samples."""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.hub import HUB_ERRORS, ask

from .sources import HUB, Unit, is_shard

logger = logging.getLogger(__name__)


def find_hub_units(name: str, splits: list[str], local: Path) -> dict[str, list[Unit]]:
    """The shards of the hub's dataset `name`, by split, at its newest commit.

    Raises InputError where it cannot be had, saying what to put into the folder `local` instead.
    """
    units: dict[str, list[Unit]] = {split: [] for split in splits}
    try:
        api = HfApi()
        repository = f"{name}@{ask(lambda: api.dataset_info(name).sha)}"
        for split in splits:
            try:
                entries = list(api.list_repo_tree(name, split, repo_type="dataset", revision=repository.split("@")[1]))
            except EntryNotFoundError:
                continue
            shards = sorted((e.path, e.size) for e in entries if hasattr(e, "size") and is_shard(e.path))
            units[split] = [
                Unit(HUB, split, path, path, f"{repository}:{size}", size=size, repository=repository)
                for path, size in shards
            ]
    except HUB_ERRORS as error:
        raise InputError(how_to_download(name, local, type(error).__name__)) from error
    found = {split: part for split, part in units.items() if part}
    if not found:
        raise InputError(how_to_download(name, local, "it has no tar shards in " + " or ".join(splits)))
    logger.info("streaming %s from the hub: %s", name, {split: len(part) for split, part in found.items()})
    return found


def how_to_download(name: str, local: Path, reason: str) -> str:
    """One line that says what to fetch, how, and where to put it."""
    return (
        f"{name} cannot be read from the hub ({reason}) and is not in {local}: where there is access (see hf auth "
        f"login), run hf download {name} --repo-type dataset --include 'train/*.tar' 'test/*.tar' --local-dir {local}"
    )
