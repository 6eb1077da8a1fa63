"""Finds FunQA's annotation files and videos in a folder, else on the hub. Does not depend on questions."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from preparation.hub import HubError, list_dataset
from qwen_vl_streaming.common.errors import InputError, cannot_list

from .videos import StoredFile, VideoFile, find_in_archive, find_on_disk

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
    on_disk = _walk(folder)
    stored = [StoredFile(str(path), f"{status.st_size}:{status.st_mtime_ns}") for path, status in on_disk]
    found = find_on_disk(on_disk)
    if sources := _read_sources(splits, stored, found, videos):
        for split in splits:
            if split not in sources:
                logger.warning("%s has no FunQA_%s.json: the %s split is skipped", folder, split, split)
        return sources
    if not hub_name:
        names = " or ".join(f"FunQA_{split}.json" for split in splits)
        raise InputError(f"{folder} has no {names}: give --source the folder with FunQA's own annotation files")
    fix = (
        f"where access works (see hf auth login), run hf download {hub_name} --repo-type dataset --local-dir {folder}, "
        "or give --source a folder"
    )
    repository, sizes = list_dataset(hub_name, folder, fix)
    revision = repository.partition("@")[2]
    stored = [StoredFile(path, revision, repository, size) for path, size in sorted(sizes.items())]
    sources = _read_sources(splits, stored, found, videos)
    if not sources:
        raise InputError(f"{hub_name} on the hub has no annotation file of {' or '.join(splits)}: {fix}")
    logger.info("streaming %s from the hub: %s", hub_name, ", ".join(source.name for source in sources.values()))
    return sources


def _read_sources(
    splits: list[str], stored: list[StoredFile], on_disk: dict[str, list[VideoFile]], videos: Path
) -> dict[str, Source]:
    """The sources of the `splits` whose annotation file is in `stored`."""
    sources: dict[str, Source] = {}
    for split in splits:
        file = _single(split, [file for file in stored if file.name.lower() == f"funqa_{split}.json"])
        if file:
            archives = [file for file in stored if file.name.lower() in (f"{split}.zip", f"funqa_{split}.zip")]
            zipped = [find_in_archive(archive, videos / split) for archive in archives]
            sources[split] = Source(file.name, _read(file), [on_disk, *zipped])
    return sources


def _read(file: StoredFile) -> bytes:
    try:
        with file.open() as opened:
            return opened.read()
    except HubError as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{file.path} cannot be read ({error.strerror}): make it readable") from error


def _single(split: str, files: list[StoredFile]) -> StoredFile | None:
    """Return the annotation file of `split`, or None. Raises InputError if there are two."""
    if len(files) > 1:
        both = f"{files[0].path} and {files[1].path}"
        raise InputError(f"{both} both are annotation files of {split}: keep only one of them in --source")
    return files[0] if files else None


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
