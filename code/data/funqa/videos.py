"""Where FunQA's videos lie, as files or in zip files on disk or on the hub, and how long they last.

Knows nothing about questions.
"""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from preparation.files import whole_file
from preparation.parallel import run_tasks
from preparation.remote_file import HubFault
from preparation.videos import VIDEO_ENDINGS, measure
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.progress import Progress

VIDEOS_PER_TASK = 32
UNPACK_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)
"""What zipfile raises for a damaged, an encrypted or an exotic member."""


@dataclass(frozen=True)
class Archive:
    """A zip file."""

    path: str
    """On disk; on the hub, its path in the repository."""
    stamp: str
    """Changes when its content does."""
    repository: str = ""
    """On the hub: the dataset and its revision, as "owner/name@commit"."""
    size: int = 0
    """Bytes, on the hub."""


@dataclass(frozen=True)
class Place:
    """Where one video lies."""

    file: Path
    """Where it is, or where it goes when it has been unpacked."""
    stamp: str
    size: int
    archive: Archive | None = None
    member: str = ""

    @property
    def key(self) -> str:
        archive = self.archive
        return "\0".join([str(self.file), self.stamp, *((archive.repository, archive.path) if archive else ())])


@dataclass(frozen=True)
class Measured:
    """What is known of a video once it was looked at."""

    seconds: float = 0.0
    fault: str = ""


@contextmanager
def open_archive(archive: Archive) -> Iterator[zipfile.ZipFile]:
    """Open a zip file, wherever it is. Raises InputError where it is none, or the hub does not answer."""
    try:
        if archive.repository:
            from preparation.remote_file import RemoteFile

            file = RemoteFile(archive.repository, archive.path, archive.size)
        else:
            file = open(archive.path, "rb")  # noqa: SIM115 - closed below, as the remote one is
        with file, zipfile.ZipFile(file) as opened:
            yield opened
    except HubFault as error:
        raise InputError(str(error)) from error
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{archive.path} cannot be read as a zip file ({error}): download it again") from error


def places_on_disk(files: list[tuple[Path, os.stat_result]]) -> dict[str, list[Place]]:
    """The videos among `files`, by name in small letters."""
    places: dict[str, list[Place]] = {}
    for path, status in files:
        if path.suffix.lower() in VIDEO_ENDINGS:
            place = Place(path, f"{status.st_size}:{status.st_mtime_ns}", status.st_size)
            places.setdefault(path.name.lower(), []).append(place)
    return places


def places_in(archive: Archive, folder: Path) -> dict[str, list[Place]]:
    """The videos in a zip file, by name in small letters; unpacked, they go into `folder`. Raises InputError."""
    places: dict[str, list[Place]] = {}
    with open_archive(archive) as opened:
        for member in opened.infolist():
            name = PurePosixPath(member.filename).name
            if PurePosixPath(name).suffix.lower() in VIDEO_ENDINGS and not name.startswith("._"):
                place = Place(
                    folder / name, f"{archive.stamp}:{member.CRC}", member.file_size, archive, member.filename
                )
                places.setdefault(name.lower(), []).append(place)
    return places


def choose(name: str, sources: list[dict[str, list[Place]]]) -> tuple[Place | None, str]:
    """The place of the video called `name` in the first of `sources` that has it, or why there is none."""
    for places in sources:
        if found := places.get(name.lower()):
            if len({place.size for place in found}) > 1:
                both = " and ".join(place.member or str(place.file) for place in found[:2])
                return None, f"two videos of one name: {both}"
            return found[0], ""
    return None, f"video is missing: {name}"


def look_at(places: list[Place], state: Path, workers: int, label: str) -> dict[Place, Measured]:
    """Unpack those of `places` that are in zip files, measure all and decode a frame of each.

    What an earlier run has found is in the file `state`, and is not done again. Raises InputError where the hub does
    not answer or the disk is full; what was finished by then is kept.
    """
    known = _load(state)
    with whole_file(state, sync=False) as file:  # without a line that a killed run left half-written
        file.writelines(_line(key, measured) for key, measured in known.items())
    done = {place: known[place.key] for place in places if place.key in known and _still_there(place, known[place.key])}
    todo = sorted((place for place in places if place not in done), key=_order)
    tasks: list[list[Place]] = []
    for place in todo:  # a task opens one zip file
        if not tasks or len(tasks[-1]) == VIDEOS_PER_TASK or tasks[-1][0].archive != place.archive:
            tasks.append([])
        tasks[-1].append(place)
    if not tasks:
        return done
    with (
        open(state, "a", encoding="utf-8", newline="\n") as journal,
        Progress(total=len(todo), unit="video", desc=f"{label} videos") as bar,
        closing(run_tasks(look_at_some, tasks, min(workers, len(tasks)), _no_preparation)) as results,
    ):
        for result in results:
            journal.writelines(_line(place.key, measured) for place, measured in result)
            journal.flush()
            done.update(result)
            bar.update(len(result))
    return done


def look_at_some(places: list[Place]) -> list[tuple[Place, Measured]]:
    """Measure videos that are files, or all in one zip file."""
    if places[0].archive is None:
        return [(place, _measure(place)) for place in places]
    with open_archive(places[0].archive) as opened:
        return [(place, _unpack(opened, place)) for place in places]


def _unpack(opened: zipfile.ZipFile, place: Place) -> Measured:
    """Write one video out of a zip file and measure it; nothing is left of one that cannot be used."""
    try:
        member = opened.open(place.member)
    except UNPACK_ERRORS as error:
        return Measured(fault=f"video cannot be unpacked: {place.member} ({error})")
    try:
        with member, whole_file(place.file, "wb", sync=False) as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return Measured(fault=f"video cannot be unpacked: {place.member} ({error})")
    measured = _measure(place)
    if measured.fault:
        place.file.unlink(missing_ok=True)
    return measured


def _measure(place: Place) -> Measured:
    from qwen_vl_streaming.video.readers import check_first_frame

    try:
        seconds = measure(place.file, str(place.file))
        check_first_frame(place.file, str(place.file))
    except InputError as error:
        return Measured(fault="video cannot be used: " + " ".join(str(error).split()))
    return Measured(seconds)


def _still_there(place: Place, measured: Measured) -> bool:
    if measured.fault or place.archive is None:
        return True
    return place.file.is_file() and place.file.stat().st_size == place.size


def _order(place: Place) -> tuple[str, str]:
    return (place.archive.path if place.archive else "", str(place.file))


def _load(state: Path) -> dict[str, Measured]:
    known = {}
    for line in state.read_text(encoding="utf-8").splitlines() if state.is_file() else ():
        try:
            key, seconds, fault = json.loads(line)
        except ValueError:
            continue
        known[key] = Measured(seconds, fault)
    return known


def _line(key: str, measured: Measured) -> str:
    return json.dumps([key, measured.seconds, measured.fault]) + "\n"


def _no_preparation() -> None:
    pass
