"""One live stream: clips are fed as they arrive, tokens come out as they are written. Three execution modes:

    serial      a clip enters the model, then its slot's tokens are written
    fused       a clip enters in the forward steps that write tokens (`fused.py`)
    pipelined   another process computes the clips' keys and values (`pipelined.py`)

All modes write the same tokens. `slot_scheduler.py` decides when a slot begins and a token is written; a Session does
it: it encodes clips, asks the runner for forward steps and reads tokens. Knows nothing of video files and processes.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..common.clock import now
from ..common.errors import InputError
from ..common.versions import versions
from ..engine.step_request import PendingToken, StepRequest
from ..engine.step_runner import StepRunner
from ..engine.stream_state import DueRows, StreamState
from ..engine.vision_encoder import ClipFeatures
from ..model.prompts import Template
from ..reference import PENALTY, Caption
from ..timeline.plan import Window
from ..timeline.positions import check_clips
from ..timeline.timeline import Layout, Schedule
from ..timeline.variants import Variant
from .record import Record, clip_hash, identity, write_record
from .slot_scheduler import SlotScheduler

UNKNOWN = -1
"""Stands for a token's id until the host has read it."""


@dataclass(frozen=True)
class TimedToken:
    """A token that was written."""

    token: int
    slot: int
    time: float
    """When the host read it, in seconds of the session's clock."""


