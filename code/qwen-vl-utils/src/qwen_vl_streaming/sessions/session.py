"""One live stream: clips are fed as they arrive, words come out as they are written, in any of three ways.

    serial      a clip is taken in, then its words are written
    fused       a clip rides in passes that write words, before its own or with the first of them
    pipelined   another process takes clips in (`pipelined.py`)

The words are the same. When a slot begins is decided here, for all three; what enters the model, where and seeing what
is decided in `step_runner.py`. Knows nothing of video files and processes.
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
from ..timeline.timeline import Layout, Schedule, make_schedule
from ..timeline.variants import Variant
from .record import Record, clip_hash, identity, write_record

GREEDY = "greedy"
"""A schedule: write until the next clip is there."""
UNKNOWN = -1
"""The id of a word, to the host, until it has come from the device."""


@dataclass(frozen=True)
class Word:
    """A token that was written."""

    token: int
    slot: int
    time: float
    """Of the session's clock, seconds."""


class Session:
    """A stream that is watched and answered at once. `open_session` makes one.

    `feed` hands in a clip; `step` does one round of work, and `words` does all that can be done now. A session is
    over when it is `done`, closed (also as a context manager) or has failed; then its record is written.
    """

    way = "serial"
    joins = False
    """Whether a word may be asked of a pass that takes visual rows in: else it comes after them."""

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
        passes: StepRunner | None = None,
        clock: Callable[[], float] = now,
        record: str | Path | None = None,
        about: dict | None = None,
    ):
        """`schedule` is wait-K, random-K, "greedy", or a Schedule for a known number of clips. `max_clips` and
        `max_new_tokens` size the memory; a `window` (clips, words) instead keeps only the newest in sight, of a stream
        that may have any number of clips. `chunk` visual tokens at most ride in a pass, by default a whole clip.
        `ahead` passes may be under way when a word is waited for, by default 1 on a GPU. `passes` are those of a
        session that is over, or of several, and it has their `penalty`, else by default PENALTY. `record` names a file
        for the record, to which `about` (what was asked, where the clips come from) is added. Raises InputError for
        what cannot be.
        """
        if self.way != "serial" and not variant.parallel:
            raise InputError(
                f"variant {variant.name} cannot run {self.way}: its visual tokens attend to the text before them, or "
                "it writes when all clips are in; ask for serial, or for overlap, group or gap"
            )
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk {chunk} must be at least 1 visual token")
        if min(max_new_tokens, max_clips) < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} and max_clips {max_clips} must be at least 1")
        self.window = None if window is None else Window(*window)
        if isinstance(schedule, Schedule) and schedule.clips > max_clips and window is None:
            raise InputError(f"a schedule for {schedule.clips} clips does not fit into max_clips {max_clips}")
        self.model, self.variant, self.template, self.layout = model, variant, template, layout
        self.asked, self.most, self.max_clips, self.clock = schedule, max_new_tokens, max_clips, clock
        self.greedy = schedule == GREEDY
        if isinstance(schedule, Schedule):
            self.schedule = schedule
        else:
            self.schedule = make_schedule("wait-1" if self.greedy else schedule, variant, max_clips + 1)
        self.chunk = chunk
        self.ahead = ahead if ahead is not None else int(model.device.type == "cuda")
        if passes is None:
            given = PENALTY if penalty is None else penalty
            passes = StepRunner.single(model, layout, max_clips, max_new_tokens, chunk, given, self.window)
            passes.warm_up()
            if self.way != "pipelined":
                passes.vision_encoder.capture(layout.grid)
        if penalty not in (None, passes.penalty):
            raise InputError(f"a penalty of {penalty} in passes that were made with {passes.penalty}: leave it out")
        self.passes, self.penalty = passes, passes.penalty
        self.width = min(chunk or passes.chunk_size, passes.chunk_size)
        self.batch_slot = passes.acquire(template, layout, max_clips, max_new_tokens, self.window)
        self.text = StreamState(variant, template, layout, self.window)
        """What has been written, and seen by what was written."""
        self.waiting: collections.deque[tuple[Tensor, bool]] = collections.deque()
        """Clips that have arrived and were not looked at yet, and whether each is the last."""
        self.looked: collections.deque[tuple[ClipFeatures, bool]] = collections.deque()
        """Clips that the vision tower has, and that no slot has begun with."""
        self.lead = DueRows.empty()
        """What must be fed before the next word."""
        self.coming: collections.deque[PendingToken] = collections.deque()
        """Words that the device was asked for and the host has not seen."""
        self.arrived: list[float] = []
        self.visible: list[float] = []
        """When each slot began."""
        self.hashes: list[str] = []
        self.written: list[Word] = []
        self.all_fed = self.closed = self.ended = self.bare = False
        self.record, self.about, self.opened = record, about or {}, clock()
        self.identity = None if record is None else identity(model)
        patch = model.model.visual.patch_embed
        self._shapes = (
            (layout.tokens_per_clip * model.model.visual.spatial_merge_size**2, patch.proj.weight[0].numel()),
            (layout.tokens_per_clip, passes.clip_features.shape[2]),
        )
        self.prompt = StreamState.prompt(variant, template, layout, self.window)
        try:
            self._open()
        except BaseException:
            passes.release(self.batch_slot)
            raise

    # What a caller sees

    @property
    def counts(self) -> list[int]:
        """k_1 … of the slots that have begun."""
        return self.text.stream.counts

    @property
    def done(self) -> bool:
        """Nothing more is to be written: the answer has ended, or has as many tokens as it may."""
        return self.ended or len(self.written) >= self.most

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip is fed."""
        return self.done or not (self.coming or self._may_speak() or self._clips_to_come())

    def caption(self) -> Caption:
        """What was written so far."""
        return Caption([word.token for word in self.written], [word.slot for word in self.written], [*self.counts])

    def feed(self, clip: Tensor, last: bool = False) -> None:
        """A clip has arrived: (patches, pixels of a patch) as `prompts.clip_pixels` gives it, or (tokens of a clip, C)
        visual tokens. Its memory is the session's from then on. Raises InputError where it cannot belong to this
        session, which goes on without it."""
        number = len(self.arrived) + 1
        if self.closed:
            raise InputError("the session is closed: open another one")
        if self.all_fed:
            raise InputError(f"clip {number} came after the last one, clip {number - 1}: open another session for it")
        if tuple(clip.shape) not in self._shapes:
            rows, columns = self.layout.grid
            raise InputError(
                f"clip {number} is of shape {tuple(clip.shape)}, but a clip of {rows} x {columns} visual tokens, for "
                f"which this session was opened, is of {self._shapes[0]} or {self._shapes[1]}: resize it as the first"
            )
        if number > self.max_clips and self.window is None:
            raise InputError(
                f"clip {number} is one more than max_clips {self.max_clips}: open the session with more, or with a "
                "window, out of whose sight the oldest clips go"
            )
        check_clips(self.variant, self.layout, number)
        if isinstance(self.asked, Schedule) and last != (number == self.asked.clips):
            raise InputError(f"clip {number} as the last one does not fit a schedule for {self.asked.clips} clips")
        self.arrived.append(self.clock())
        if self.record is not None:
            self.hashes.append(clip_hash(clip))
        self.all_fed = last
        self.waiting.append((clip, last))

    def end(self) -> None:
        """The source is over, as a live one is without a warning: what was fed last was its last clip. Where that has
        begun to be taken in, the tail comes by itself, in a slot of its own. Raises InputError where nothing was fed.
        """
        if self.closed or self.all_fed:
            return
        if not self.arrived or isinstance(self.asked, Schedule):
            wanted = self.asked.clips if isinstance(self.asked, Schedule) else "at least 1"
            raise InputError(f"the source ended after {len(self.arrived)} clips, and {wanted} were to come")
        self.all_fed = True
        if newest := self.waiting or self.looked:
            newest[-1] = (newest[-1][0], True)
        else:
            self.bare = True

    def step(self) -> Word | None:
        """One round: at most one pass, at most one word. None where none was written; see `idle`."""
        if self.closed:
            raise InputError("the session is closed: open another one")
        if self.done:
            return None
        with self.whatever_happens():
            if due := self.looks_due():
                clips, last = zip(*due, strict=True)
                sights = self.passes.vision_encoder.encode(clips, [self.layout] * len(clips))
                self.have_looked(zip(sights, last, strict=True))
            ask = self.plan()
            if ask is not None:
                self.asked_for(ask, self.passes.step([ask]))
            return self.collect(ask is None and self._waits_for_words())

    def words(self) -> Iterator[Word]:
        """Write all that can be written until another clip is fed."""
        while not self.idle:
            if (word := self.step()) is not None:
                yield word

    def close(self) -> None:
        """Give back what is held, and write the record. What was not written yet never is."""
        if not self.closed:
            while self.coming:
                self.collect(True)
            self._end("ended" if self.ended else "max_new_tokens" if self.done else "cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # A round in parts, which `session_pool.py` does for many sessions at once

    def looks_due(self) -> list[tuple[Tensor, bool]]:
        """The clips, and whether each is the last, that the vision tower should look at now."""
        if self.waiting and not self.looked and not len(self.lead) and self._wants_clip():
            return [self.waiting.popleft()]
        return []

    def have_looked(self, sights: Iterable[tuple[ClipFeatures, bool]]) -> None:
        self.looked.extend(sights)

    def plan(self, room: bool = True) -> StepRequest | None:
        """What to ask of the next pass, which has `room` for a piece or only for a word."""
        self._advance()
        others = DueRows.empty()
        if room:
            others, self.lead = self.lead[: self.width], self.lead[self.width :]
            if not len(self.lead):
                others = others + self._ride(self.width - len(others))
        speaks = not len(self.lead) and self._may_speak()
        if len(others) and self.variant.parallel and not self.joins:
            speaks = False
        if not (speaks or len(others)):
            return None
        word = self.text.feed_text() if speaks else DueRows.empty()
        stream = self.text.stream
        return StepRequest(self.batch_slot, word, others, speaks, len(self.template.header) + len(stream.written))

    def asked_for(self, ask: StepRequest, written: PendingToken | None) -> None:
        """The pass is under way."""
        if ask.sample:
            self.text.stream.write(UNKNOWN)
            self.coming.append(written)

    @property
    def word_there(self) -> bool:
        """The oldest word that was not seen yet can be had without waiting."""
        return bool(self.coming) and self.coming[0].ready.query()

    def collect(self, wait: bool) -> Word | None:
        """The oldest word that was not seen yet, where more than `ahead` are under way or nothing else can be done."""
        if not self.coming or not (wait or len(self.coming) > self.ahead):
            return None
        token, stream = self.coming.popleft().get(self.batch_slot), self.text.stream
        slot = stream.slots[len(self.written)]
        stream.written[len(self.written)] = token
        word = Word(token, slot, self.clock())
        self.written.append(word)
        if token == self.template.end:
            self.ended = True
            self._forget()
            if len(stream.counts) > slot:
                stream.complete = stream.bare = False
                del stream.counts[slot:], self.visible[slot:]
        return word

    def _forget(self) -> None:
        """Words that were asked for are not wanted, nor slots that began because of them."""
        stream = self.text.stream
        unseen = stream.slots[len(self.written) :]
        for slot in unseen:
            stream.counts[slot - 1] -= 1
        if unseen and len(stream.counts) > unseen[0]:
            stream.complete = stream.bare = False
            del stream.counts[unseen[0] :], self.visible[unseen[0] :]
        del stream.written[len(self.written) :], stream.slots[len(self.written) :]
        self.coming.clear()

    def _waits_for_words(self) -> bool:
        """Until the next word is there nothing else can be done; or, where something can since, False."""
        return True

    # When a slot begins, and whether it may speak: the same in all three ways

    def _quota(self, slot: int) -> float:
        """Words that `slot` may write while it is not known to be the last."""
        if not self.variant.streams:
            return 0
        if self.greedy:
            return float("inf")
        if slot > len(self.schedule.quotas) and not isinstance(self.asked, Schedule):
            self.schedule = make_schedule(self.asked, self.variant, 2 * slot + 1)  # begins like the shorter one
        return self.schedule.quotas[slot - 1]

    def _wants_clip(self) -> bool:
        stream = self.text.stream
        if stream.complete or len(stream.written) >= self.most:
            return False
        if not stream.counts:
            return True
        return self.greedy or stream.counts[-1] >= self._quota(len(stream.counts))

    def _may_speak(self) -> bool:
        stream = self.text.stream
        if self.ended or len(stream.written) >= self.most or not stream.counts:
            return False
        return stream.complete or stream.counts[-1] < self._quota(len(stream.counts))

    def _begin_slot(self, last: bool) -> DueRows:
        """The next clip is there whole. Returns the rows that enter with it, in feed order."""
        self.visible.append(self.clock())
        return self.text.feed_clip(last)

    # Serial

    def _open(self) -> None:
        self.passes.prefill(self.batch_slot, self.prompt)

    def _clips_to_come(self) -> bool:
        """Clips, or their end, have been fed that no slot has begun with."""
        return bool(self.waiting or self.looked or len(self.lead) or (self.bare and not self.text.stream.complete))

    def _advance(self) -> None:
        """Begin what can begin."""
        if self.looked and not len(self.lead):
            sight, last = self.looked.popleft()
            self.passes.set_clip_features(self.batch_slot, sight)
            self.lead = self._begin_slot(last)
        self._begin_tail()

    def _begin_tail(self) -> None:
        """The tail enters by itself, where nothing else is to enter before it."""
        if self.bare and not len(self.lead) and self._wants_clip():
            self.visible.append(self.clock())
            self.lead = self.text.feed_clip(True, empty=True)

    def _ride(self, room: int) -> DueRows:
        """What nobody waits for and may enter beside the words."""
        return DueRows.empty()

    # The end

    @contextlib.contextmanager
    def whatever_happens(self):
        """An error ends the session, with its record."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """End with an `error`, as the record will say."""
        if not self.closed:
            self._forget()
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._end("cancelled" if stopped else f"failed: {why}")

    def _end(self, how: str) -> None:
        self.closed = True
        try:
            self._let_go()
        finally:
            if self.record is not None:
                write_record(self.record, self._record(how))

    def _let_go(self) -> None:
        self.waiting.clear()
        self.looked.clear()
        self.passes.release(self.batch_slot)

    def _record(self, how: str) -> Record:
        asked = self.asked if isinstance(self.asked, str) else list(self.asked.quotas)
        return Record(
            versions=versions(),
            model=self.identity,
            variant=self.variant.name,
            way=self.way,
            chunk=self.chunk,
            template=self.template,
            layout=self.layout,
            window=self.window and [self.window.clips, self.window.tokens],
            schedule=asked,
            penalty=self.penalty,
            max_new_tokens=self.most,
            opened=self.opened,
            end=how,
            complete=self.text.stream.complete,
            bare=self.text.stream.bare,
            arrived=self.arrived,
            visible=self.visible,
            hashes=self.hashes,
            counts=[*self.counts],
            tokens=[word.token for word in self.written],
            slots=[word.slot for word in self.written],
            times=[word.time for word in self.written],
            about=self.about,
        )
