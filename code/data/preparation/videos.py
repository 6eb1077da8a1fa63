"""Video files of a data set: their endings, their real duration, their paths in a row."""

import os
from pathlib import Path
from typing import BinaryIO

VIDEO_ENDINGS = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"),
    *(".ts", ".m2ts", ".mts", ".flv", ".wmv", ".3gp", ".mpg", ".mpeg", ".vob", ".ogv", ".gif"),
)
"""Of a video beside its JSON, in any case of letters; where there are several, the first of these is used."""


class Slice:
    """A read-only window on one member of an open tar file, for readers that want a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        count = left if count < 0 else min(count, left)
        self.file.seek(self.offset + self.position)
        data = self.file.read(count)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True


def measure(source: str | Path | Slice, name: str) -> float:
    """The real duration in seconds of a video. Raises InputError."""
    from qwen_vl_streaming.video.index import index_video  # brings in PyAV, which most runs do without

    return index_video(source, name).duration


def relative(path: Path, root: Path) -> str:
    """`path` as seen from the project's `root`, with forward slashes."""
    return Path(os.path.relpath(path, root)).as_posix()
