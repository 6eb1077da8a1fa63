"""The six variants, each a frozen set of rules. Knows nothing about tensors, token ids or files.

This is the only place that reads `QWEN2_5_VL_VARIANT`.
"""

import os
from dataclasses import dataclass
from typing import Literal

from ..common.errors import InputError

ENVIRONMENT_VARIABLE = "QWEN2_5_VL_VARIANT"


@dataclass(frozen=True)
class Variant:
    """How a variant orders its tokens, attends and counts positions."""

    name: str
    paper: str
    """The name in the paper."""
    streams: bool
    """Text is written while the video arrives. Otherwise the whole video comes first."""
    parallel: bool
    """The visual side never attends to text, so that watching and speaking can run at the same time."""
    count: Literal["stock", "own", "feed", "rounds"]
    """How positions are counted. "stock": as in Qwen2.5-VL. "own": text has its own count. "feed": one count in feed
    order. "rounds": a slot's text and the next clip start at the same position."""
    text_start: int = 0
    """The header's first position, if text has its own count."""

    @property
    def mode(self) -> str:
        """Streaming or Offline, as the paper groups its tables."""
        return "Streaming" if self.streams else "Offline"

    @property
    def method(self) -> str:
        """The paper's name without the mode."""
        return self.paper.removeprefix(f"{self.mode}, ")

    @property
    def after_video(self) -> bool:
        """Whether positions depend on where the video ends: those of the tail, and of text that counts on from it."""
        return self.count in ("stock", "own")


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("origin", "Offline, Origin", streams=False, parallel=False, count="stock"),
        Variant("batch", "Offline, GDPE", streams=False, parallel=False, count="own"),
        Variant("interleave", "Streaming, Interleave", streams=True, parallel=False, count="feed"),
        Variant("overlap", "Streaming, OSPE", streams=True, parallel=True, count="rounds"),
        Variant("group", "Streaming, GDPE", streams=True, parallel=True, count="own"),
        Variant("gap", "Streaming, GIPE", streams=True, parallel=True, count="own", text_start=10_000),
    )
}


def get_variant(name: str) -> Variant:
    """The variant called `name`. Raises InputError, with the six names, for any other."""
    if name not in VARIANTS:
        raise InputError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def chosen_variant(default: str) -> str:
    """The name in `QWEN2_5_VL_VARIANT`, unchecked, or `default` if it is not set."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or default
