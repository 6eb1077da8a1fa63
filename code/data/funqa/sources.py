"""Finds FunQA's annotation files and videos in a folder, else on the hub. Does not depend on questions."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from preparation.hub import HubError, RemoteFile, list_dataset
from qwen_vl_streaming.common.errors import InputError, cannot_list

from .videos import Archive, VideoFile, find_in_archive, find_on_disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The annotations and videos of one split."""

    name: str
    """Its annotation file, for messages."""
    annotations: bytes
    videos: list[dict[str, list[VideoFile]]]
    """Videos by lower-case file name. The first dictionary that has a name is used."""


def find_sources(splits: list[str], folder: Path, videos: Path, hub_name: str) -> dict[str, Source]:
    """Find `splits` below `folder`, or else in the data set `hub_name` on the hub unless that is empty.

    Videos in zip files have <videos>/<split> as the folder to unpack to. Raises InputError if no split is found.
    """
    files = _walk(folder)
    on_disk = find_on_disk(files)
    sources: dict[str, Source] = {}
    for split in splits:
        path = _single(split, [path for path, _ in files if path.name.lower() == f"funqa_{split}.json"])
        if path:
            archives = [
                Archive(str(path), f"{status.st_size}:{status.st_mtime_ns}")
                for path, status in files
                if path.name.lower() in _archive_names(split)
            ]
            zipped = [find_in_archive(archive, videos / split) for archive in archives]
            try:
                annotations = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
            sources[split] = Source(path.name, annotations, [on_disk, *zipped])
    if sources:
        for split in splits:
            if split not in sources:
                logger.warning("%s has no FunQA_%s.json: the %s split is skipped", folder, split, split)
        return sources
    if not hub_name:
        names = " or ".join(f"FunQA_{split}.json" for split in splits)
        raise InputError(f"{folder} has no {names}: give --source the folder with FunQA's own annotation files")
    return _find_on_hub(hub_name, splits, folder, videos, on_disk)


def _find_on_hub(
    name: str, splits: list[str], folder: Path, videos: Path, on_disk: dict[str, list[VideoFile]]
) -> dict[str, Source]:
    fix = (
        f"where access works (see hf auth login), run hf download {name} --repo-type dataset --local-dir {folder}, "
        "or give --source a folder"
    )
    repository, sizes = list_dataset(name, folder, fix)
    sources: dict[str, Source] = {}
    for split in splits:
        path = _single(split, [path for path in sizes if path.lower() == f"funqa_{split}.json"])
        if path:
            try:
                annotations = RemoteFile(repository, path, sizes[path]).read()
            except HubError as error:
                raise InputError(str(error)) from error
            zipped = [
                find_in_archive(Archive(path, repository.partition("@")[2], repository, size), videos / split)
                for path, size in sorted(sizes.items())
                if path.lower() in _archive_names(split)
            ]
            sources[split] = Source(path, annotations, [on_disk, *zipped])
    if not sources:
        raise InputError(f"{name} on the hub has no annotation file of {' or '.join(splits)}: {fix}")
    logger.info("streaming %s from the hub: %s", name, ", ".join(source.name for source in sources.values()))
    return sources


def _archive_names(split: str) -> tuple[str, str]:
    return (f"{split}.zip", f"funqa_{split}.zip")


def _single(split: str, paths: list) -> Path | str | None:
    """Return the annotation file of `split`, or None. Raises InputError if there are two."""
    if len(paths) > 1:
        raise InputError(
            f"{paths[0]} and {paths[1]} both are annotation files of {split}: keep only one of them in --source"
        )
    return paths[0] if paths else None


def _walk(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return regular files below `folder` with their status, sorted by path.

    Follows links but reads each folder once. Raises InputError for a folder that cannot be read.
    """
    found, seen = [], set()
    for directory, folders, names in os.walk(folder, onerror=cannot_list, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [(path, path.stat()) for path in (Path(directory, name) for name in names) if os.path.isfile(path)]
    return sorted(found)
