"""Computes a recorded session again without the engine, and compares every token. Knows nothing about time."""

from .clips import check_clips, video_clips
from .compare import Difference, replay

__all__ = ["Difference", "check_clips", "replay", "video_clips"]
