"""Saves the input frames of a live session to a file that grows clip by clip. Does not depend on sessions."""

import contextlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..common.errors import InputError

HEADER = 512
"""Bytes before the frames: the safetensors header with the frame count, padded so that it can be rewritten in place."""


class ClipRecorder:
    """Writes frames to a safetensors file that is valid after each clip. `read_clips` reads it."""

    def __init__(self, path: str | Path):
        self.path, self.count = Path(path), 0

    def add(self, frames: Tensor) -> None:
        """Append the frames of one clip, (2, 3, H, W) uint8. Raises InputError if they cannot be written; earlier
        frames are kept."""
        size, shape = frames[0].numel(), [self.count + len(frames), *frames.shape[1:]]
        about = {"frames": {"dtype": "U8", "shape": shape, "data_offsets": [0, math.prod(shape)]}}
        text = json.dumps(about).ljust(HEADER - 8).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "r+b" if self.count else "wb") as file:
                file.seek(HEADER + self.count * size)
                file.write(frames.numpy().tobytes())
                file.flush()
                file.seek(0)
                file.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            with contextlib.suppress(OSError):
                if self.count:
                    os.truncate(self.path, HEADER + self.count * size)
                else:
                    self.path.unlink()
            raise InputError(
                f"{self.path} cannot be written ({error}): free some space or give another path"
            ) from error
        self.count += len(frames)


def read_clips(path: str | Path) -> Tensor:
    """The recorded frames, (2 N, 3, H, W) uint8. Raises InputError, naming the file, if it was not written by
    ClipRecorder."""
    try:
        frames = load_file(path).get("frames")
    except (OSError, SafetensorError) as error:
        raise InputError(f"clips {path} cannot be read ({error}): give a file written by --keep") from error
    if frames is None or frames.dtype != torch.uint8 or frames.dim() != 4:
        raise InputError(f"clips {path} has no frames: give a file written by --keep")
    return frames
