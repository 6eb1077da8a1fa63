"""Finds and reads samples: folders of JSON files and videos, tar shards on disk, and tar shards on the hub.

A source is divided into units. Workers read units independently and in any order, and each only once: the stamp of a
unit changes when its content does. Does not depend on rules or tokens.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from preparation.hub import HubError, RemoteFile
from preparation.rules import MAX_JSON_BYTES, Sample
from preparation.videos import VIDEO_SUFFIXES, FileSlice, relative_path, video_duration
from qwen_vl_streaming.common.errors import InputError, cannot_list

from .gzip_file import GZIP_MAGIC, decompress
from .tar import TRUNCATED, Member, TarError, name_error, printable, read_members

FILES_PER_UNIT = 2_000
FIRST_READ_BYTES = 1 << 14  # enough for nearly every JSON file; a MAX_JSON_BYTES buffer would cost more than the read
MAX_ID_BYTES = 200  # 255 is the limit on a file name; leaves room for the suffix
FOLDER, TAR, HUB = "folder", "tar", "hub"
JSON, VIDEO = "JSON", "video"
OTHER_VIDEO = "another video with this name is used"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
UNSUPPORTED_SHARDS = re.compile(r"\.(tar\.(bz2?|xz|zst|zstd|lz|lz4|lzma|br|z)|tbz2?|txz|tzst|tlz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """A tar shard, or a group of files of a folder."""

    kind: str
    """FOLDER, TAR or HUB."""
    split: str
    name: str
    """For messages. Also the order of units: of samples with the same id, the first is used."""
    path: str
    """The folder or tar file; for the hub, its path in the repository."""
    stamp: str
    """Changes when the content does."""
    files: tuple[tuple[str, str], ...] = ()
    """For a folder, pairs of (JSON, video) paths, relative to it or absolute; empty for one that does not exist."""
    others: tuple[str, ...] = ()
    """For a folder, further videos of JSON files that have several."""
    size: int = 0
    """Bytes, for a shard on the hub."""
    repository: str = ""
    """For a shard on the hub: the dataset and its revision, as "owner/name@commit"."""


def find_units(split: str, folder: Path, videos: Path) -> list[Unit]:
    """Find the units of a split in `folder`, sorted by name: its tar shards, and its JSON files in groups.

    The video of a JSON file is the one beside it, else the first by path in `folder` without a JSON file beside it,
    else the first in `videos`. Raises InputError for a shard with unsupported compression.
    """
    tars: list[tuple[str, str]] = []
    jsons: list[tuple[str, str, str]] = []
    beside: dict[str, list[str]] = {}  # path without suffix -> videos
    for name, stamp in sorted(_walk(folder)):
        path, ending = os.path.splitext(name)
        ending = ending.lower()
        if ending == ".json":
            jsons.append((path, name, stamp))
        elif ending in VIDEO_SUFFIXES:
            beside.setdefault(path, []).append(name)
        elif is_shard(f"{folder}{os.sep}{name}"):
            tars.append((name, stamp))
    for names in beside.values():
        names.sort(key=lambda name: VIDEO_SUFFIXES.index(os.path.splitext(name)[1].lower()))
    units = [Unit(TAR, split, f"{split}/{_plain(name)}", str(folder / name), stamp) for name, stamp in tars]
    if not tars or jsons:  # beside shards, videos without JSON files are those unpacked from the shards
        with_json = {path for path, _, _ in jsons}
        orphans = {path: names for path, names in beside.items() if path not in with_json}
        unpacked = _by_stem(name for name, _ in sorted(_walk(videos)))
        elsewhere = {stem: str((videos / name).absolute()) for stem, name in unpacked.items()}
        elsewhere |= _by_stem(name for names in orphans.values() for name in names)
        own = {name: beside.get(path, [""]) for path, name, _ in jsons}
        entries = [(name, own[name][0] or elsewhere.get(_stem(path), ""), stamp) for path, name, stamp in jsons]
        stems = {_stem(path) for path in with_json}
        entries += [("", name, "") for path, names in orphans.items() for name in names if _stem(path) not in stems]
        entries.sort()
        for start in range(0, len(entries), FILES_PER_UNIT):
            part = entries[start : start + FILES_PER_UNIT]
            files = tuple((json_name, video) for json_name, video, _ in part)
            others = tuple(name for json_name, _ in files if json_name for name in own[json_name][1:])
            stamp = hashlib.sha256(repr((part, others)).encode("utf-8", "surrogateescape")).hexdigest()
            name = f"{split}/files {start:09d}"
            units.append(Unit(FOLDER, split, name, str(folder), stamp, files, others))
    return sorted(units, key=lambda unit: unit.name)


def is_shard(path: str) -> bool:
    """Whether `path` names a tar shard. Raises InputError for one with unsupported compression."""
    if UNSUPPORTED_SHARDS.search(path):
        raise InputError(f"{path} has an unsupported compression: convert it to .tar or .tar.gz")
    return path.lower().endswith(SHARD_SUFFIXES)


def read_samples(unit: Unit, videos: Path, root: Path, scratch: Path) -> Iterator[Sample]:
    """Yield the samples of `unit`.

    `videos` is the folder that videos from shards are unpacked to; the samples' paths are relative to `root`. A gzip
    shard is decompressed to `scratch` while it is read. An error of the unit itself is a Sample without an id.
    """
    if unit.kind == FOLDER:
        yield from _from_files(unit, relative_path(videos, root), relative_path(Path(unit.path), root), root)
        return
    try:
        with open_shard(unit, scratch) as file:
            yield from _from_tar(unit, file, relative_path(videos, root))
    except OSError as error:
        yield Sample("", unit.name, error=f"shard cannot be read: {error.strerror or error}")


@contextmanager
def open_shard(unit: Unit, scratch: Path) -> Iterator[BinaryIO]:
    """Open the tar file of `unit` on disk or on the hub; a gzip file is decompressed to `scratch` while it is open.

    Raises OSError if it cannot be read, and InputError if the hub does not answer or `scratch` is full.
    """
    if unit.kind == HUB:
        file: BinaryIO = RemoteFile(unit.repository, unit.path, unit.size)
    else:
        file = open(unit.path, "rb")  # noqa: SIM115 - closed below, like the remote file
    try:
        with file:
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            if packed:
                with decompress(file, scratch) as decompressed:
                    yield decompressed
            else:
                yield file
    except HubError as error:
        raise InputError(str(error)) from error


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield regular files below `folder` as (relative path, stamp). Links to folders are not followed.

    A broken or circular link has an empty stamp and is reported when it is read. Raises InputError for a folder that
    cannot be read.
    """
    for directory, _, _ in os.walk(folder, onerror=cannot_list):
        prefix = "" if directory == str(folder) else os.path.relpath(directory, folder) + os.sep
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    yield prefix + entry.name, ""
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield prefix + entry.name, f"{status.st_size}:{status.st_mtime_ns}"


