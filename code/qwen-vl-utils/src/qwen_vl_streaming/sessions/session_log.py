"""What happened in a session, and when; at its end, this becomes its record. Knows nothing of models and schedules."""

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
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
        self._hashes: list[str] = []
        self._awaited: deque[Future[str]] = deque()
        """The hashes of the newest clips."""
        self.visible: list[float] = []
        """When each slot began."""
        self.written: list[TimedToken] = []

    @property
    def known_hashes(self) -> list[str]:
        """The hashes that are known now, of all clips but the newest ones."""
        return self._collect(wait=False)

    @property
    def hashes(self) -> list[str]:
        """Of the clips, if a record is written. Waits for those that are computed elsewhere; empty if one never
        comes."""
        found = self._collect(wait=True)
        return found if len(found) == len(self.arrived) else []

    def _collect(self, wait: bool) -> list[str]:
        while self._awaited and (wait or self._awaited[0].done()):
            with contextlib.suppress(CancelledError):
                self._hashes.append(self._awaited[0].result())
            self._awaited.popleft()
        return self._hashes

    def arrive(self, clip: Tensor, known_hash: Future[str] | None = None) -> None:
        """`known_hash` is its `clip_hash`, where it is computed elsewhere."""
        self.arrived.append(self.clock())
        if self.path is None:
            return
        if known_hash is not None:
            self._awaited.append(known_hash)
        else:
            self._collect(wait=True).append(clip_hash(clip))

    def begin_slot(self) -> None:
        self.visible.append(self.clock())

    def write(self, token: int, slot: int) -> TimedToken:
        self.written.append(TimedToken(token, slot, self.clock()))
        return self.written[-1]
