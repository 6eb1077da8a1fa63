"""What happened in a session, and when; at its end, this becomes its record. Knows nothing of models and schedules."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .record import clip_hash


@dataclass(frozen=True)
class TimedToken:
    """A token that was written."""

    token: int
    slot: int
    time: float
    """When the host read it, in seconds of the session's clock."""


class SessionLog:
    """The times of one session, in seconds of its clock."""

    def __init__(self, path: str | Path | None, about: dict | None, clock: Callable[[], float]):
        """`path` is where the record is written, if it is; `about` is added to it."""
        self.path, self.about, self.clock, self.opened = path, about or {}, clock, clock()
        self.identity: dict[str, str] = {}
        """Of the model, if a record is written."""
        self.arrived: list[float] = []
        """When each clip arrived."""
        self.hashes: list[str] = []
        """Of the clips, if a record is written."""
        self.visible: list[float] = []
        """When each slot began."""
        self.written: list[TimedToken] = []

    def arrive(self, clip: Tensor, known_hash: str | None = None) -> None:
        self.arrived.append(self.clock())
        if self.path is not None:
            self.hashes.append(known_hash or clip_hash(clip))

    def begin_slot(self) -> None:
        self.visible.append(self.clock())

    def write(self, token: int, slot: int) -> TimedToken:
        self.written.append(TimedToken(token, slot, self.clock()))
        return self.written[-1]
