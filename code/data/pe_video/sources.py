"""Where samples come from: folders of JSON and videos, tar shards on disk, tar shards on the hub.

A source is cut into units, each of which is read on its own, in any order and by any worker, and read once: the stamp
of a unit changes when what it names does. Knows nothing about rules or tokens.
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

from preparation.remote_file import HubFault, RemoteFile
from preparation.rules import MAX_JSON_BYTES, Sample
from preparation.videos import VIDEO_ENDINGS, Slice, measure, relative
from qwen_vl_streaming.common.errors import InputError, cannot_list

from .gz import GZIP, unpack
from .tar import CUT_OFF, Member, TarFault, name_fault, printable, read_members

FILES_PER_UNIT = 2_000
USUAL_JSON_BYTES = 1 << 14  # read at once; a buffer for the largest JSON allowed would cost more than the file
MAX_ID_BYTES = 200  # what a file name can hold, less room for its ending
FOLDER, TAR, HUB = "folder", "tar", "hub"
JSON, VIDEO = "JSON", "video"
OTHER_VIDEO = "another video of this name is used"
SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
OTHER_SHARDS = re.compile(r"\.(tar\.(bz2?|xz|zst|zstd|lz|lz4|lzma|br|z)|tbz2?|txz|tzst|tlz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """A tar shard, or some of the files of a folder."""

    kind: str
    """FOLDER, TAR or HUB."""
    split: str
    name: str
    """For messages, and the order in which units count: the first sample of an id is the one that is used."""
    path: str
    """The folder or the tar file, on disk; on the hub, its path in the repository."""
    stamp: str
    """Changes when the content does."""
    files: tuple[tuple[str, str], ...] = ()
    """For a folder, pairs of (JSON, video), each relative to it or absolute, and empty where there is none."""
    others: tuple[str, ...] = ()
    """For a folder, videos beside one of the JSON files that has another video there."""
    size: int = 0
    """Bytes, for a shard on the hub."""
    repository: str = ""
    """For a shard on the hub: the dataset and its revision, as "owner/name@commit"."""


def find_units(split: str, folder: Path, videos: Path) -> list[Unit]:
    """The units of a local split, by name: its tar shards, and its JSON files in groups. Empty where there is none.

    The video of a JSON file is the one beside it; else the first by path in `folder` that has no JSON file of its own
    beside it, else the first in `videos`. Raises InputError for a shard that is packed in a way that is not read.
    """
    tars: list[tuple[str, str]] = []
    jsons: list[tuple[str, str, str]] = []
    beside: dict[str, list[str]] = {}  # paths without their ending -> videos
    for name, stamp in sorted(_walk(folder)):
        path, ending = os.path.splitext(name)
        ending = ending.lower()
        if ending == ".json":
            jsons.append((path, name, stamp))
        elif ending in VIDEO_ENDINGS:
            beside.setdefault(path, []).append(name)
        elif is_shard(f"{folder}{os.sep}{name}"):
            tars.append((name, stamp))
    for names in beside.values():
        names.sort(key=lambda name: VIDEO_ENDINGS.index(os.path.splitext(name)[1].lower()))
    units = [Unit(TAR, split, f"{split}/{_plain(name)}", str(folder / name), stamp) for name, stamp in tars]
    if not tars or jsons:  # videos alone, beside shards, are those that were unpacked from them
        described = {path for path, _, _ in jsons}
        apart = {path: names for path, names in beside.items() if path not in described}
        unpacked = _by_stem(name for name, _ in sorted(_walk(videos)))
        elsewhere = {stem: str((videos / name).absolute()) for stem, name in unpacked.items()}
        elsewhere |= _by_stem(name for names in apart.values() for name in names)
        own = {name: beside.get(path, [""]) for path, name, _ in jsons}
        entries = [(name, own[name][0] or elsewhere.get(_stem(path), ""), stamp) for path, name, stamp in jsons]
        stems = {_stem(path) for path in described}
        entries += [("", name, "") for path, names in apart.items() for name in names if _stem(path) not in stems]
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
    """Whether `path` names a tar shard. Raises InputError for one that is packed in a way that is not read."""
    if OTHER_SHARDS.search(path):
        raise InputError(f"{path} is a shard that is packed in a way that is not read: make it a .tar or a .tar.gz")
    return path.lower().endswith(SHARD_ENDINGS)


def read_samples(unit: Unit, videos: Path, root: Path, scratch: Path) -> Iterator[Sample]:
    """Yield the samples of `unit`. `videos` is where those from shards belong; paths are relative to `root`. A shard
    that gzip has made is unpacked into `scratch` meanwhile.

    A fault of the unit itself is a Sample without an id.
    """
    if unit.kind == FOLDER:
        yield from _from_files(unit, relative(videos, root), relative(Path(unit.path), root), root)
        return
    try:
        with open_shard(unit, scratch) as file:
            yield from _from_tar(unit, file, relative(videos, root))
    except OSError as error:
        yield Sample("", unit.name, fault=f"shard cannot be read: {error.strerror or error}")


@contextmanager
def open_shard(unit: Unit, scratch: Path) -> Iterator[BinaryIO]:
    """Open the tar file of `unit`, wherever it is; one that gzip has made is unpacked into `scratch` meanwhile.

    Raises OSError, or InputError where the hub does not answer or `scratch` has no room.
    """
    if unit.kind == HUB:
        file: BinaryIO = RemoteFile(unit.repository, unit.path, unit.size)
    else:
        file = open(unit.path, "rb")  # noqa: SIM115 - closed below, as the remote one is
    try:
        with file:
            packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            if packed:
                with unpack(file, scratch) as unpacked:
                    yield unpacked
            else:
                yield file
    except HubFault as error:
        raise InputError(str(error)) from error


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Plain files below `folder`, as (path relative to it, stamp), without following links to other folders.

    A link that leads nowhere or in a circle has an empty stamp: whoever reads it says what is wrong. Raises InputError
    for a folder that cannot be read.
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
        if ending.lower() in VIDEO_ENDINGS:
            found.setdefault(_stem(path), name)
    return found


def _plain(name: str) -> str:
    return name if name.isprintable() else printable(os.fsencode(name))


def _id_fault(video_id: str) -> str:
    fault = name_fault(os.fsencode(video_id))
    return fault or ("has a name that is too long" if len(os.fsencode(video_id)) > MAX_ID_BYTES else "")


def _from_files(unit: Unit, videos: str, folder: str, root: Path) -> Iterator[Sample]:
    """`videos` and `folder` are relative to `root`. Plain strings, for this loop is most of a run's Python."""
    for json_name, video in unit.files:
        name = os.path.basename(json_name or video)
        video_id = os.path.splitext(name)[0]
        where = f"{unit.split}/{_plain(json_name or video)}"
        if fault := _id_fault(video_id):
            yield Sample("", where, fault=f"file refused: {fault}")
        elif not json_name:
            yield Sample(video_id, where, fault="video without its JSON")
        else:
            sample = Sample(video_id, where, video_path=f"{videos}/{video_id}.mp4")
            if video:
                sample.video = os.path.join(unit.path, video)
                sample.video_path = relative(Path(video), root) if os.path.isabs(video) else f"{folder}/{video}"
                sample.measure = partial(measure, sample.video, sample.video_path)
            try:
                sample.text = _read_file(os.path.join(unit.path, json_name))
            except OSError as error:
                sample.fault = f"JSON cannot be read: {error.strerror}"
            yield sample
    for video in unit.others:
        name = os.path.splitext(os.path.basename(video))[0]
        yield Sample("" if _id_fault(name) else name, f"{unit.split}/{_plain(video)}", fault=OTHER_VIDEO)


