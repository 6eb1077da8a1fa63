"""Shared memory through which the pixels of clips reach a model process: the pipe carries only the number of a buffer.

The memory has no name, so that it is freed when both processes have ended, however they end, and it does not count
towards /dev/shm. The buffers are used again and again: the reader copies a clip out of its buffer at once, and sends
the buffer's number back. The one that was read last is written next, because caches may still hold it.
"""

import mmap
import os
import select
from collections.abc import Sequence
from multiprocessing.connection import Pipe
from multiprocessing.reduction import DupFd

import numpy as np
import torch
from torch import Tensor

from ..model.frame_patches import join_frames

BUFFERS = 8
"""Clips that may have been written and not read. The reader needs well under a millisecond for each."""


class PixelBuffers:
    """Made by the writing process, which gives it to the reading one at its start and then calls `handed_over`."""

    def __init__(self, clip_bytes: int, dtype: torch.dtype, count: int = BUFFERS):
        """`clip_bytes`: of the largest clip, in `dtype`, that of the reader's clips. Memory is taken as far as clips
        fill it."""
        self.dtype = dtype
        self.file = os.memfd_create("clips")
        os.ftruncate(self.file, count * clip_bytes)
        self.freed, self.free = Pipe(duplex=False)
        self.any_freed = select.poll()
        self.any_freed.register(self.freed, select.POLLIN)
        self._map(count, clip_bytes)

    def _map(self, count: int, clip_bytes: int) -> None:
        self.memory = np.frombuffer(mmap.mmap(self.file, count * clip_bytes), np.uint8).reshape(count, clip_bytes)
        self.unused = [*range(count)]

    def __getstate__(self) -> tuple:
        return DupFd(self.file), self.free, self.dtype, self.memory.shape

    def __setstate__(self, state: tuple) -> None:
        file, self.free, self.dtype, shape = state
        self.file = file.detach()
        self._map(*shape)
        os.close(self.file)

    # The writing process

    @property
    def any_free(self) -> bool:
        """`write` needs no wait."""
        return bool(self.unused or self.any_freed.poll(0))

    def handed_over(self) -> None:
        """The reading process has started: close what only it needs, so that its end is noticed."""
        self.free.close()
        os.close(self.file)

    def write(self, halves: Sequence[np.ndarray]) -> tuple[int, tuple[int, int]]:
        """Join the halves of a clip, as `join_frames` takes them, in a buffer, once one is free. Returns its number and
        the clip's shape, (patches, pixels of a patch). Raises EOFError or OSError if the reader has ended."""
        while self.any_freed.poll(0) or not self.unused:
            if not (numbers := os.read(self.freed.fileno(), len(self.memory))):
                raise EOFError
            self.unused += numbers
        number = self.unused.pop()
        patches, size = join_frames(halves, self.memory[number]).shape
        return number, (patches, size // self.dtype.itemsize)

    # The reading process

    def read(self, number: int, shape: tuple[int, int], pinned: bool) -> Tensor:
        """Copy a clip of `shape` out of its buffer, into `pinned` memory if a GPU is to read it."""
        clip = torch.empty(shape, dtype=self.dtype, pin_memory=pinned)
        copied = clip.view(torch.uint8).numpy().reshape(-1)
        copied[:] = self.memory[number, : copied.size]  # in this thread alone
        return clip

    def release(self, number: int) -> None:
        """Free a buffer that was read."""
        os.write(self.free.fileno(), bytes([number]))