def _stem(path: str) -> str:
    return path.rpartition(os.sep)[2]


def _by_stem(names: Iterable[str]) -> dict[str, str]:
    """The first video of each stem among `names`."""
    found: dict[str, str] = {}
    for name in names:
        path, ending = os.path.splitext(name)
        if ending.lower() in VIDEO_SUFFIXES:
            found.setdefault(_stem(path), name)
    return found


def _plain(name: str) -> str:
    return name if name.isprintable() else printable(os.fsencode(name))


def _id_error(video_id: str) -> str:
    error = name_error(os.fsencode(video_id))
    return error or ("has a name that is too long" if len(os.fsencode(video_id)) > MAX_ID_BYTES else "")


def _from_files(unit: Unit, videos: str, folder: str, root: Path) -> Iterator[Sample]:
    """`videos` and `folder` are relative to `root`. Uses strings instead of Path, which would dominate the run time."""
    for json_name, video in unit.files:
        name = os.path.basename(json_name or video)
        video_id = os.path.splitext(name)[0]
        where = f"{unit.split}/{_plain(json_name or video)}"
        if error := _id_error(video_id):
            yield Sample("", where, error=f"file refused: {error}")
        elif not json_name:
            yield Sample(video_id, where, error="video without its JSON")
        else:
            sample = Sample(video_id, where, video_path=f"{videos}/{video_id}.mp4")
            if video:
                sample.video = os.path.join(unit.path, video)
                sample.video_path = relative_path(Path(video), root) if os.path.isabs(video) else f"{folder}/{video}"
                sample.measure_duration = partial(video_duration, sample.video, sample.video_path)
            try:
                sample.text = _read_file(os.path.join(unit.path, json_name))
            except OSError as error:
                sample.error = f"JSON cannot be read: {error.strerror}"
            yield sample
    for video in unit.others:
        name = os.path.splitext(os.path.basename(video))[0]
        yield Sample("" if _id_error(name) else name, f"{unit.split}/{_plain(video)}", error=OTHER_VIDEO)


