"""The vision tower beside everything else: on a GPU on a stream of its own, graphs as CUDA graphs. Knows nothing of
when a clip is looked at."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..timeline.timeline import Layout
from .device_event import DeviceEvent


@dataclass(frozen=True)
class ClipFeatures:
    """A clip that the vision tower has looked at, or is looking at."""

    tokens: Tensor
    """(tokens of a clip, C)"""
    ready: DeviceEvent


class VisionEncoder:
    """The vision tower of `model`."""

    def __init__(self, model):
        self.model, self.on_cuda = model, model.device.type == "cuda"
        self.stream = torch.cuda.Stream(model.device) if self.on_cuda else None
        self.graphs: dict[tuple[int, int], dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]]] = {}
        """By grid and number of clips: what is replayed, where pixels go in and tokens come out."""
        if self.on_cuda:
            model.settle_tower()

    @torch.no_grad()
    def capture(self, grid: tuple[int, int], sizes: Sequence[int] = (1, 2, 4)) -> None:
        """Record the tower over so many clips of `grid` at once. Without a GPU there is nothing to do."""
        visual = self.model.model.visual
        shape = grid[0] * grid[1] * visual.spatial_merge_size**2, visual.patch_embed.proj.weight[0].numel()
        for size in sizes if self.on_cuda else ():
            pixels = torch.zeros(size, *shape, dtype=self.model.dtype, device=self.model.device)
            # Graphs that were captured on one stream share cuBLAS's workspace: beside others, this one needs its own.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    self.model.perceive(pixels, grid)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    tokens = self.model.perceive(pixels, grid)
            torch.cuda.current_stream().wait_stream(self.stream)
            self.graphs.setdefault(grid, {})[size] = graph, pixels, tokens

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor], layouts: Sequence[Layout]) -> list[ClipFeatures]:
        """Look at `clips`, each (patches, pixels of a patch) or, ready, (tokens of a clip, C)."""
        tokens: dict[int, Tensor] = {}
        if near := [clip for clip in clips if clip.is_cuda]:  # made on another stream, which may also free them
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
            for clip in near:
                clip.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            raw = collections.defaultdict(list)
            for i, (clip, layout) in enumerate(zip(clips, layouts, strict=True)):
                if len(clip) == layout.tokens_per_clip:
                    tokens[i] = self._put(clip)
                else:
                    raw[layout.grid].append(i)
            for grid, waiting in raw.items():
                while waiting:
                    sizes = [size for size in self.graphs.get(grid, ()) if size <= len(waiting)]
                    count = max(sizes, default=len(waiting))
                    some, waiting = waiting[:count], waiting[count:]
                    made = self._perceive(torch.stack([self._put(clips[i]) for i in some]), grid)
                    tokens |= dict(zip(some, made, strict=True))
            ready = DeviceEvent(self.model.device)
        return [ClipFeatures(tokens[i], ready) for i in range(len(clips))]

    def _perceive(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        graphs = self.graphs.get(grid, {}).get(len(pixels))
        if graphs is None:
            return self.model.perceive(pixels, grid)
        graph, goes_in, comes_out = graphs
        goes_in.copy_(pixels)
        graph.replay()
        return comes_out.clone()

    def _put(self, clip: Tensor) -> Tensor:
        """On the device and of the model's type, without waiting for what the device is at."""
        if self.on_cuda and not (clip.is_cuda or clip.is_pinned()):
            clip = clip.to(self.model.dtype).pin_memory()
        return clip.to(self.model.device, non_blocking=True).to(self.model.dtype)
