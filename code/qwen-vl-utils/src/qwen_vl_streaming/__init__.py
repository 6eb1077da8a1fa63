"""Qwen2.5-VL that writes its answer while the video is still arriving.

    from qwen_vl_streaming import Captioner

    for piece in Captioner("MODEL").watch("film.mp4"):
        print(piece.text, end="", flush=True)

The names below are the public ones. The rooms of the library are for those who change it; see docs/architecture.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .captioner import Captioner, Piece
    from .common.errors import InputError
    from .sessions import SessionPool, open_session
    from .timeline.variants import VARIANTS, Variant
    from .video.opening import Source
    from .video.sources import Clip

_HOMES = {
    "Captioner": "captioner",
    "Clip": "video.sources",
    "InputError": "common.errors",
    "Piece": "captioner",
    "SessionPool": "sessions",
    "Source": "video.opening",
    "VARIANTS": "timeline.variants",
    "Variant": "timeline.variants",
    "open_session": "sessions",
}
__all__ = [
    "VARIANTS",
    "Captioner",
    "Clip",
    "InputError",
    "Piece",
    "SessionPool",
    "Source",
    "Variant",
    "open_session",
]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: PyTorch takes seconds, and some programs do without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
