"""Shared memory through which the pixels of clips reach a model process: the pipe carries only the number of a buffer.

The memory has no name, so that it is freed when both processes have ended, however they end, and it does not count
towards /dev/shm. The buffers are used again and again: the reader copies a clip out of its buffer at once, and sends
the buffer's number back. Knows nothing else about clips.
"""

import mmap
import os
from multiprocessing.connection import Pipe
from multiprocessing.reduction import DupFd

import torch
from torch import Tensor

BUFFERS = 8
"""Clips that may have been written and not read. The reader needs well under a millisecond for each."""


class PixelBuffers:
    """Made by the writing process, which gives it to the reading one at its start and then calls `handed_over`."""

    def __init__(self, clip_bytes: int, count: int = BUFFERS):
        """`clip_bytes`: of the largest clip. Memory is taken as far as clips fill it."""
        self.file = os.memfd_create("clips")
        os.ftruncate(self.file, count * clip_bytes)
        self.freed, self.free = Pipe(duplex=False)
        self._map(count, clip_bytes)

    def _map(self, count: int, clip_bytes: int) -> None:
        self.memory = torch.frombuffer(mmap.mmap(self.file, count * clip_bytes), dtype=torch.uint8)
        self.memory = self.memory.view(count, clip_bytes)
        self.unused = [*range(count)]

    def __getstate__(self) -> tuple:
        return DupFd(self.file), self.free, self.memory.shape

    def __setstate__(self, state: tuple) -> None:
        file, self.free, shape = state
        self.file = file.detach()
        self._map(*shape)
        os.close(self.file)

    # The writing process

    def handed_over(self) -> None:
        """The reading process has started: close what only it needs, so that its end is noticed."""
        self.free.close()
        os.close(self.file)

    def write(self, pixels: Tensor) -> int:
        """Copy `pixels` into a buffer, once one is free. Returns its number. Raises EOFError or OSError if the reader
        has ended."""
        number = self.unused.pop() if self.unused else self.freed.recv_bytes()[0]
        raw = pixels.contiguous().view(-1).view(torch.uint8)
        self.memory[number, : len(raw)].copy_(raw)
        return number

    # The reading process

    def read(self, number: int, shape: tuple[int, int], dtype: torch.dtype, pinned: bool) -> Tensor:
        """Copy a clip of `shape` out of its buffer, into `pinned` memory if a GPU is to read it, and free the
        buffer."""
        pixels = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        raw = pixels.view(-1).view(torch.uint8)
        raw.copy_(self.memory[number, : len(raw)])
        self.free.send_bytes(bytes([number]))
        return pixels
