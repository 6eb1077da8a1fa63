"""One live stream: clips are fed as they arrive, tokens come out as they are written. Three execution modes:

    serial      a clip enters the model, then its slot's tokens are written (`serial.py`)
    fused       a clip enters in the forward steps that write tokens (`fused.py`)
    pipelined   another process computes the clips' keys and values (`pipelined.py`)

All modes write the same tokens. Knows nothing of video files and processes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor

from ..common.clock import now
from ..common.errors import InputError, first_line
from ..common.numbers import MOST, check_count, check_number
from ..common.versions import versions
from ..engine.step_runner import StepRunner
from ..model.prompts import Template
from ..stream import PENALTY, Caption
from ..timeline.plan import Window
from ..timeline.positions import check_clips
from ..timeline.timeline import Layout, Schedule
from ..timeline.variants import Variant
from .fused import check_chunks, choose_chunks
from .record import Record, identity, write_record
from .serial import SerialRounds
from .session_log import SessionLog, TimedToken
from .slot_scheduler import SlotScheduler


class Session:
    """A stream that is watched and answered at once. `open_session` makes one.

    `feed` hands in a clip; `step` does one round of work, and `tokens` does all that can be done now. A session is
    over when it is `done`, closed (also as a context manager) or has failed; then its record is written.
    """

    def __init__(
        self,
        model,
        variant: Variant,
        template: Template,
        layout: Layout,
        *,
        schedule: str | Schedule = "wait-3",
        penalty: float | None = None,
        max_new_tokens: int = 300,
        max_clips: int = 60,
        window: tuple[int, int] | None = None,
        chunk: int | None = None,
        chunks: int | None = None,
        ahead: int | None = None,
        runner: StepRunner | None = None,
        clock: Callable[[], float] = now,
        record: str | Path | None = None,
        about: dict | None = None,
        model_identity: dict[str, str] | None = None,
        rounds: type[SerialRounds] = SerialRounds,
        **more,
    ):
        """Args:
            schedule: wait-K, random-K, "greedy", model-M where the `template` has an end-of-slot token, or a Schedule
                for a known number of clips.
            penalty: Repetition penalty; default: that of `runner`, else PENALTY.
            max_new_tokens, max_clips: The size of the key-value cache, in tokens and clips.
            window: (clips, tokens) that attention is limited to, besides prompt and header; the stream may then have
                any number of clips.
            chunk: Visual tokens that enter per forward step, at most; default: a whole clip.
            chunks: Forward steps in which a fused clip enters, each beside a token. If the slot has fewer tokens, the
                rest of the clip enters with the next slot's first token. Default: that of `runner`, else
                `choose_chunks`.
            ahead: Forward steps that may be in flight while a token is read; default: 1 on a GPU, 0 on a CPU.
            runner: The runner of a closed session, or one that a pool shares; default: a new one.
            clock: Returns the time in seconds.
            record: The file that the record is written to.
            about: Added to the record: what was asked, where the clips come from.
            model_identity: `identity(model)` for the record, where the caller has computed it already.
            rounds, more: The execution mode, and what else it needs.

        Raises InputError for arguments that do not fit each other or the variant.
        """
        self.mode = rounds.mode
        if self.mode != "serial" and not variant.parallel:
            raise InputError(
                f"variant {variant.name} cannot run {self.mode}: its visual tokens attend to earlier text, or it "
                "writes after the last clip only; use serial, or one of overlap, group and gap"
            )
        check_count("max_clips", max_clips)
        check_count("max_new_tokens", max_new_tokens, most=MOST if window is None else sys.maxsize)
        for what, count, least in (("chunk", chunk, 1), ("ahead", ahead, 0)):
            if count is not None:
                check_count(what, count, least)
        if penalty is not None:
            check_number("penalty", penalty)
        if chunks is not None:
            check_chunks(chunks, chunk, self.mode, layout)
        frame = Window.of(window)
        self.scheduler = SlotScheduler(variant, schedule, max_new_tokens, max_clips if window is None else None)
        if self.scheduler.most is not None and template.end_of_slot is None:
            raise InputError(
                f"schedule {schedule} needs an end-of-slot token, and the template has none: give a checkpoint that "
                "was trained with --schedule model"
            )
        self.variant, self.template, self.layout, self.max_clips = variant, template, layout, max_clips
        if runner is None:
            given = PENALTY if penalty is None else penalty
            if chunks is None:
                whole = self.mode != "fused" or chunk is not None
                chunks = 1 if whole else choose_chunks(layout, self.scheduler.typical_quota)
            runner = rounds.make_runner(model, layout, max_clips, max_new_tokens, chunk, given, frame, chunks)
        for what, asked, made in (("penalty", penalty, runner.penalty), ("chunks", chunks, runner.clip_chunks)):
            if asked not in (None, made):
                raise InputError(f"{what} {asked} differs from {made}, with which the runner was made: leave it out")
        self.runner, self.closed = runner, False
        self.log = SessionLog(record, about, clock)
        self.written = self.log.written
        """The tokens so far, with their slots and times."""
        self.rounds = rounds(
            model,
            variant,
            template,
            layout,
            runner=runner,
            scheduler=self.scheduler,
            log=self.log,
            window=frame,
            max_clips=max_clips,
            chunk=chunk,
            ahead=ahead if ahead is not None else int(model.device.type == "cuda"),
            **more,
        )
        self.log.identity = {} if record is None else model_identity or identity(model)
        try:
            self.rounds.open()
        except BaseException:
            runner.release(self.rounds.batch_slot)
            raise

    @property
    def counts(self) -> list[int]:
        """k_1 … of the slots that have begun."""
        return self.scheduler.counts

    @property
    def greedy(self) -> bool:
        return self.scheduler.greedy

    @property
    def ended(self) -> bool:
        """The token that ends the answer was written."""
        return self.scheduler.ended

    @property
    def done(self) -> bool:
        """No further token will be written: the answer has ended or is as long as it may be."""
        return self.scheduler.done

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip is fed."""
        return self.rounds.idle

    @property
    def all_fed(self) -> bool:
        """The last clip was fed, or the source's end reported."""
        return self.scheduler.all_arrived

    @property
    def clips_waiting(self) -> int:
        """Clips that were fed and whose slot has not begun."""
        return self.scheduler.clips_waiting

    def caption(self) -> Caption:
        """What was written so far."""
        return Caption([each.token for each in self.written], [each.slot for each in self.written], [*self.counts])

    def feed(self, clip: Tensor, last: bool = False, known_hash: Future[str] | None = None) -> None:
        """Hand in a clip that has arrived: (patches, pixels of a patch) as `prompts.clip_pixels` gives it, or (tokens
        of a clip, C) visual tokens. The session owns its memory from then on. `known_hash` is its `clip_hash`, where
        it is computed elsewhere: only the record waits for it. Raises InputError for a clip that this session cannot
        have; the session is not changed by it."""
        if self.closed:
            raise InputError("the session is closed: open another one")
        number, shapes = len(self.log.arrived) + 1, self.rounds.clip_shapes
        if tuple(clip.shape) not in shapes:
            rows, columns = self.layout.grid
            raise InputError(
                f"clip {number} has shape {tuple(clip.shape)}, but this session was opened for clips of {rows} x "
                f"{columns} visual tokens, which have shape {shapes[0]} or {shapes[1]}: resize it like the first clip"
            )
        check_clips(self.variant, self.layout, number)
        self.scheduler.arrive(last)
        self.log.arrive(clip, known_hash)
        with self.fails_on_error():
            self.rounds.arrive(clip)

    def end(self) -> None:
        """Report that the source has ended without announcing its last clip: see `SlotScheduler.end`."""
        if not self.closed:
            self.scheduler.end()

    def limit(self, tokens: int) -> None:
        """Write at most `tokens` more, besides those due in slots before the last one. Raises InputError if that
        is not a number of at least 0."""
        check_count("tokens", tokens, 0)
        self.scheduler.limit(tokens)

    def step(self) -> TimedToken | None:
        """One round: at most one forward step and one token. Returns None if no token was read; see `idle`."""
        if self.closed:
            raise InputError("the session is closed: open another one")
        if self.done:
            return None
        rounds = self.rounds
        with self.fails_on_error():
            if clips := rounds.clips_to_encode():
                rounds.encoded += self.runner.vision_encoder.encode(clips, [self.layout] * len(clips))
            request = rounds.plan()
            if request is not None:
                rounds.requested(request, self.runner.step([request]))
            return rounds.collect(request is None and rounds.wait())

    def tokens(self) -> Iterator[TimedToken]:
        """Write all that can be written until another clip is fed."""
        while not self.idle:
            if (token := self.step()) is not None:
                yield token

    def close(self) -> None:
        """Release memory and write the record. Tokens that were not written by now never are."""
        if not self.closed:
            while self.rounds.pending:
                self.rounds.collect(True)
            self._end("ended" if self.scheduler.ended else "max_new_tokens" if self.done else "cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @contextlib.contextmanager
    def fails_on_error(self):
        """An error inside ends the session, with its record."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """End with `error`, which the record names."""
        if not self.closed:
            self.rounds.drop_pending()
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self._end("cancelled" if stopped else f"failed: {first_line(error)}")

    def _end(self, how: str) -> None:
        self.closed = True
        try:
            self.rounds.release()
        finally:
            if self.log.path is not None:
                write_record(self.log.path, make_record(self, how))


def make_record(session: Session, end: str) -> Record:
    """The record of a session that is over; `end` as in `Record`."""
    scheduler, rounds, log = session.scheduler, session.rounds, session.log
    window, asked = rounds.window, scheduler.schedule
    return Record(
        versions=versions(),
        model=log.identity,
        variant=session.variant.name,
        way=session.mode,
        chunk=rounds.chunk,
        template=session.template,
        layout=session.layout,
        window=window and [window.clips, window.tokens],
        schedule=asked if isinstance(asked, str) else list(asked.quotas),
        penalty=session.runner.penalty,
        max_new_tokens=scheduler.max_new_tokens,
        opened=log.opened,
        end=end,
        complete=scheduler.complete,
        bare=scheduler.bare,
        arrived=log.arrived,
        visible=log.visible,
        hashes=log.hashes,
        counts=[*scheduler.counts],
        tokens=[each.token for each in log.written],
        slots=[each.slot for each in log.written],
        times=[each.time for each in log.written],
        about=log.about,
    )
