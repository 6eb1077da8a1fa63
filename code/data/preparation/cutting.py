"""Cuts parts out of videos, as files of their own. Does not depend on rows."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file
from qwen_vl_streaming.video.index import index_video
from qwen_vl_streaming.video.readers import ReaderError, decoded, upright

CLOCK = 90_000
"""Ticks per second of the files written."""

Part = tuple[float, float, Path]
"""Start and end in seconds from the video's first frame, and the file to write."""


def cut_parts(task: tuple[Path, Sequence[Part]]) -> list[tuple[Path, str]]:
    """Write `parts` of the video at `path`, which are a task's two items, as MP4 files. Returns for each its file and
    the reason if it could not be written. The frame on screen at a part's start is its first; files that exist are
    kept."""
    path, parts = task
    found = [(target, "") for _, _, target in parts if target.exists()]
    wanted = sorted(part for part in parts if not part[2].exists())
    try:
        for start, end, target in wanted:
            write_file(target, _encode_part(path, start, end))
            found.append((target, ""))
    except (InputError, ReaderError, av.FFmpegError) as error:
        done = {target for target, _ in found}
        reason = f"video cannot be cut: {path}: {error}"
        found += [(target, reason) for _, _, target in wanted if target not in done]
    return found


def _encode_part(path: Path, start: float, end: float) -> bytes:
    index = index_video(path)
    first = max(0, int(np.searchsorted(index.times, start, side="right")) - 1)
    last = int(np.searchsorted(index.times, end, side="left")) - 1
    if last < first or start >= index.duration:
        raise InputError(f"the part from {start:g} to {end:g} s has no frame: the video has {index.duration:.2f} s")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=max(1, round(index.fps)), options={"crf": "20"})
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, CLOCK)
        stream.codec_context.time_base = stream.time_base
        for place, frame in decoded(path, index, last):
            if place < first:
                continue
            image = upright(frame)
            height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
            if place == first:
                stream.width, stream.height = width, height
            new = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
            new.pts, new.time_base = round(max(0.0, index.times[place] - start) * CLOCK), stream.time_base
            container.mux(stream.encode(new))
        container.mux(stream.encode())
    return buffer.getvalue()
