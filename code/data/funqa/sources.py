"""FunQA's annotation files and videos: in a folder as downloaded, else on the hub. Knows nothing about questions."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from preparation.remote_file import HubFault
from qwen_vl_streaming.common.errors import InputError, cannot_list

from .videos import Archive, Place, places_in, places_on_disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One split."""

    name: str
    """Its annotation file, for messages."""
    annotations: bytes
    videos: list[dict[str, list[Place]]]
    """Where its videos may lie, by name in small letters; the first that has one counts."""


def find_sources(splits: list[str], folder: Path, videos: Path, hub_name: str) -> dict[str, Source]:
    """Each of `splits` that is there: below `folder`, or else on the hub as `hub_name` unless that is empty.

    Videos in zip files are to be unpacked to a folder a split in `videos`. Raises InputError where there is none.
    """
    files = _walk(folder)
    on_disk = places_on_disk(files)
    sources: dict[str, Source] = {}
    for split in splits:
        path = _only(split, [path for path, _ in files if path.name.lower() == f"funqa_{split}.json"])
        if path:
            archives = [
                Archive(str(path), f"{status.st_size}:{status.st_mtime_ns}")
                for path, status in files
                if path.name.lower() in _archive_names(split)
            ]
            zipped = [places_in(archive, videos / split) for archive in archives]
            try:
                annotations = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from error
            sources[split] = Source(path.name, annotations, [on_disk, *zipped])
    if sources:
        for split in splits:
            if split not in sources:
                logger.warning("%s holds no FunQA_%s.json: no %s split", folder, split, split)
        return sources
    if not hub_name:
        names = " or ".join(f"FunQA_{split}.json" for split in splits)
        raise InputError(f"{folder} holds no {names}: give --source the folder with FunQA's own annotation files")
    return _find_on_hub(hub_name, splits, folder, videos, on_disk)


def _find_on_hub(
    name: str, splits: list[str], folder: Path, videos: Path, on_disk: dict[str, list[Place]]
) -> dict[str, Source]:
    from huggingface_hub import HfApi
    from preparation.remote_file import RemoteFile
    from qwen_vl_streaming.model.hub import HUB_ERRORS, ask

    mend = (
        f"where there is access (see hf auth login), run hf download {name} --repo-type dataset --local-dir {folder}, "
        "or give --source a folder"
    )
    try:
        api = HfApi()
        revision = ask(lambda: api.dataset_info(name).sha)
        entries = list(api.list_repo_tree(name, repo_type="dataset", revision=revision))
    except HUB_ERRORS as error:
        raise InputError(
            f"{name} cannot be read from the hub ({type(error).__name__}) and is not in {folder}: {mend}"
        ) from error
    repository = f"{name}@{revision}"
    sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    sources: dict[str, Source] = {}
    for split in splits:
        path = _only(split, [path for path in sizes if path.lower() == f"funqa_{split}.json"])
        if path:
            try:
                annotations = RemoteFile(repository, path, sizes[path]).read()
            except HubFault as error:
                raise InputError(str(error)) from error
            zipped = [
                places_in(Archive(path, revision, repository, size), videos / split)
                for path, size in sorted(sizes.items())
                if path.lower() in _archive_names(split)
            ]
            sources[split] = Source(path, annotations, [on_disk, *zipped])
    if not sources:
        raise InputError(f"{name} on the hub has no annotation file of {' or '.join(splits)}: {mend}")
    logger.info("streaming %s from the hub: %s", name, ", ".join(source.name for source in sources.values()))
    return sources


def _archive_names(split: str) -> tuple[str, str]:
    return (f"{split}.zip", f"funqa_{split}.zip")


def _only(split: str, paths: list) -> Path | str | None:
    """The annotation file of `split`. Raises InputError where there are two."""
    if len(paths) > 1:
        raise InputError(f"{paths[0]} and {paths[1]} are both annotations of {split}: keep one of them in --source")
    return paths[0] if paths else None


def _walk(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Plain files below `folder`, by path, with their status. Links are followed, each folder being read once. Raises
    InputError for one that cannot be read."""
    found, seen = [], set()
    for directory, folders, names in os.walk(folder, onerror=cannot_list, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [(path, path.stat()) for path in (Path(directory, name) for name in names) if os.path.isfile(path)]
    return sorted(found)
