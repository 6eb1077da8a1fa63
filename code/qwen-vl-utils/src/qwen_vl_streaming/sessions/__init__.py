"""How one stream, or many, run in real time: when a slot begins, who perceives, what is recorded. Knows nothing of
files, cameras and terminals."""

from collections.abc import Callable

from ..common.errors import InputError
from ..model.prompts import Template
from ..timeline.timeline import Layout
from ..timeline.variants import Variant
from .fused import FusedSession
from .pipelined import PipelinedSession
from .record import WAYS
from .session import Session


def open_session(model, variant: Variant, template: Template, layout: Layout, *, way: str = "serial", **options):
    """A Session that runs in `way`; `options` as its own. For "pipelined", `pair` is the Pair to run on."""
    kinds: dict[str, Callable[..., Session]] = {kind.way: kind for kind in (Session, FusedSession, PipelinedSession)}
    if way not in kinds:
        raise InputError(f"unknown way {way!r}: choose one of {', '.join(WAYS)}")
    return kinds[way](model, variant, template, layout, **options)
