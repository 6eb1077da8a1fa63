"""Copies of the records of running sessions, which the server keeps: a model process that is killed writes none.

A model process reports what a record will say: all that is known at the start, then what each step has added.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..common.errors import InputError
from ..sessions import Session
from ..sessions.record import Record, write_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a step has added to a session."""

    tokens: list[tuple[int, int, float]]
    """Further tokens, each with its slot and time."""
    slots: int
    """How many have begun."""
    visible: list[float]
    """When further slots began, without those that a token that is not read yet may undo."""
    arrived: list[float]
    """When further clips arrived."""
    hashes: list[str]
    """Further hashes of clips. That of a clip may come later than the clip."""
    total: int | None
    """The number of slots, once it is known."""


@dataclass
class Reporter:
    """In the model process: finds what is new in a session."""

    session: Session
    reported: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    """Numbers of tokens, of slots that have begun, of those that are settled, of clips, and of their hashes."""

    def news(self) -> Progress | None:
        """What is new since the last call, if anything."""
        scheduler, log = self.session.scheduler, self.session.log
        known = log.known_hashes
        begun = len(scheduler.counts)
        settled = scheduler.pending[0] if scheduler.pending else begun
        reached = len(log.written), begun, settled, len(log.arrived), len(known)
        if reached == self.reported:
            return None
        (tokens, _, visible, clips, hashes), self.reported = self.reported, reached
        return Progress(
            tokens=[(each.token, each.slot, each.time) for each in log.written[tokens:]],
            slots=begun,
            visible=log.visible[visible:settled],
            arrived=log.arrived[clips:],
            hashes=known[hashes:],
            total=scheduler.total,
        )


@dataclass
class RecordCopy:
    """In the server: one session's record so far."""

    path: Path
    started: Record
    """The record when the session was opened."""
    visible: list[float] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    tokens: list[tuple[int, int, float]] = field(default_factory=list)
    """Token, slot and time."""
    total: int | None = None

    def add(self, progress: Progress) -> None:
        self.tokens += progress.tokens
        self.visible += progress.visible
        self.arrived += progress.arrived
        self.hashes += progress.hashes
        self.total = progress.total

    def record(self, end: str) -> Record:
        """The record of a session that ended as `end` says."""
        tokens, slots, times = ([*column] for column in zip(*self.tokens, strict=True)) if self.tokens else ([], [], [])
        counts = count(slots, len(self.visible))
        complete = self.total is not None and len(counts) >= self.total
        return replace(
            self.started,
            end=end,
            complete=complete,
            bare=complete and len(counts) > len(self.arrived),
            visible=self.visible,
            arrived=self.arrived,
            hashes=self.hashes if len(self.hashes) == len(self.arrived) else [],
            counts=counts,
            tokens=tokens,
            slots=slots,
            times=times,
        )

    def write(self, end: str) -> bool:
        """Write the record, unless the model process has. Returns whether there is one; any error is logged."""
        try:
            if not os.path.exists(self.path):
                write_record(self.path, self.record(end))
        except InputError as error:
            logger.error("%s", error)
            return False
        except Exception:
            logger.exception("%s cannot be written", self.path)
            return False
        return True


def count(slots: Sequence[int], most: int) -> list[int]:
    """How often each of 1 … `most` is in `slots`."""
    counts = [0] * most
    for slot in slots:
        counts[slot - 1] += 1
    return counts
