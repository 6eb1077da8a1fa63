"""Feeds a session from an intake until the answer is written: decides what is fed when, what is skipped and reported.

Knows nothing of sources, arguments and files. Uses only the public methods of a session.
"""

import logging
from collections.abc import Callable, Iterator

from torch import Tensor

from ..sessions import Session
from ..sessions.record import Record
from .figures import figures
from .intake import Intake
from .screen import Pieces, Screen

logger = logging.getLogger(__name__)

AHEAD = 4
"""Clips that a session is given ahead of their slots; the others wait in the intake."""
BEHIND = 2
"""This many waiting clips count as having fallen behind."""
CALM = 3
"""This many clips in a row that are fed without delay count as having caught up."""


class Watch:
    """One session from its first clip to its end, or until `ask_to_stop`."""

    def __init__(
        self,
        session: Session,
        intake: Intake,
        pieces: Pieces,
        seconds: float,
        most: int | None = None,
        skip: bool = False,
        keep: Callable[[Tensor], None] | None = None,
        tokens_after_end: int | None = None,
    ):
        """Args:
        session, intake, pieces: What is fed, from where, and how its tokens become text.
        seconds: Of a clip.
        most: Clips to watch, or None for all.
        skip: When the session falls behind, feed only the newest clip.
        keep: Called with the frames of each clip, (2, 3, H, W) uint8, before it is fed.
        tokens_after_end: Tokens to write at most once the source has ended, or None for no such limit.
        """
        self.session, self.intake, self.pieces = session, intake, pieces
        self.seconds, self.most, self.skip, self.keep = seconds, most, skip, keep
        self.tokens_after_end = tokens_after_end
        self.clips: list[int] = []
        """The index in the source of each clip that was fed; this list goes into the record."""
        self.next = 0
        """The index in the source after the newest clip that was fed."""
        self.stopped = self.behind = False
        self.skipped = self.most_waiting = self.waiting_at_end = self.calm = 0

    def ask_to_stop(self) -> None:
        """End `run` after its current step. Can be called from a signal handler."""
        self.stopped = True
        self.intake.wake()

    def run(self, screen: Screen) -> None:
        """Print the answer on `screen`, with the text of incomplete characters. Returns and raises as `texts`."""
        try:
            for text, second in self.texts():
                screen.say(text, second)
        finally:
            if self.session.written:
                screen.say(self.pieces.rest(), self._second(self.session.written[-1].slot))
            screen.end_line()

    def texts(self) -> Iterator[tuple[str, float]]:
        """Starts to read the source, if that has not begun. Yields each piece of text as it is written, and the seconds
        of the source that had passed when its slot could begin.

        Returns when the answer is written or `ask_to_stop` was called. Raises what the session raises, InputError for a
        source that gave no clip, and, once the answer is written, the error with which the source ended, unless the
        source was just lost.
        """
        session, intake = self.session, self.intake
        intake.begin()
        self.next = intake.before
        try:
            while not (session.done or self.stopped):
                self._feed()
                if not session.idle:
                    if (token := session.step()) is not None:
                        yield self.pieces.add(token.token), self._second(token.slot)
                elif intake.over and not intake.waiting:
                    raise intake.no_clip()
                else:
                    intake.wait()
        finally:
            self.waiting_at_end = self._waiting()
        if session.written and (text := self.pieces.rest()):
            yield text, self._second(session.written[-1].slot)
        if intake.fault and not (intake.lost or self.stopped):
            raise intake.fault

    def figures(self, record: Record, deadline: float | None) -> dict:
        """The statistics of `figures.figures`, and the clips and frames that were counted here. `record` is that of the
        session, which must be closed."""
        intake = self.intake
        return {
            **figures(record, intake.completed, self.clips, deadline),
            # Clips that came while the model was being prepared.
            "clips_before_start": intake.before,
            # Clips that were never fed because a newer one had come.
            "clips_skipped": self.skipped,
            # Clips that had come and whose slot had not begun.
            "most_clips_waiting": self.most_waiting,
            "clips_waiting_at_end": self.waiting_at_end,
            # Frames that could not be decoded.
            "broken_frames": intake.broken,
        }

    def _waiting(self) -> int:
        """Clips that have come and were neither skipped nor seen."""
        ahead = self.session.clips_waiting
        return ahead if self.session.all_fed else self.intake.due() - self.next + ahead

    def _second(self, slot: int) -> float:
        """Seconds of the source up to the end of the clip of `slot`."""
        return round((self.clips[min(slot, len(self.clips)) - 1] + 1) * self.seconds, 3)

    def _feed(self) -> None:
        """Feed what has arrived, as far as there is room."""
        session, intake = self.session, self.intake
        self.most_waiting = max(self.most_waiting, self._waiting())
        while intake.waiting and not session.all_fed and self._has_room():
            clip, pixels = intake.take()
            skipped, self.next = clip.index - self.next, clip.index + 1
            full = len(self.clips) + 1 == self.most
            if self.keep:
                self.keep(clip.frames)
            self.clips.append(clip.index)
            session.feed(pixels, clip.last or full)
            self._limit()
            self.skipped += skipped
            self._report_pace(skipped)
            if full and not clip.last:
                logger.warning("clip %d is the last one that is watched: see max_clips", self.most)
        if intake.over and self.clips and not (intake.waiting or session.all_fed):
            logger.warning("the source has ended%s: finishing the answer", intake.why)
            session.end()
            self._limit()

    def _limit(self) -> None:
        if self.session.all_fed and self.tokens_after_end is not None:
            self.session.limit(self.tokens_after_end)

    def _has_room(self) -> bool:
        session, ahead = self.session, self.session.clips_waiting
        if not self.skip:
            return ahead < AHEAD
        # A clip that was fed cannot be skipped. A serial session takes the next clip after its tokens, so that it is
        # chosen only then.
        return ahead == 0 and (session.idle or session.greedy or session.mode != "serial")

    def _report_pace(self, skipped: int) -> None:
        """Report once that the session falls behind, and once that it has caught up."""
        waiting = self._waiting()
        late = skipped > 0 if self.skip else waiting >= BEHIND
        self.calm = 0 if late else self.calm + 1
        now = self._second(len(self.clips))
        if late and not self.behind:
            what = "skipping to the newest clip" if self.skip else f"{waiting} clips are waiting, and none is skipped"
            logger.warning("behind at %g s: %s", now, what)
            self.behind = True
        elif self.behind and self.calm == CALM:
            logger.warning("caught up at %g s", now)
            self.behind = False
