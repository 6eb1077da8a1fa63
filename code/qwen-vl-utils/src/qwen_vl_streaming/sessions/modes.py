"""Opens a session in one of the execution modes."""

from ..common.errors import InputError
from ..common.numbers import shown
from ..model.prompts import Template
from ..timeline.timeline import Layout
from ..timeline.variants import Variant
from .fused import FusedRounds
from .pipelined import PipelinedRounds
from .record import MODES
from .serial import SerialRounds
from .session import Session


def open_session(
    model, variant: Variant, template: Template, layout: Layout, *, mode: str = "serial", **options
) -> Session:
    """Open a Session that runs in `mode`, with `options` as in `Session`; "pipelined" also needs `perception_client`.
    Raises InputError for an unknown mode, and as `Session` does."""
    modes: dict[str, type[SerialRounds]] = {each.mode: each for each in (SerialRounds, FusedRounds, PipelinedRounds)}
    if not isinstance(mode, str) or mode not in modes:
        raise InputError(f"unknown execution mode {shown(mode)}: choose one of {', '.join(MODES)}")
    if mode == "pipelined" and options.get("perception_client") is None:
        raise InputError("a pipelined session needs a second process: pass a PerceptionClient as perception_client")
    return Session(model, variant, template, layout, rounds=modes[mode], **options)