class Session:
    """A stream that is watched and answered at once. `open_session` makes one.

    `feed` hands in a clip; `step` does one round of work, and `tokens` does all that can be done now. A session is
    over when it is `done`, closed (also as a context manager) or has failed; then its record is written.
    """

    mode = "serial"

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
        ahead: int | None = None,
        runner: StepRunner | None = None,
        clock: Callable[[], float] = now,
        record: str | Path | None = None,
        about: dict | None = None,
        model_identity: dict[str, str] | None = None,
    ):
        """Args:
            schedule: wait-K, random-K, "greedy", or a Schedule for a known number of clips.
            penalty: Repetition penalty; default: that of `runner`, else PENALTY.
            max_new_tokens, max_clips: The size of the key-value cache, in tokens and clips.
            window: (clips, tokens) that attention is limited to, besides prompt and header; the stream may then have
                any number of clips.
            chunk: Visual tokens that enter per forward step, at most; default: a whole clip.
            ahead: Forward steps that may be in flight while a token is read; default: 1 on a GPU, 0 on a CPU.
            runner: The runner of a closed session, or one that a pool shares; default: a new one.
            clock: Returns the time in seconds.
            record: The file that the record is written to.
            about: Added to the record: what was asked, where the clips come from.
            model_identity: `identity(model)` for the record, where the caller has computed it already.

        Raises InputError for arguments that do not fit each other or the variant.
        """
        if self.mode != "serial" and not variant.parallel:
            raise InputError(
                f"variant {variant.name} cannot run {self.mode}: its visual tokens attend to earlier text, or it "
                "writes after the last clip only; use serial, or one of overlap, group and gap"
            )
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk {chunk} must be at least 1 visual token")
        if min(max_new_tokens, max_clips) < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} and max_clips {max_clips} must be at least 1")
        self.window = None if window is None else Window(*window)
        self.scheduler = SlotScheduler(variant, schedule, max_new_tokens, max_clips if window is None else None)
        self.model, self.variant, self.template, self.layout = model, variant, template, layout
        self.max_clips, self.chunk, self.clock = max_clips, chunk, clock
        self.ahead = ahead if ahead is not None else int(model.device.type == "cuda")
        if runner is None:
            given = PENALTY if penalty is None else penalty
            runner = StepRunner.single(model, layout, max_clips, max_new_tokens, chunk, given, self.window)
            runner.warm_up()
            if self.mode != "pipelined":
                runner.vision_encoder.capture(layout.grid)
        if penalty not in (None, runner.penalty):
            raise InputError(
                f"penalty {penalty} differs from {runner.penalty}, with which the runner was made: leave it out"
            )
        self.runner, self.penalty = runner, runner.penalty
        self.width = min(chunk or runner.chunk_size, runner.chunk_size)
        self.batch_slot = runner.acquire(template, layout, max_clips, max_new_tokens, self.window)
        self.text = StreamState(variant, template, layout, self.window)
        """What the text side has written and may attend to."""
        self.waiting: collections.deque[Tensor] = collections.deque()
        """Clips that have arrived and that the vision encoder, or another process, has not been given."""
        self.encoded: collections.deque[ClipFeatures] = collections.deque()
        """Clips that the vision encoder has encoded and that have not started to enter the language model."""
        self.lead = DueRows.empty()
        """Rows that must enter before the next token."""
        self.pending: collections.deque[PendingToken] = collections.deque()
        """Tokens that the device was asked for and the host has not read."""
        self.arrived: list[float] = []
        """When each clip arrived."""
        self.visible: list[float] = []
        """When each slot began."""
        self.hashes: list[str] = []
        self.written: list[TimedToken] = []
        self.closed = False
        self.record, self.about, self.opened = record, about or {}, clock()
        self.identity = None if record is None else model_identity or identity(model)
        patch = model.model.visual.patch_embed
        self._shapes = (
            (layout.tokens_per_clip * model.model.visual.spatial_merge_size**2, patch.proj.weight[0].numel()),
            (layout.tokens_per_clip, runner.clip_features.shape[2]),
        )
        try:
            runner.prefill(self.batch_slot, StreamState.prompt(variant, template, layout, self.window))
            self._open()
        except BaseException:
            runner.release(self.batch_slot)
            raise

    # Public

    @property
    def counts(self) -> list[int]:
        """k_1 … of the slots that have begun."""
        return self.scheduler.counts

    @property
    def greedy(self) -> bool:
        return self.scheduler.greedy

    @property
    def ended(self) -> bool:
        """The end-of-turn token was written."""
        return self.scheduler.ended

    @property
    def done(self) -> bool:
        """No further token will be written: the answer has ended or is as long as it may be."""
        return self.scheduler.done

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip is fed."""
        schedule = self.scheduler
        return self.done or not (self.pending or len(self.lead) or schedule.may_write or schedule.slots_waiting)

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

    def feed(self, clip: Tensor, last: bool = False, known_hash: str | None = None) -> None:
        """Hand in a clip that has arrived: (patches, pixels of a patch) as `prompts.clip_pixels` gives it, or (tokens
        of a clip, C) visual tokens. The session owns its memory from then on. `known_hash` is its `clip_hash`, where
        the caller has computed it in another thread. Raises InputError for a clip that this session cannot have; the
        session is not changed by it."""
        if self.closed:
            raise InputError("the session is closed: open another one")
        number = len(self.arrived) + 1
        if tuple(clip.shape) not in self._shapes:
            rows, columns = self.layout.grid
            raise InputError(
                f"clip {number} has shape {tuple(clip.shape)}, but this session was opened for clips of {rows} x "
                f"{columns} visual tokens, which have shape {self._shapes[0]} or {self._shapes[1]}: resize it like the "
                "first clip"
            )
        check_clips(self.variant, self.layout, number)
        self.scheduler.arrive(last)
        self.arrived.append(self.clock())
        if self.record is not None:
            self.hashes.append(known_hash or clip_hash(clip))
        self.waiting.append(clip)

    def end(self) -> None:
        """Report that the source has ended without announcing its last clip: see `SlotScheduler.end`."""
        if not self.closed:
            self.scheduler.end()

    def limit(self, tokens: int) -> None:
        """Write at most `tokens` more."""
        self.scheduler.limit(tokens)

    def step(self) -> TimedToken | None:
        """One round: at most one forward step and one token. Returns None if no token was read; see `idle`."""
        if self.closed:
            raise InputError("the session is closed: open another one")
        if self.done:
            return None
        with self.fails_on_error():
            if clips := self.clips_to_encode():
                self.encoded += self.runner.vision_encoder.encode(clips, [self.layout] * len(clips))
            request = self.plan()
            if request is not None:
                self.requested(request, self.runner.step([request]))
            return self.collect(request is None and self._wait())

    def tokens(self) -> Iterator[TimedToken]:
        """Write all that can be written until another clip is fed."""
        while not self.idle:
            if (token := self.step()) is not None:
                yield token

    def close(self) -> None:
        """Release memory and write the record. Tokens that were not written by now never are."""
        if not self.closed:
            while self.pending:
                self.collect(True)
            self._end("ended" if self.ended else "max_new_tokens" if self.done else "cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # A round in parts, which `session_pool.py` does for many sessions at once

    def clips_to_encode(self) -> Iterable[Tensor]:
        """Takes the clips that the vision encoder should encode now out of `waiting`; they belong into `encoded`."""
        ready = not self.encoded and not len(self.lead) and self.scheduler.may_begin_slot
        return [self.waiting.popleft()] if self.waiting and ready else []

    def plan(self, prefill: bool = True) -> StepRequest | None:
        """What to request of the next forward step; without `prefill` it has room for a token's row only."""
        self._begin_slots()
        rows = DueRows.empty()
        if prefill:
            rows, self.lead = self.lead[: self.width], self.lead[self.width :]
            if not len(self.lead):
                rows = rows + self._rows_ahead(self.width - len(rows))
        sample = not len(self.lead) and self.scheduler.may_write
        if len(rows) and self.variant.parallel and self.mode == "serial":
            sample = False
        if not (sample or len(rows)):
            return None
        decode = self.text.feed_text() if sample else DueRows.empty()
        next_row = len(self.template.header) + self.scheduler.requested_tokens
        return StepRequest(self.batch_slot, decode, rows, sample, next_row)

    def requested(self, request: StepRequest, pending: PendingToken | None) -> None:
        """The forward step was launched."""
        if request.sample:
            self.scheduler.request()
            self.text.stream.write(UNKNOWN)
            self.pending.append(pending)

    @property
    def token_ready(self) -> bool:
        """The oldest pending token can be read without waiting."""
        return bool(self.pending) and self.pending[0].ready.query()

    def collect(self, wait: bool) -> TimedToken | None:
        """Read the oldest pending token, if more than `ahead` are pending or the caller wants to `wait` for it."""
        if not self.pending or not (wait or len(self.pending) > self.ahead):
            return None
        token = self.pending.popleft().get(self.batch_slot)
        self.text.stream.written[len(self.written)] = token
        slot = self.scheduler.read(token == self.template.end)
        self.written.append(TimedToken(token, slot, self.clock()))
        if self.ended:
            self.pending.clear()
            del self.visible[len(self.counts) :]
        return self.written[-1]

    # What the execution modes do differently

    def _open(self) -> None:
        """Set up what the mode needs. The prompt is in the cache."""

    def _begin_slots(self) -> None:
        """Move clips towards the model and begin the slots that may begin now."""
        if self.encoded and not len(self.lead) and self.scheduler.may_begin_slot:
            self.runner.set_clip_features(self.batch_slot, self.encoded.popleft())
            self.scheduler.commit()
            self.lead = self._begin_slot()
        self._begin_tail()

    def _rows_ahead(self, room: int) -> DueRows:
        """At most `room` rows that no token waits for, to enter beside those that must."""
        return DueRows.empty()

    def _wait(self) -> bool:
        """Called when nothing could be requested. Returns whether to wait for the oldest pending token; else something
        else has happened by which the session can go on."""
        return True

    def _release(self) -> None:
        self.runner.release(self.batch_slot)

    # For all modes

    def _begin_slot(self) -> DueRows:
        """Begin a slot with the next clip, whose rows are returned with the text rows that follow, in feed order."""
        self.visible.append(self.clock())
        self.scheduler.begin_slot()
        return self.text.feed_clip(self.scheduler.complete)

    def _begin_tail(self) -> None:
        """Begin the slot without a clip, if that is due and nothing is to enter before the tail."""
        if self.scheduler.tail_is_next and self.scheduler.may_begin_slot and not len(self.lead):
            self.visible.append(self.clock())
            self.scheduler.begin_slot()
            self.lead = self.text.feed_clip(True, empty=True)

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
            self.scheduler.drop_pending()
            self.pending.clear()
            del self.visible[len(self.counts) :]
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._end("cancelled" if stopped else f"failed: {why}")

    def _end(self, how: str) -> None:
        self.closed = True
        try:
            self.waiting.clear()
            self.encoded.clear()
            self._release()
        finally:
            if self.record is not None:
                write_record(self.record, make_record(self, how))


def make_record(session: Session, end: str) -> Record:
    """The record of a session that is over; `end` as in `Record`."""
    scheduler, window = session.scheduler, session.window
    asked = scheduler.schedule
    return Record(
        versions=versions(),
        model=session.identity,
        variant=session.variant.name,
        way=session.mode,
        chunk=session.chunk,
        template=session.template,
        layout=session.layout,
        window=window and [window.clips, window.tokens],
        schedule=asked if isinstance(asked, str) else list(asked.quotas),
        penalty=session.penalty,
        max_new_tokens=scheduler.max_new_tokens,
        opened=session.opened,
        end=end,
        complete=scheduler.complete,
        bare=scheduler.bare,
        arrived=session.arrived,
        visible=session.visible,
        hashes=session.hashes,
        counts=[*scheduler.counts],
        tokens=[each.token for each in session.written],
        slots=[each.slot for each in session.written],
        times=[each.time for each in session.written],
        about=session.about,
    )
