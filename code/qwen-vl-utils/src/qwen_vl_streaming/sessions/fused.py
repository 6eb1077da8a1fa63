"""A session on one device whose clips are taken in by passes that write words."""

from torch import Tensor

from ..engine.stream_state import DueRows, StreamState
from .session import Session

LOOKS = 4
"""Clips that the vision tower looks at at once, where so many wait: one alone does not fill a GPU."""


class FusedSession(Session):
    """The next clip rides in the passes that write the words before it or, where it comes too late for that, in the one
    that writes the first word that sees it. One clip ahead is as far as it pays."""

    way = "fused"
    joins = True

    def _open(self) -> None:
        super()._open()
        self.sight = StreamState(self.variant, self.template, self.layout, self.window)
        """What has been watched."""
        self.riding: DueRows | None = None
        """What is left of the clip that is being taken in."""
        self.riding_last = False

    def looks_due(self) -> list[tuple[Tensor, bool]]:
        if len(self.looked) > 1:
            return []
        count = LOOKS if self.looked or self.riding is not None else 1  # the first is waited for
        return [self.waiting.popleft() for _ in range(min(len(self.waiting), count))]

    def _clips_to_come(self) -> bool:
        return super()._clips_to_come() or self.riding is not None

    def _advance(self) -> None:
        self._board()
        if self.riding is not None and len(self.lead) + len(self.riding) <= self.width and self._wants_clip():
            lead = self._begin_slot(self.riding_last)
            # What has not been taken in by now enters with the first word that sees it.
            self.lead = self.lead + self.riding + lead[lead.rows.text]
            self.riding = None
            self._board()
        if self.riding is None:
            self._begin_tail()

    def _board(self) -> None:
        """The next clip rides, where all of the one before has entered. Words do not wait for the vision tower."""
        if self.riding is not None or not self.looked or self.lead.rows.visual.any():
            return
        if self.looked[0][0].ready.query() or not self._may_speak():
            sight, self.riding_last = self.looked.popleft()
            self.passes.set_clip_features(self.batch_slot, sight)
            self.sight.stream.counts[:] = self.counts
            riding = self.sight.feed_clip(self.riding_last)
            self.riding = riding[riding.rows.visual]

    def _ride(self, room: int) -> DueRows:
        if self.riding is None or not len(self.riding):
            return DueRows.empty()
        rides, self.riding = self.riding[:room], self.riding[room:]
        return rides