def _read_file(path: str) -> bytes:
    """The bytes of a file, and one more than MAX_JSON_BYTES of a larger one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, USUAL_JSON_BYTES)
        while len(data) >= USUAL_JSON_BYTES and len(data) <= MAX_JSON_BYTES:
            more = os.read(descriptor, MAX_JSON_BYTES + 1 - len(data))
            if not more:
                break
            data += more
        return data
    finally:
        os.close(descriptor)


def _from_tar(unit: Unit, file: BinaryIO, videos: str) -> Iterator[Sample]:
    waiting: dict[PurePosixPath, dict[str, Member]] = {}  # members whose other half has not come yet
    paired: set[PurePosixPath] = set()
    fault = ""
    try:
        for member in read_members(file):
            if member.fault and member.fault != CUT_OFF:
                yield Sample("", f"{unit.name}:{member.name}", fault=f"member refused: {member.fault}")
                continue
            path = PurePosixPath(member.name)
            key, ending = path.with_suffix(""), path.suffix.lower()
            half = JSON if ending == ".json" else VIDEO if ending in VIDEO_ENDINGS else ""
            if half:
                if half in waiting.get(key, {}):
                    yield _from_members(unit, file, key, waiting.pop(key), videos)
                waiting.setdefault(key, {})[half] = member
                if len(waiting[key]) == 2:
                    yield _from_members(unit, file, key, waiting.pop(key), videos)
                    paired.add(key)
    except TarFault as error:
        fault = str(error)
    for key, members in waiting.items():
        sample = _from_members(unit, file, key, members, videos)
        if key in paired and JSON not in members and sample.video_id:
            sample.fault = OTHER_VIDEO
        yield sample
    if fault:
        yield Sample("", unit.name, fault=f"shard damaged: {fault}")


def _from_members(
    unit: Unit,
    file: BinaryIO,
    key: PurePosixPath,
    members: dict[str, Member],
    videos: str,
) -> Sample:
    where = f"{unit.name}:{key}"
    json_member, video = members.get(JSON), members.get(VIDEO)
    if fault := _id_fault(key.name):
        return Sample("", where, fault=f"member refused: {fault}")
    ending = PurePosixPath(video.name).suffix.lower() if video else ".mp4"
    sample = Sample(key.name, where, video_path=f"{videos}/{key.name}{ending}")
    if json_member is None:
        sample.fault = "video without its JSON"
    elif video is None:
        sample.fault = "JSON without its video"
    elif json_member.fault or video.fault:
        sample.fault = f"{'JSON' if json_member.fault else 'video'} {json_member.fault or video.fault}"
    elif video.size == 0:
        sample.fault = "video is empty"
    elif json_member.size > MAX_JSON_BYTES:
        sample.fault = "JSON is too large"
    else:
        file.seek(json_member.offset)
        sample.text = file.read(json_member.size)
        sample.video = f"{video.offset}+{video.size}+{ending}"
        sample.measure = partial(_measure_member, file, video, where)
    return sample


def _measure_member(file: BinaryIO, video: Member, where: str) -> float:
    return measure(Slice(file, video.offset, video.size), where)
