"""Prepares frames that arrive one by one: each is half of a clip, and two are joined to what `clip_pixels` gives.

Needs no tensors on the way from a frame to a clip: they take long to start with after a pause.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32}
"""Integers of the size of a floating-point number, which NumPy may not have."""


class FramePatches:
    """Prepares frames that arrive one by one: `join_frames` of two gives exactly the values of `clip_pixels`, rounded
    to `dtype` if that is not float32. Each is looked up."""

    def __init__(self, processor, dtype: torch.dtype = torch.float32):
        video = processor.video_processor
        values = video.rescale_and_normalize(
            torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256),
            video.do_rescale,
            video.rescale_factor,
            video.do_normalize,
            tuple(video.image_mean),
            tuple(video.image_std),
        )
        self.table = values[0, :, 0].to(dtype).contiguous().view(BITS[dtype.itemsize]).numpy()
        """(3, 256), the bits of each value of each channel."""
        self.side, self.merge = video.patch_size, video.merge_size

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Half of a clip, from `frame` (3, height, width) uint8, already resized: a view (rows, columns, merge, merge,
        3, side), whose items are the rows of patches. They move as one, which is faster than pixel by pixel."""
        bits = np.empty(frame.shape, self.table.dtype)
        for values, channel, found in zip(self.table, frame, bits, strict=True):
            np.take(values, channel, out=found, mode="clip")
        side, merge = self.side, self.merge
        rows, columns = (length // (side * merge) for length in frame.shape[1:])
        items = bits.view(f"V{side * bits.itemsize}")
        return items.reshape(len(frame), rows, merge, side, columns, merge).transpose(1, 4, 2, 5, 0, 3)


def join_frames(halves: Sequence[np.ndarray], memory: np.ndarray | None = None) -> np.ndarray:
    """The clip whose `halves` are those of its frames: the bytes of (patches, pixels of a patch), in the first ones of
    `memory` if that is given."""
    *patches, items = halves[0].shape
    size = sum(half.nbytes for half in halves)
    joined = np.empty(size, np.uint8) if memory is None else memory[:size]
    clip = joined.view(halves[0].dtype).reshape(*patches, len(halves), items)
    for place, half in enumerate(halves):
        clip[..., place, :] = half
    return joined.reshape(math.prod(patches[:-1]), -1)


def split_frames(clip: Tensor, dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    """The two halves of a clip in `dtype`, from which `join_frames` makes it: (patches, 3, 1), in which each item is a
    channel of a patch."""
    rows = clip.to(dtype).view(torch.uint8).numpy()
    items = rows.view(f"V{rows.shape[1] // 6}").reshape(len(clip), 3, 2, 1)
    return [items[:, :, 0], items[:, :, 1]]
