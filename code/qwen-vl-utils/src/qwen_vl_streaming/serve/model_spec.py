"""What a model process loads, and for how many sessions."""

from dataclasses import dataclass

import torch

from ..model.prompts import Template
from ..timeline.timeline import Layout


@dataclass(frozen=True)
class ModelSpec:
    name: str
    path: str
    variant: str
    mode: str
    """The execution mode of its sessions, one of `sessions.MODES`."""
    device: str
    dtype: torch.dtype
    weights: str | None
    sessions: int
    limits: dict
    """max_clips, max_new_tokens and window of a stream."""
    tokens_after_end: int
    """Tokens written at most once the last clip has come."""
    template: Template
    largest: Layout
    """The layout with the longest prompt and the largest clips of a stream."""
    clip_tokens: int
    """Visual tokens of the largest clips, those of short recordings."""
    clip_bytes: int
    """Of the pixels of such a clip."""
    common: tuple[Layout, ...]
    """Layouts of common sources, the first of which a chunk of the pool is made for."""
