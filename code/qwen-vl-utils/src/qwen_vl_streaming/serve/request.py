"""What session.update asks for, checked, and what that means for a model. Knows nothing about connections."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..common.data_rows import SURROGATE
from ..common.numbers import is_number
from ..model.prompts import QUESTIONS, Template
from ..timeline.timeline import Layout
from ..video.frames import FRAMES_PER_CLIP
from .catalog import FPS, ServedModel
from .connection import Refused
from .options import Settings

MOST_FRAMES = 10**6
"""Frames of a recording."""


@dataclass(frozen=True)
class Request:
    models: list[ServedModel]
    question: str
    schedules: dict[str, str]
    """By the model's name."""
    source: dict
    """As session.updated repeats it."""
    own_source: str | None
    """The name of a source of the server's own; otherwise the client sends frames:"""
    picture: tuple[int, int]
    """(height, width) of its pictures,"""
    frames: int | None
    """how many there will be, if known,"""
    fps: float
    """and how many a second."""
    keep: bool
    """The viewer agrees that the clips are kept."""


@dataclass(frozen=True)
class Plan:
    """A session of one model."""

    template: Template
    layout: Layout
    limits: dict
    """max_clips, max_new_tokens and window."""
    most: int | None
    """Clips to watch, or None for all."""
    blocks: int
    """Of keys and values."""


def read_request(asked, models: Mapping[str, ServedModel], settings: Settings) -> Request:
    """The request in a client's `asked`, which may be anything. Raises Refused or InputError."""
    if not isinstance(asked, dict):
        raise Refused("invalid_event", "session.update has no session")
    names = [*models][:1] if asked.get("models") in (None, []) else asked["models"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Refused("invalid_event", "models must be a list of names")
    if unknown := [name for name in names if name not in models]:
        raise Refused("invalid_event", f"unknown model {unknown[0][:50]!r}: one of {', '.join(models)}")
    chosen = [models[name] for name in dict.fromkeys(names)]
    question, most = asked.get("question"), settings.limits.question_characters
    question = QUESTIONS[-1] if question in (None, "") else question
    if not isinstance(question, str) or len(question) > most or SURROGATE.search(question):
        raise Refused("invalid_event", f"question must be a text of at most {most} characters")
    keep = asked.get("keep")
    if not isinstance(keep, bool | None):
        raise Refused("invalid_event", "keep must be true or false")
    schedule = asked.get("schedule")
    if not isinstance(schedule, str | None) or len(schedule or "") > 20:
        raise Refused("invalid_event", "schedule must be a name such as wait-3")
    source = asked.get("source")
    source = source if isinstance(source, dict) else {}
    kind = source.get("kind")
    own_source, picture, frames, fps = None, (0, 0), None, FPS
    if kind == "server":
        own_source = source.get("name")
        if not isinstance(own_source, str) or own_source not in settings.sources:
            raise Refused("invalid_event", "source must have the name of one of the server's own: see session.created")
        source = {"kind": kind, "name": own_source}
    elif kind == "client":
        width, height = (integer(source, name, 1, 100_000) for name in ("width", "height"))
        picture = height, width
        if source.get("frames") is not None:
            frames = integer(source, "frames", FRAMES_PER_CLIP, MOST_FRAMES)
        fps = source.get("frames_per_second", FPS)
        if not is_number(fps) or not 0.1 <= fps <= FPS:
            raise Refused("invalid_event", f"frames_per_second must be from 0.1 to {FPS:g}")
        source = {"kind": kind, "width": width, "height": height, "frames": frames}
    else:
        raise Refused("invalid_event", 'source must have the kind "client" or "server"')
    schedules = {model.name: model.check_schedule(schedule) for model in chosen}
    return Request(chosen, question, schedules, source, own_source, picture, frames, fps, keep is True)


def integer(fields: dict, name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise Refused("invalid_event", f"{name} must be an integer from {least} to {most}")
    return value