def _read_file(path: str) -> bytes:
    """Read a file, but at most one byte more than MAX_JSON_BYTES."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, FIRST_READ_BYTES)
        while len(data) >= FIRST_READ_BYTES and len(data) <= MAX_JSON_BYTES:
            more = os.read(descriptor, MAX_JSON_BYTES + 1 - len(data))
            if not more:
                break
            data += more
        return data
    finally:
        os.close(descriptor)


def _from_tar(unit: Unit, file: BinaryIO, videos: str) -> Iterator[Sample]:
    unpaired: dict[PurePosixPath, dict[str, Member]] = {}  # a JSON or a video whose counterpart has not been read yet
    paired: set[PurePosixPath] = set()
    damage = ""
    try:
        for member in read_members(file):
            if member.error and member.error != TRUNCATED:
                yield Sample("", f"{unit.name}:{member.name}", error=f"member refused: {member.error}")
                continue
            path = PurePosixPath(member.name)
            key, ending = path.with_suffix(""), path.suffix.lower()
            role = JSON if ending == ".json" else VIDEO if ending in VIDEO_SUFFIXES else ""
            if role:
                if role in unpaired.get(key, {}):
                    yield _from_members(unit, file, key, unpaired.pop(key), videos)
                unpaired.setdefault(key, {})[role] = member
                if len(unpaired[key]) == 2:
                    yield _from_members(unit, file, key, unpaired.pop(key), videos)
                    paired.add(key)
    except TarError as error:
        damage = str(error)
    for key, members in unpaired.items():
        sample = _from_members(unit, file, key, members, videos)
        if key in paired and JSON not in members and sample.video_id:
            sample.error = OTHER_VIDEO
        yield sample
    if damage:
        yield Sample("", unit.name, error=f"shard damaged: {damage}")


def _from_members(unit: Unit, file: BinaryIO, key: PurePosixPath, members: dict[str, Member], videos: str) -> Sample:
    where = f"{unit.name}:{key}"
    json_member, video = members.get(JSON), members.get(VIDEO)
    if error := _id_error(key.name):
        return Sample("", where, error=f"member refused: {error}")
    ending = PurePosixPath(video.name).suffix.lower() if video else ".mp4"
    sample = Sample(key.name, where, video_path=f"{videos}/{key.name}{ending}")
    if json_member is None:
        sample.error = "video without its JSON"
    elif video is None:
        sample.error = "JSON without its video"
    elif json_member.error or video.error:
        sample.error = f"{'JSON' if json_member.error else 'video'} {json_member.error or video.error}"
    elif video.size == 0:
        sample.error = "video is empty"
    elif json_member.size > MAX_JSON_BYTES:
        sample.error = "JSON is too large"
    else:
        file.seek(json_member.offset)
        sample.text = file.read(json_member.size)
        sample.video = f"{video.offset}+{video.size}+{ending}"
        sample.measure_duration = partial(_member_duration, file, video, where)
    return sample


def _member_duration(file: BinaryIO, video: Member, where: str) -> float:
    return video_duration(FileSlice(file, video.offset, video.size), where)
