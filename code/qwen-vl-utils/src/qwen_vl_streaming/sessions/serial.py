"""The rounds of a session: what the next forward step is asked for, and which tokens are read. Here, a clip enters the
model, and then its slot's tokens are written; `fused.py` and `pipelined.py` differ in how clips enter.

`slot_scheduler.py` decides when a slot begins and a token is written; the rounds do it. Knows nothing of who feeds the
clips, and of records.
"""

import collections

from torch import Tensor

from ..engine.step_request import PendingToken, StepRequest
from ..engine.step_runner import StepRunner
from ..engine.stream_state import DueRows, StreamState
from ..engine.vision_encoder import ClipFeatures
from ..model.prompts import Template
from ..timeline.plan import Window
from ..timeline.timeline import Layout
from ..timeline.variants import Variant
from .session_log import SessionLog, TimedToken
from .slot_scheduler import SlotScheduler

UNKNOWN = -1
"""Stands for a token's id until the host has read it."""


def clip_shapes(model, layout: Layout) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shape of a clip of `layout` as pixels, and as visual tokens of `model`."""
    visual, hidden = model.model.visual, model.config.text_config.hidden_size
    patches = layout.tokens_per_clip * visual.spatial_merge_size**2
    return (patches, visual.patch_embed.proj.weight[0].numel()), (layout.tokens_per_clip, hidden)


class SerialRounds:
    """A round in parts, which a `Session` does one after the other, and a `SessionPool` for many sessions at once."""

    mode = "serial"

    def __init__(
        self,
        model,
        variant: Variant,
        template: Template,
        layout: Layout,
        *,
        runner: StepRunner,
        scheduler: SlotScheduler,
        log: SessionLog,
        window: Window | None,
        max_clips: int,
        chunk: int | None,
        ahead: int,
    ):
        """Takes a batch slot of `runner`, which `release` gives back. Arguments as in `Session`; slots that begin and
        tokens that are written go into `log`. Raises InputError if there is no room."""
        self.model, self.variant, self.template, self.layout = model, variant, template, layout
        self.runner, self.scheduler, self.log, self.window = runner, scheduler, log, window
        self.max_clips, self.chunk, self.ahead = max_clips, chunk, ahead
        whole = runner.chunk_size * runner.clip_chunks
        self.width = min(chunk or whole, whole)
        """Rows of a clip that enter in one step, at most."""
        self.batch_slot = runner.acquire(template, layout, max_clips, scheduler.max_new_tokens, window)
        self.text = StreamState(variant, template, layout, window)
        """What the text side has written and may attend to."""
        self.waiting: collections.deque[Tensor] = collections.deque()
        """Clips that have arrived and that the vision encoder, or another process, has not been given."""
        self.encoded: collections.deque[ClipFeatures] = collections.deque()
        """Clips that the vision encoder has encoded and that have not started to enter the language model."""
        self.lead = DueRows.empty()
        """Rows that must enter before the next token."""
        self.pending: collections.deque[PendingToken] = collections.deque()
        """Tokens that the device was asked for and the host has not read."""
        self.clip_shapes = clip_shapes(model, layout)

    @staticmethod
    def make_runner(model, layout: Layout, *sizes) -> StepRunner:
        """A runner of one session; `sizes` as in `StepRunner.single`."""
        runner = StepRunner.single(model, layout, *sizes)
        runner.warm_up()
        runner.vision_encoder.capture(layout.grid)
        return runner

    def open(self) -> None:
        """Feed the prompt: at once if the runner has one batch slot, else in the next steps, beside the chunks of other
        sessions. A step for each prompt would delay many sessions that open together by seconds."""
        prompt = StreamState.prompt(self.variant, self.template, self.layout, self.window)
        if len(self.runner.all_slots) == 1:
            self.runner.prefill(self.batch_slot, prompt)
        else:
            self.lead = prompt

    @property
    def idle(self) -> bool:
        """Nothing can be done until another clip arrives."""
        schedule = self.scheduler
        return schedule.done or not (self.pending or len(self.lead) or schedule.may_write or schedule.slots_waiting)

    def arrive(self, clip: Tensor) -> None:
        """A clip has arrived."""
        self.waiting.append(clip)

    def clips_to_encode(self) -> list[Tensor]:
        """Takes the clips that the vision encoder should encode now out of `waiting`; they belong into `encoded`."""
        ready = not self.encoded and not len(self.lead) and self.scheduler.may_begin_slot
        return [self.waiting.popleft()] if self.waiting and ready else []

    def plan(self, chunks: int | None = None) -> StepRequest | None:
        """What to request of the next forward step, which has room for `chunks` chunks; default: for any number."""
        self._begin_slots()
        width = self.width if chunks is None else min(self.width, chunks * self.runner.chunk_size)
        rows, self.lead = self.lead.split(width)
        if not len(self.lead):
            rows = rows + self._rows_ahead(max(min(width, self.width_ahead) - len(rows), 0))
        sample = not len(self.lead) and self.scheduler.may_write
        if len(rows) and self.variant.parallel and self.mode == "serial":
            sample = False
        if not (sample or len(rows)):
            return None
        decode = self.text.feed_text() if sample else DueRows.empty()
        next_row = len(self.template.header) + self.scheduler.requested_tokens
        return StepRequest(self.batch_slot, decode, rows, sample, next_row)

    @property
    def width_ahead(self) -> int:
        """Rows of a clip that enter in one step, at most, before the slot that waits for them begins: a chunk beside a
        token, else a whole clip."""
        return min(self.width, self.runner.chunk_size) if self.scheduler.may_write else self.width

    def requested(self, request: StepRequest, pending: PendingToken | None) -> None:
        """The forward step was launched."""
        if request.sample:
            self.scheduler.request()
            self.text.stream.write(UNKNOWN)
            assert pending is not None  # a step in which a token is chosen returns it
            self.pending.append(pending)

    @property
    def token_ready(self) -> bool:
        """The oldest pending token can be read without waiting."""
        return bool(self.pending) and self.pending[0].ready.query()

    def collect(self, wait: bool) -> TimedToken | None:
        """Read the oldest pending token, if more than `ahead` are pending, the next one depends on it, or the caller
        wants to `wait` for it."""
        ahead = 0 if self.scheduler.reads_first else self.ahead
        if not self.pending or not (wait or len(self.pending) > ahead):
            return None
        token = self.pending.popleft().get(self.batch_slot)
        self.text.stream.written[len(self.log.written)] = token
        slot = self.scheduler.read(token == self.template.end, token == self.template.end_of_slot)
        timed = self.log.write(token, slot)
        if self.scheduler.ended:
            self.pending.clear()
            del self.log.visible[len(self.scheduler.counts) :]
        return timed

    def drop_pending(self) -> None:
        """Forget the tokens that were not read, and the slots that began because of them."""
        self.scheduler.drop_pending()
        self.pending.clear()
        del self.log.visible[len(self.scheduler.counts) :]

    def release(self) -> None:
        """Give back what `runner` lent."""
        self.waiting.clear()
        self.encoded.clear()
        self.runner.release(self.batch_slot)

    def wait(self) -> bool:
        """Called when nothing could be requested. Returns whether to wait for the oldest pending token; else something
        else has happened by which the session can go on."""
        return True

    # What the execution modes do differently

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

    # For all modes

    def _begin_slot(self) -> DueRows:
        """Begin a slot with the next clip, whose rows are returned with the text rows that follow, in feed order."""
        self.log.begin_slot()
        self.scheduler.begin_slot()
        return self.text.feed_clip(self.scheduler.complete)

    def _begin_tail(self) -> None:
        """Begin the slot without a clip, if that is due and nothing is to enter before the tail."""
        if self.scheduler.tail_is_next and self.scheduler.may_begin_slot and not len(self.lead):
            self.log.begin_slot()
            self.scheduler.begin_slot()
            self.lead = self.text.feed_clip(True, empty=True)
