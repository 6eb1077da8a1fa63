"""Resolves paths given by the user: files, folders, checkpoints, and the videos of a data set.

All programs use these functions, so a path means the same everywhere. Independent of the programs.
"""

import os
import re
from collections.abc import Iterable
from os.path import exists
from pathlib import Path, PurePosixPath

from .errors import InputError
from .tables import HUB, PARQUET, matching_files

PROJECT = Path(__file__).resolve().parents[5]
"""The root of the project, which contains this library at code/qwen-vl-utils/src."""
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
DATA_FLAGS = {"train_3_5.jsonl": "", "test_3_5.jsonl": "", "funqa_train.jsonl": "funqa", "funqa_test.jsonl": "funqa"}
"""The files that mani_data.py writes, and the value of --dataset for each. Empty: no flag."""


def places(path: str | Path, root: Path) -> list[Path]:
    """Returns where `path` is searched, in order: relative to the working directory, to the project's `root`, and to
    code/ below `root`."""
    return list(dict.fromkeys((Path(path), root / path, root / "code" / path)))


def find_path(path: str | Path, root: Path, what: str, *more: Path, fix: str = "check the path") -> Path:
    """Returns the first path that exists among the `places` of `path` and `path` in each of the folders `more`.

    Raises InputError if none exists. Its message names the missing item with `what` and the solution with `fix`.
    """
    for candidate in (*places(path, root), *(folder / path for folder in more)):
        if exists(candidate):  # also False, without an error, if permission is denied
            return candidate
    if Path(path).is_absolute():
        where = "missing"
    else:
        first, *others = dict.fromkeys(map(str, (Path.cwd(), root.absolute(), root.absolute() / "code", *more)))
        where = f"not in {first} or in {' or in '.join(others)}" if others else f"not in {first}"
    raise InputError(f"{what} {str(path)!r} is {where}: {fix}")


def look_up(path: str | Path, root: Path) -> Path:
    """Returns the first of the `places` of `path` that exists, else `path`. The caller must report a missing file."""
    return next(filter(exists, places(path, root)), Path(path))


def find_video_root(path: str, root: Path) -> Path | None:
    """Finds a folder like `find_path`. Returns None if `path` is blank. Raises InputError if it is not a folder."""
    if not path.strip():
        return None
    found = find_path(path, root, "the video root")
    if not os.path.isdir(found):
        raise InputError(f"the video root {str(found)!r} is not a folder: give a folder")
    return found


def find_data(path: str, root: Path, what: str) -> str:
    """Finds a data set for `read_data_rows`. Returns its absolute path, searched like in `find_path`, or the name of a
    data set on the Hub unchanged.

    Raises InputError if the file does not exist or is empty, or if the folder has no data set. For files of
    mani_data.py, the message states the command that creates them.
    """
    if path.startswith(HUB):
        return path
    if path.endswith(PARQUET) and "*" in path:
        found = next((place for place in places(path, root) if matching_files(place)), None)
        if found is None:
            raise InputError(f"{what} {path!r} matches no file: check the pattern")
        return os.path.abspath(found)
    make = make_data(path)
    found = find_path(path, root, what, fix=make or "check the path, or create it with `python mani_data.py`")
    if os.path.isdir(found):
        if not any(exists(found / name) for name in ("state.json", "dataset_dict.json")):
            raise InputError(
                f"{what} {str(found)!r} is a folder that was not written by `Dataset.save_to_disk`: give a file, or "
                "a pattern such as 'data/train-*.parquet'"
            )
    elif not os.path.isfile(found):
        raise InputError(f"{what} {str(found)!r} cannot be read (it is not a file): give a JSON Lines file")
    elif not os.path.getsize(found):
        raise InputError(f"{what} {str(found)!r} is empty: {make or 'give a file with rows'}")
    return os.path.abspath(found)


def make_data(path: str | Path) -> str:
    """Returns advice on how to create `path` with mani_data.py, or an empty string for other files."""
    if (name := Path(path).name) not in DATA_FLAGS:
        return ""
    dataset = DATA_FLAGS[name]
    return f"create it with `python mani_data.py{f' --dataset {dataset}' if dataset else ''}`"


def find_model(model: str, root: Path) -> str:
    """Returns the first of the `places` of `model` that exists, as an absolute path, else `model` as an id on the Hub.

    Raises InputError if `model` is neither.
    """
    if not model.strip():
        raise InputError("the model is empty: give a checkpoint's folder or a hub id")
    for candidate in places(model, root):
        if exists(candidate):
            return str(candidate.absolute())
    if not HUB_ID.fullmatch(model):
        find_path(model, root, "the model", fix="check the path, or give a hub id such as Qwen/Qwen2.5-VL-3B-Instruct")
    return model


def find_video(video_path: str | Path, root: Path, video_root: Path | None = None) -> Path:
    """Returns the first path that exists: `video_path` as given, below the project's `root`, below `video_root`, or the
    file name of `video_path` directly in `video_root`. Without `video_root`, only the first two are searched.

    Raises InputError, with the name of the video, if none exists or one cannot be accessed.
    """
    faults = []
    for found in _video_places(video_path, root, video_root):
        try:
            os.stat(found)
            return found
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # for example, a name that is too long or denied permission
            faults.append(getattr(error, "strerror", None) or str(error))
    if faults:
        raise InputError(f"video {video_path!s:.200} cannot be read ({faults[0]}): check its path")
    if Path(video_path).is_absolute():
        looked = f" and is not in {video_root} either" if video_root else ""
    else:
        folders = dict.fromkeys(str(folder.absolute()) for folder in (Path(), root, video_root) if folder)
        looked = " in " + " or in ".join(folders)
    fix = "check the path, put the file there, or give the folder of the videos as the video root (see --help)"
    raise InputError(f"video {video_path} does not exist{looked}: {fix}")


def check_videos(video_paths: Iterable[str], root: Path, video_root: Path | None) -> None:
    """Raises InputError if `find_video` finds the same file for two different `video_paths`, at least one of them by
    its file name alone. One video would silently replace the other."""
    if video_root is None:
        return
    by_name: dict[str, list[str]] = {}
    for path in dict.fromkeys(map(os.path.normpath, video_paths)):
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    for same_name in by_name.values():
        path_of: dict[str, str] = {}  # maps each file to the video_path it was found for
        by_name_alone: set[str] = set()
        for path in same_name if len(same_name) > 1 else ():
            found = [place for place in map(os.path.abspath, _video_places(path, root, video_root)) if exists(place)]
            if not found:
                continue
            if found[0] == os.path.abspath(video_root / PurePosixPath(path).name) != os.path.abspath(video_root / path):
                by_name_alone.add(found[0])
            if (other := path_of.setdefault(found[0], path)) != path and found[0] in by_name_alone:
                raise InputError(
                    f"{other} and {path} in the data both match {found[0]} by file name alone: "
                    "give a video root that has a separate path for each"
                )


def _video_places(video_path: str | Path, root: Path, video_root: Path | None) -> list[Path]:
    candidates = [Path(video_path), root / video_path]
    if video_root is not None:
        candidates += [video_root / video_path, video_root / PurePosixPath(video_path).name]
    return candidates
