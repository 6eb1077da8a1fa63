"""A session on one device whose next clip is taken in by the passes that write the words before it."""

from .passes import Due, Feed
from .session import Session, Word


class FusedSession(Session):
    """The next clip rides in the passes that write the words before it. One clip ahead is as far as it pays."""

    way = "fused"

    def _open(self) -> None:
        super()._open()
        self.sight = Feed(self.variant, self.template, self.layout)
        """What has been watched."""
        self.riding: Due | None = None
        self.rode, self.riding_last = 0, False

    def _clips_to_come(self) -> bool:
        return bool(self.waiting) or self.riding is not None

    def _round(self) -> Word | None:
        if self.riding is not None and self.rode == len(self.riding) and self._wants_clip():
            lead = self._begin_slot(self.riding_last)
            self.passes.feed(lead[lead.rows.text])
            self.riding = None
        if self.riding is None and self.waiting:
            clip, self.riding_last = self.waiting.popleft()
            self.passes.look(clip)
            self.sight.stream.counts[:] = self.counts
            riding = self.sight.clip(self.riding_last)
            self.riding, self.rode = riding[riding.rows.visual], 0
        chunk = None
        if self.riding is not None and self.rode < len(self.riding):
            chunk = self.riding[self.rode : self.rode + self.passes.width]
            self.rode += len(chunk)
        speaks = self._may_speak()
        self.passes.round(self.text.word() if speaks else None, chunk, speaks)
        return self._note() if speaks else None
