"""Runs the vision tower: on a GPU on a CUDA stream of its own, replaying CUDA graphs. Knows nothing about when a clip
is due."""

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..timeline.timeline import Layout
from .cuda_graph import capture
from .device_event import DeviceEvent


@dataclass(frozen=True)
class ClipFeatures:
    """The visual tokens of a clip, which may still be being computed."""

    tokens: Tensor
    """(tokens of a clip, C). Call `ready.stream_wait(tokens)` before a stream reads them."""
    ready: DeviceEvent


class VisionEncoder:
    """The vision tower of `model`."""

    def __init__(self, model):
        self.model, self.on_cuda = model, model.device.type == "cuda"
        self.stream = torch.cuda.Stream(model.device) if self.on_cuda else None
        self.graphs: dict[tuple[int, int], dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Any]]] = {}
        """By grid and number of clips: the graph, its input pixels, its output tokens, and the layout that it reads."""
        if self.on_cuda:
            model.settle_tower()

    @torch.no_grad()
    def capture(self, grid: tuple[int, int], sizes: Sequence[int] = (1, 2, 4)) -> None:
        """Captures a CUDA graph for each number of clips of `grid` in `sizes`. Does nothing on the CPU."""
        if self.stream is None:
            return
        visual = self.model.model.visual
        shape = grid[0] * grid[1] * visual.spatial_merge_size**2, visual.patch_embed.proj.weight[0].numel()
        for size in sizes:
            pixels = torch.zeros(size, *shape, dtype=self.model.dtype, device=self.model.device)
            # Graphs captured on one stream share cuBLAS's workspace. This one runs at the same time as others.
            graph, tokens = capture(functools.partial(self.model.perceive, pixels, grid), self.stream)
            self.graphs.setdefault(grid, {})[size] = graph, pixels, tokens, self.model.tower_layout([(size, *grid)])

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor], layouts: Sequence[Layout]) -> list[ClipFeatures]:
        """Encodes `clips`. Each is (patches, pixels of a patch) or already (tokens of a clip, C). Does not block the
        host."""
        tokens: dict[int, Tensor] = {}
        on_device = [clip for clip in clips if clip.is_cuda]
        if self.stream is not None and on_device:  # another stream made them, and may also free them
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
            for clip in on_device:
                clip.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            pixels = collections.defaultdict(list)
            for i, (clip, layout) in enumerate(zip(clips, layouts, strict=True)):
                if len(clip) == layout.tokens_per_clip:
                    tokens[i] = self._to_device(clip)
                else:
                    pixels[layout.grid].append(i)
            for grid, waiting in pixels.items():
                while waiting:
                    sizes = [size for size in self.graphs.get(grid, ()) if size <= len(waiting)]
                    count = max(sizes, default=len(waiting))
                    batch, waiting = waiting[:count], waiting[count:]
                    encoded = self._perceive(torch.stack([self._to_device(clips[i]) for i in batch]), grid)
                    tokens |= dict(zip(batch, encoded, strict=True))
            ready = DeviceEvent(self.model.device)
        return [ClipFeatures(tokens[i], ready) for i in range(len(clips))]

    def _perceive(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        captured = self.graphs.get(grid, {}).get(len(pixels))
        if captured is None:
            return self.model.perceive(pixels, grid)
        graph, graph_pixels, graph_tokens, _ = captured
        graph_pixels.copy_(pixels)
        graph.replay()
        return graph_tokens.clone()

    def _to_device(self, clip: Tensor) -> Tensor:
        """Moves a clip to the model's device and type without blocking the host."""
        if self.on_cuda and not (clip.is_cuda or clip.is_pinned()):
            clip = clip.to(self.model.dtype).pin_memory()
        return clip.to(self.model.device, non_blocking=self.on_cuda).to(self.model.dtype)
