"""Shared memory through which the pixels of clips reach a model process: the pipe carries only the number of a buffer.

The memory has no name, so that it is freed when both processes have ended, however they end, and it does not count
towards /dev/shm. The buffers are used again and again: the reader copies a clip out of its buffer at once, and sends
the buffer's number back. Knows nothing else about clips.
"""

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

    def __getstate__(self) -> tuple:
        return DupFd(self.file), self.free, self.dtype, self.memory.shape

    def __setstate__(self, state: tuple) -> None:
        file, self.free, self.dtype, shape = state
        self.file = file.detach()
        self._map(*shape)
        os.close(self.file)

    def _clip(self, number: int, shape: Sequence[int]) -> Tensor:
        """The clip of `shape` in a buffer."""
        return self.memory[number, : math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(*shape)

    # The writing process

    def handed_over(self) -> None:
        """The reading process has started: close what only it needs, so that its end is noticed."""
        self.free.close()
        os.close(self.file)

    def write(self, pixels: Tensor) -> int:
        """Copy `pixels`, of any dtype, into a buffer, once one is free. Returns its number. Raises EOFError or OSError
        if the reader has ended."""
        number = self.unused.pop() if self.unused else self.freed.recv_bytes()[0]
        self._clip(number, pixels.shape).copy_(pixels)
        return number

    # The reading process

    def read(self, number: int, shape: tuple[int, int], pinned: bool) -> Tensor:
        """Copy a clip of `shape` out of its buffer, into `pinned` memory if a GPU is to read it, and free the
        buffer."""
        pixels = torch.empty(shape, dtype=self.dtype, pin_memory=pinned)
        pixels.copy_(self._clip(number, shape))
        self.free.send_bytes(bytes([number]))
        return pixels
