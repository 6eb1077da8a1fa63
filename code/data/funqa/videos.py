"""FunQA's videos: files on disk, or members of zip files on disk or on the hub. Does not depend on questions."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from preparation.hub import HubError, RemoteFile
from preparation.inspection import Inspection, Video
from preparation.videos import VIDEO_SUFFIXES, check_video
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import atomic_write

UNPACK_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)
"""What zipfile raises for a damaged, encrypted or unsupported member."""


@dataclass(frozen=True)
class StoredFile:
    """A file as published, on disk or on the hub: annotations or a zip file."""

    path: str
    """The file; for the hub, its path in the repository."""
    stamp: str
    """Changes when its content does."""
    repository: str = ""
    """For the hub: the data set and its revision, as "owner/name@commit"."""
    size: int = 0
    """For the hub: bytes."""

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def open(self) -> BinaryIO:
        """Open it for reading. Raises OSError; reading from the hub raises HubError."""
        if self.repository:
            return RemoteFile(self.repository, self.path, self.size)
        return open(self.path, "rb")


@dataclass(frozen=True)
class VideoFile(Video):
    """One video, on disk or in a zip file."""

    file: Path
    """Where it is, or where it is unpacked to."""
    stamp: str
    """Changes when its content does."""
    size: int
    archive: StoredFile | None = None
    member: str = ""
    """Its name in `archive`."""

    @property
    def key(self) -> str:
        archive = self.archive
        return "\0".join([str(self.file), self.stamp, *((archive.repository, archive.path) if archive else ())])

    @property
    def container(self) -> str:
        return self.archive.path if self.archive else ""

    @property
    def target(self) -> Path | None:
        return self.file if self.archive else None


@contextmanager
def open_archive(archive: StoredFile) -> Iterator[zipfile.ZipFile]:
    """Open a zip file on disk or on the hub. Raises InputError if it is not a zip file or the hub does not answer."""
    try:
        with archive.open() as file, zipfile.ZipFile(file) as opened:
            yield opened
    except HubError as error:
        raise InputError(str(error)) from error
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{archive.path} cannot be read as a zip file ({error}): download it again") from error


def find_on_disk(files: list[tuple[Path, os.stat_result]]) -> dict[str, list[VideoFile]]:
    """The videos among `files` by lower-case file name."""
    found: dict[str, list[VideoFile]] = {}
    for path, status in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            video = VideoFile(path, f"{status.st_size}:{status.st_mtime_ns}", status.st_size)
            found.setdefault(path.name.lower(), []).append(video)
    return found


def find_in_archive(archive: StoredFile, folder: Path) -> dict[str, list[VideoFile]]:
    """The videos of a zip file by lower-case file name, to be unpacked to `folder`. Raises InputError."""
    found: dict[str, list[VideoFile]] = {}
    with open_archive(archive) as opened:
        for member in opened.infolist():
            name = PurePosixPath(member.filename).name
            if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith("._"):
                stamp = f"{archive.stamp}:{member.CRC}"
                video = VideoFile(folder / name, stamp, member.file_size, archive, member.filename)
                found.setdefault(name.lower(), []).append(video)
    return found


def find_video_file(name: str, sources: list[dict[str, list[VideoFile]]]) -> tuple[VideoFile | None, str]:
    """Return (video, "") from the first of `sources` that has the file `name`, or (None, reason)."""
    for videos in sources:
        if found := videos.get(name.lower()):
            if len({video.size for video in found}) > 1:
                both = " and ".join(video.member or str(video.file) for video in found[:2])
                return None, f"two videos have the same name: {both}"
            return found[0], ""
    return None, f"video is missing: {name}"


def check_videos(videos: Sequence[VideoFile]) -> list[tuple[str, Inspection]]:
    """Check videos, which are all on disk or all in one zip file, and unpack the latter. Returns results by key."""
    if videos[0].archive is None:
        return [(video.key, _check(video)) for video in videos]
    with open_archive(videos[0].archive) as opened:
        return [(video.key, _unpack(opened, video)) for video in videos]


def _unpack(opened: zipfile.ZipFile, video: VideoFile) -> Inspection:
    """Write one video of a zip file to its target and check it; removes the target if the video cannot be used."""
    try:
        member = opened.open(video.member)
    except UNPACK_ERRORS as error:
        return Inspection(error=f"video cannot be unpacked: {video.member} ({error})")
    try:
        with member, atomic_write(video.file, "wb", sync=False) as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return Inspection(error=f"video cannot be unpacked: {video.member} ({error})")
    result = _check(video)
    if result.error:
        video.file.unlink(missing_ok=True)
    return result


def _check(video: VideoFile) -> Inspection:
    return Inspection(*check_video(video.file, str(video.file)))
