"""One live stream: clips are fed as they arrive, words come out as they are written, in any of three ways.

    serial      a clip is taken in, then its words are written
    fused       the next clip rides in the passes that write the words before it
    pipelined   another process takes clips in (`pipeline.py`)

The words are the same. When a slot begins is decided here, for all three; what enters the model, where and seeing what
is decided in `passes.py`. Knows nothing of video files and processes.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import InputError
from .passes import Due, Feed, Passes
from .prompts import Template
from .record import Record, clip_hash, identity, versions, write_record
from .streaming import Caption
from .timeline import Layout, Schedule, make_schedule
from .variants import Variant

WAYS = ("serial", "fused", "pipelined")
GREEDY = "greedy"
"""A schedule: write until the next clip is there."""


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

    def __init__(
        self,
        model,
        variant: Variant,
        template: Template,
        layout: Layout,
        *,
        schedule: str | Schedule = "wait-3",
        penalty: float = 1.15,
        max_new_tokens: int = 300,
        max_clips: int = 60,
        chunk: int | None = None,
        clock: Callable[[], float] = time.time,
        record: str | Path | None = None,
        about: dict | None = None,
    ):
        """`schedule` is wait-K, random-K, "greedy", or a Schedule for a known number of clips. `max_clips` and
        `max_new_tokens` size the memory. `chunk` visual tokens at most ride in a pass, by default a whole clip.
        `record` names a file for the record, to which `about` (what was asked, where the clips come from) is added.
        Raises InputError for what cannot be.
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
        if isinstance(schedule, Schedule) and schedule.clips > max_clips:
            raise InputError(f"a schedule for {schedule.clips} clips does not fit into max_clips {max_clips}")
        self.model, self.variant, self.template, self.layout = model, variant, template, layout
        self.asked, self.most, self.max_clips, self.clock = schedule, max_new_tokens, max_clips, clock
        self.greedy = schedule == GREEDY
        if isinstance(schedule, Schedule):
            self.schedule = schedule
        else:
            self.schedule = make_schedule("wait-1" if self.greedy else schedule, variant, max_clips + 1)
        self.chunk, self.penalty = chunk, penalty
        self.passes = Passes(model, layout, max_clips, max_new_tokens, chunk, penalty)
        self.passes.begin(template)
        self.text = Feed(variant, template, layout)
        """What has been written, and seen by what was written."""
        self.waiting: collections.deque[tuple[Tensor, bool]] = collections.deque()
        """Clips that have arrived and were not looked at yet."""
        self.arrived: list[float] = []
        self.visible: list[float] = []
        """When each slot began."""
        self.hashes: list[str] = []
        self.written: list[Word] = []
        self.all_fed = self.closed = False
        self.record, self.about, self.opened = record, about or {}, clock()
        self.identity = None if record is None else identity(model)
        patch = model.model.visual.patch_embed
        self._shapes = (
            (layout.tokens_per_clip * model.model.visual.spatial_merge_size**2, patch.proj.weight[0].numel()),
            (layout.tokens_per_clip, self.passes.clip.shape[1]),
        )
        self.prompt = Feed.prompt(variant, template, layout)
        self._open()

    # What a caller sees

    @property
    def counts(self) -> list[int]:
        """k_1 … of the slots that have begun."""
        return self.text.stream.counts

    @property
    def done(self) -> bool:
        """Nothing more is to be written: the answer has ended, or has as many tokens as it may."""
        return self.text.stream.ended or len(self.written) >= self.most

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip is fed."""
        return self.done or not (self._may_speak() or self._clips_to_come())

    def caption(self) -> Caption:
        """What was written so far."""
        return Caption([word.token for word in self.written], [word.slot for word in self.written], [*self.counts])

    def feed(self, clip: Tensor, last: bool = False) -> None:
        """A clip has arrived: (patches, pixels of a patch) as `prompts.clip_pixels` gives it, or (tokens of a clip, C)
        visual tokens. Raises InputError where it cannot belong to this session, which goes on without it."""
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
        if number > self.max_clips:
            raise InputError(f"clip {number} is one more than max_clips {self.max_clips}: open the session with more")
        if isinstance(self.asked, Schedule) and last != (number == self.asked.clips):
            raise InputError(f"clip {number} as the last one does not fit a schedule for {self.asked.clips} clips")
        self.arrived.append(self.clock())
        if self.record is not None:
            self.hashes.append(clip_hash(clip))
        self.all_fed = last
        self.waiting.append((clip, last))

    def step(self) -> Word | None:
        """One round: at most one word. None where none was written; see `idle`."""
        if self.closed:
            raise InputError("the session is closed: open another one")
        if self.done:
            return None
        with self._whatever_happens():
            return self._round()

    def words(self) -> Iterator[Word]:
        """Write all that can be written until another clip is fed."""
        while not self.idle:
            if (word := self.step()) is not None:
                yield word

    def close(self) -> None:
        """Give back what is held, and write the record. What was not written yet never is."""
        if not self.closed:
            self._end("ended" if self.text.stream.ended else "max_new_tokens" if self.done else "cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # When a slot begins, and whether it may speak: the same in all three ways

    def _quota(self, slot: int) -> float:
        """Words that `slot` may write while it is not known to be the last."""
        if not self.variant.streams:
            return 0
        return float("inf") if self.greedy else self.schedule.quotas[slot - 1]

    def _wants_clip(self) -> bool:
        stream = self.text.stream
        if stream.complete or not stream.counts:
            return not stream.complete
        return self.greedy or stream.counts[-1] >= self._quota(len(stream.counts))

    def _may_speak(self) -> bool:
        stream = self.text.stream
        if self.done or not stream.counts:
            return False
        return stream.complete or stream.counts[-1] < self._quota(len(stream.counts))

    def _begin_slot(self, last: bool) -> Due:
        """The next clip is there whole. Returns the rows that enter with it, in feed order."""
        self.visible.append(self.clock())
        return self.text.clip(last)

    def _note(self) -> Word:
        """Write down what the device has chosen."""
        word = Word(self.passes.newest(), len(self.counts), self.clock())
        self.text.stream.write(word.token)
        self.written.append(word)
        return word

    # Serial

    def _open(self) -> None:
        self.passes.feed(self.prompt)

    def _clips_to_come(self) -> bool:
        """Clips have been fed that no slot has begun with, and one may begin."""
        return bool(self.waiting)

    def _round(self) -> Word | None:
        if self.waiting and self._wants_clip():
            clip, last = self.waiting.popleft()
            self.passes.look(clip)
            self.passes.feed(self._begin_slot(last))
            return None
        if not self._may_speak():
            return None
        self.passes.round(self.text.word(), None, True)
        return self._note()

    # The end

    @contextlib.contextmanager
    def _whatever_happens(self):
        """An error ends the session, with its record."""
        try:
            yield
        except BaseException as error:
            self._end(f"failed: {next(iter(str(error).splitlines()), '') or type(error).__name__}")
            raise

    def _end(self, how: str) -> None:
        self.closed = True
        try:
            self._let_go()
        finally:
            if self.record is not None:
                write_record(self.record, self._record(how))

    def _let_go(self) -> None:
        self.waiting.clear()

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
            schedule=asked,
            penalty=self.penalty,
            max_new_tokens=self.most,
            opened=self.opened,
            end=how,
            complete=self.text.stream.complete,
            arrived=self.arrived,
            visible=self.visible,
            hashes=self.hashes,
            counts=[*self.counts],
            tokens=[word.token for word in self.written],
            slots=[word.slot for word in self.written],
            times=[word.time for word in self.written],
            about=self.about,
        )


def open_session(model, variant: Variant, template: Template, layout: Layout, *, way: str = "serial", **options):
    """A Session that runs in `way`; `options` as its own. For "pipelined", `pair` is the pipeline.Pair to run on."""
    from .fused import FusedSession
    from .pipeline import PipelinedSession

    kinds: dict[str, Callable[..., Session]] = {kind.way: kind for kind in (Session, FusedSession, PipelinedSession)}
    if way not in kinds:
        raise InputError(f"unknown way {way!r}: choose one of {', '.join(WAYS)}")
    return kinds[way](model, variant, template, layout, **options)
