"""Reads the part of a video that a row names with `video_start` and `video_end`, or the whole video if it names none.

The times of a part count from its start: for models, captions and metrics it is a video of its own. Does not depend on
data sets, tokenizers and variants.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.video_part import part_seconds, video_part
from .frames import Video, read_video
from .index import index_video


def read_part(path: str | Path, row: Mapping[str, Any], **options: Any) -> Video:
    """`read_video` of the part of the video at `path` that `row` names; `options` are its other arguments.

    Raises InputError as `read_video`, `video_part` and `part_seconds` do.
    """
    if not (part := video_part(row)):
        return read_video(path, **options)
    index = index_video(path)
    part_seconds(path, part, index.duration)
    return read_video(path, index=index, **part, **options)
