"""Video files: their suffixes, their duration, whether they decode, and their paths in rows."""

import os
from pathlib import Path
from typing import BinaryIO

from qwen_vl_streaming.common.errors import InputError

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"),
    *(".ts", ".m2ts", ".mts", ".flv", ".wmv", ".3gp", ".mpg", ".mpeg", ".vob", ".ogv", ".gif"),
)
"""In lower case; matched case-insensitively. Of several videos of one sample, the first in this order is used."""
TOLERANCE = 1.0  # seconds by which a video may be shorter or longer than its JSON says


class Seekable:
    """The position in a file of `size` bytes."""

    size: int
    position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True


class FileSlice(Seekable):
    """A read-only, seekable view of `size` bytes of an open file from `offset` on, such as a member of a tar file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size = file, offset, size

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        count = left if count < 0 else min(count, left)
        self.file.seek(self.offset + self.position)
        data = self.file.read(count)
        self.position += len(data)
        return data


def video_duration(source: str | Path | FileSlice, name: str) -> float:
    """The duration of a video in seconds; `name` is used in messages. Raises InputError if it cannot be read."""
    from qwen_vl_streaming.video.index import index_video  # imports PyAV, which most runs do not need

    return index_video(source, name).duration


def check_video(source: str | Path | FileSlice, name: str) -> tuple[float, str]:
    """Read a video's duration and decode its first frame.

    Returns (seconds, ""), or (0.0, reason) if the video cannot be used.
    """
    from qwen_vl_streaming.video.readers import check_first_frame

    try:
        seconds = video_duration(source, name)
        check_first_frame(source, name)
    except InputError as error:
        return 0.0, "video cannot be used: " + " ".join(str(error).split())
    return seconds, ""


def compare_duration(seconds: float, expected: float) -> str:
    """Why a video of `seconds` is not the one whose JSON says `expected` seconds, or an empty string."""
    if abs(seconds - expected) <= TOLERANCE:
        return ""
    how = "shorter" if seconds < expected else "longer"
    return f"video is {how} than its JSON says: {seconds:.2f} s instead of {expected:.2f} s"


def relative_path(path: Path, root: Path) -> str:
    """`path` relative to the project's `root`, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()
