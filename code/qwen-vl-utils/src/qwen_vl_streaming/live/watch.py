"""A session that an intake feeds until the answer is written: what is fed when, what is skipped, what is said about it.

Knows nothing of sources, arguments and files. What it needs of a session is its public side alone.
"""

from collections.abc import Callable

from torch import Tensor

from ..sessions import Session
from ..sessions.record import Record
from .figures import Course, figures
from .intake import Intake
from .screen import Pieces, Screen

AHEAD = 4
"""Clips that a session is given before their slots begin: what it may take in ahead. The others wait in the intake."""
BEHIND = 2
"""Clips that wait when it has fallen behind."""
CALM = 3
"""Clips in a row that were fed without delay when it has caught up."""


class Watch:
    """One session from its first clip to its end, or until `ask_to_stop`."""

    def __init__(
        self,
        session: Session,
        intake: Intake,
        screen: Screen,
        pieces: Pieces,
        seconds: float,
        most: int | None = None,
        skip: bool = False,
        keep: Callable[[Tensor], None] | None = None,
    ):
        """`seconds` a clip; watch `most` clips. `skip`: when it cannot keep up, only the newest clip is fed. `keep` is
        given the frames of each clip before it is fed, (2, 3, H, W) uint8."""
        self.session, self.intake, self.screen, self.pieces = session, intake, screen, pieces
        self.seconds, self.most, self.skip, self.keep = seconds, most, skip, keep
        self.clips: list[int] = []
        """Of each clip that was fed, its index in the source; this list goes into the record."""
        self.next = intake.before
        """The clip of the source after the newest that was fed."""
        self.stopped = self.behind = False
        self.skipped = self.most_waiting = self.waiting_at_end = self.calm = 0

    def ask_to_stop(self) -> None:
        """End `run` after the step that it is in. May be called from a signal handler."""
        self.stopped = True
        self.intake.wake()

    def run(self) -> None:
        """Returns when the answer is written, or it was asked to stop. Raises what the session does."""
        session, intake = self.session, self.intake
        try:
            while not (session.done or self.stopped):
                self._feed()
                if not session.idle:
                    if (token := session.step()) is not None:
                        self.screen.say(self.pieces.add(token.token), self._second(token.slot))
                elif intake.over and not intake.waiting:
                    break
                else:
                    intake.wait()
        finally:
            self.waiting_at_end = self._waiting()
            if session.written:
                self.screen.say(self.pieces.rest(), self._second(session.written[-1].slot))
            self.screen.end_line()

    def figures(self, record: Record, deadline: float | None) -> dict:
        """See live_figures; and what was counted here. `record` is the session's, which is over."""
        intake = self.intake
        course = Course(
            completed=intake.completed,
            fed=self.clips,
            visible=record.visible,
            slots=record.slots,
            times=record.times,
            closed=record.complete,
            deadline=deadline,
            greedy=self.session.greedy,
        )
        return {
            **figures(course),
            "clips_before_start": intake.before,
            "clips_skipped": self.skipped,
            "most_clips_waiting": self.most_waiting,
            "clips_waiting_at_end": self.waiting_at_end,
            "broken_frames": intake.broken,
        }

    def _waiting(self) -> int:
        """Clips that are there, are to be seen or skipped, and were not yet."""
        ahead = self._ahead()
        return ahead if self.session.all_fed else self.intake.due() - self.next + ahead

    def _ahead(self) -> int:
        """Those of them that were fed. The slot that a stream's end opens has no clip."""
        return max(0, len(self.session.arrived) - len(self.session.counts))

    def _second(self, slot: int) -> float:
        """How much of the source had passed when `slot` could begin, in seconds."""
        return round((self.clips[min(slot, len(self.clips)) - 1] + 1) * self.seconds, 3)

    def _feed(self) -> None:
        """Hand over what has arrived, as far as there is room."""
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
            self.skipped += skipped
            self._tell_pace(skipped)
            if full and not clip.last:
                self.screen.note(f"clip {self.most} is the last one to be watched: see --max-clips")
        if intake.over and self.clips and not (intake.waiting or session.all_fed):
            why = f" ({intake.fault})" if intake.fault else ""
            self.screen.note(f"no more clips come{why}: the answer is written to its end")
            session.end()

    def _has_room(self) -> bool:
        session, ahead = self.session, self._ahead()
        if not self.skip:
            return ahead < AHEAD
        # What was fed will be seen. Where no clip is taken in beside the words, the next one is chosen after them.
        return ahead == 0 and (session.idle or session.greedy or session.mode != "serial")

    def _tell_pace(self, skipped: int) -> None:
        """Say once that it falls behind, and once that it has caught up."""
        waiting = self._waiting()
        late = skipped > 0 if self.skip else waiting >= BEHIND
        self.calm = 0 if late else self.calm + 1
        now = self._second(len(self.clips))
        if late and not self.behind:
            what = "skipping to the newest clip" if self.skip else f"{waiting} clips wait, and none is left out"
            self.screen.note(f"behind at {now:g} s: {what}")
            self.behind = True
        elif self.behind and self.calm == CALM:
            self.screen.note(f"caught up at {now:g} s")
            self.behind = False
