"""Shared memory through which the pixels of clips reach a model process: the pipe carries only the number of a buffer.

The memory has no name, so that it is freed when both processes have ended, however they end, and it does not count
towards /dev/shm. The buffers are used again and again: the reader copies a clip out of its buffer at once, and sends
the buffer's number back. Knows nothing else about clips.
"""

import functools
import math
import mmap
import os
from collections.abc import Sequence
from multiprocessing.connection import Pipe
from multiprocessing.reduction import DupFd

import torch
from torch import Tensor

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
        self._map(count, clip_bytes)

    def _map(self, count: int, clip_bytes: int) -> None:
        self.memory = torch.frombuffer(mmap.mmap(self.file, count * clip_bytes), dtype=torch.uint8)
        self.memory = self.memory.view(count, clip_bytes)
        self.unused = [*range(count)]
        # Each of its operations would let another thread have Python's lock.
        self._clip = functools.lru_cache(4 * count)(self._find)

    def __getstate__(self) -> tuple:
        return DupFd(self.file), self.free, self.dtype, self.memory.shape

    def __setstate__(self, state: tuple) -> None:
        file, self.free, self.dtype, shape = state
        self.file = file.detach()
        self._map(*shape)
        os.close(self.file)

    def _find(self, number: int, shape: Sequence[int]) -> Tensor:
        """The clip of `shape` in a buffer."""
        return self.memory[number, : math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(*shape)

    # The writing process

    def handed_over(self) -> None:
        """The reading process has started: close what only it needs, so that its end is noticed."""
        self.free.close()
        os.close(self.file)

    def write(self, halves: Sequence[Tensor]) -> tuple[int, tuple[int, int]]:
        """Join the halves of a clip, (patches, channels, pixels of a patch) of any dtype, in a buffer, once one is
        free. Returns its number and the clip's shape. Raises EOFError or OSError if the reader has ended."""
        patches, channels, pixels = halves[0].shape
        while not self.unused:
            if not (numbers := os.read(self.freed.fileno(), len(self.memory))):
                raise EOFError
            self.unused += numbers
        number = self.unused.pop()
        clip = self._clip(number, (patches, channels, len(halves), pixels))
        for place, half in enumerate(halves):
            clip[:, :, place].copy_(half)
        return number, (patches, channels * len(halves) * pixels)

    # The reading process

    def read(self, number: int, shape: tuple[int, int], pinned: bool) -> Tensor:
        """Copy a clip of `shape` out of its buffer, into `pinned` memory if a GPU is to read it."""
        return torch.empty(shape, dtype=self.dtype, pin_memory=pinned).copy_(self._clip(number, shape))

    def release(self, number: int) -> None:
        """Free a buffer that was read."""
        os.write(self.free.fileno(), bytes([number]))
