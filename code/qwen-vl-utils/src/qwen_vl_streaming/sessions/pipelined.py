"""A session whose clips another process takes in, and hands over their keys and values, each clip's in one transfer,
while this process writes."""

import collections
import functools

import numpy as np
import torch
from torch import Tensor

from ..common.clock import now
from ..common.errors import InputError
from ..engine.device_event import DeviceEvent
from ..engine.step_runner import CLIPS_AHEAD
from ..engine.stream_state import StreamState
from .perception_client import PIXEL_BUFFERS, PerceptionClient
from .session import Session, Word

GLANCE = 0.2
"""Seconds that a step waits for a clip, so that whoever calls it may stop meanwhile."""


class PipelinedSession(Session):
    """Generation's side of a session. A clip is seen once its slot begins, and it must have come over whole."""

    way = "pipelined"
    joins = True

    def __init__(self, *args, pair: PerceptionClient | None = None, **options):
        if pair is None:
            raise InputError("a pipelined session needs a pair: start a pair.Pair and give it as `pair`")
        self.pair = pair
        super().__init__(*args, **options)

    def _open(self) -> None:
        super()._open()
        self.sight = StreamState(self.variant, self.template, self.layout, self.window)
        """Where what comes over belongs."""
        self.begun = 0
        """How many clips were sent."""
        self.sent: collections.deque[bool] = collections.deque()
        """Of each clip that was sent and has not come over, whether it is the last."""
        self.whole: collections.deque[bool] = collections.deque()
        """The same of each clip that has come over and that no slot has begun with."""
        self.leaving: collections.deque[tuple[int, DeviceEvent]] = collections.deque()
        """Carriers out of which keys and values are being laid into pages, and when that is done."""
        self.heard = 0.0
        """When a clip last came over, or was the first to be sent."""
        itemsize = max(torch.float32.itemsize, self.model.dtype.itemsize)
        self.number = self.pair.open(
            self.passes.new_kv_buffer(self.layout),
            max(rows * columns for rows, columns in self._shapes) * itemsize,
            self.variant.name,
            self.template,
            self.layout,
            self.max_clips,
            self.chunk,
            self.window,
        )

    def feed(self, clip: Tensor, last: bool = False) -> None:
        super().feed(clip, last)
        with self.whatever_happens():
            self._send()

    def step(self) -> Word | None:
        word = super().step()
        if word is None and not self.closed and not self.coming and not self._may_speak() and self.sent:
            with self.whatever_happens():
                silent = not self.whole and not self._receive(GLANCE)
                if silent and now() - self.heard > self.pair.patience:
                    raise self.pair.silent()
        return word

    def looks_due(self) -> list:
        return []

    def _waits_for_words(self) -> bool:
        while self.sent and self.coming and not self.word_there:
            if self._receive(0):
                return False
        return True

    def _clips_to_come(self) -> bool:
        return super()._clips_to_come() or bool(self.sent or self.whole)

    def _send(self) -> None:
        """Let perception have what it can place: where a clip's positions depend on what slots write, and that is not
        agreed beforehand, only when the slot before it begins. No more than there are carriers for, and one that is
        under way; or than a window has room for."""
        held = self.greedy and self.variant.count == "rounds"
        most = 1 if held else PIXEL_BUFFERS if self.window is None else CLIPS_AHEAD
        while self.waiting and not self.done and (ahead := len(self.sent) + len(self.whole)) < most:
            if held:
                counts = [*self.counts]
            else:
                slots = len(self.counts) + ahead
                counts = [0 if self.greedy else self._quota(slot + 1) for slot in range(slots)]
            clip, last = self.waiting.popleft()
            if not self.sent:
                self.heard = now()
            self.sent.append(last)
            fed = (clip if clip.dtype == torch.float32 else clip.to(self.model.dtype)).cpu().contiguous()
            raw, pixel_buffer = fed.flatten().view(torch.uint8).numpy(), self.begun % PIXEL_BUFFERS
            room = self.pair.pixel_buffers[pixel_buffer].numpy()[: len(raw)]
            put = functools.partial(np.copyto, room, raw)
            self.pair.order("clip", self.number, pixel_buffer, fed.shape, fed.dtype, last, counts, before=put)
            self.begun += 1

    def _receive(self, seconds: float) -> bool:
        """Take what has come over, waiting for at most `seconds`. Returns whether anything has."""
        self._give_back(wait=seconds > 0)
        if (said := self.pair.hear(seconds)) is None:
            return False
        self.heard = now()
        _, _, kv_buffer = said
        last = self.sent.popleft()
        self.passes.copy_in(self.batch_slot, self.sight.feed_clip(last), self.pair.kv_buffers[kv_buffer])
        self.leaving.append((kv_buffer, DeviceEvent(self.model.device)))
        self.whole.append(last)
        return True

    def _give_back(self, wait: bool) -> None:
        """Carriers that are empty again."""
        while self.leaving and (wait or self.leaving[0][1].query()):
            kv_buffer, there = self.leaving.popleft()
            there.synchronize()
            self.pair.order("empty", self.number, kv_buffer)

    def _advance(self) -> None:
        self._send()
        while self.sent and self._receive(0):
            pass
        if self.whole and not len(self.lead) and self._wants_clip():
            lead = self._begin_slot(self.whole.popleft())
            self.lead = lead[lead.rows.text]
            self._send()
        if not (self.waiting or self.sent or self.whole):
            self._begin_tail()

    def _let_go(self) -> None:
        super()._let_go()
        for _, there in self.leaving:
            there.synchronize()  # the next session's clips come over in the same
        self.pair.finish(self.number)
