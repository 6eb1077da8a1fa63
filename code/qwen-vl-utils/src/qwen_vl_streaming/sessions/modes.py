"""Opens a session in one of the execution modes."""

from collections.abc import Callable

from ..common.errors import InputError
from ..model.prompts import Template
from ..timeline.timeline import Layout
from ..timeline.variants import Variant
from .fused import FusedSession
from .pipelined import PipelinedSession
from .record import MODES
from .session import Session


def open_session(
    model, variant: Variant, template: Template, layout: Layout, *, mode: str = "serial", **options
) -> Session:
    """Open a Session that runs in `mode`, with `options` as in `Session`; "pipelined" also needs `perception_client`.
    Raises InputError for an unknown mode, and as `Session` does."""
    classes: dict[str, Callable[..., Session]] = {each.mode: each for each in (Session, FusedSession, PipelinedSession)}
    if mode not in classes:
        raise InputError(f"unknown execution mode {mode!r}: choose one of {', '.join(MODES)}")
    return classes[mode](model, variant, template, layout, **options)
