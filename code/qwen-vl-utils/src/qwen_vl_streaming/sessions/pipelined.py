"""Rounds in which clips enter the model in another process. Their keys and values come back in one transfer per clip,
while this process writes."""

import collections
import functools

import numpy as np
import torch
from torch import Tensor

from ..common.clock import now
from ..engine.device_event import DeviceEvent
from ..engine.step_runner import CLIPS_AHEAD, StepRunner
from ..engine.stream_state import StreamState
from ..timeline.timeline import Layout
from .perception_client import PIXEL_BUFFERS, PerceptionClient
from .serial import SerialRounds

POLL_SECONDS = 0.2
"""How long a step waits for a clip, so that its caller can stop in between."""


class PipelinedRounds(SerialRounds):
    """The text side of a session. A slot begins once its clip's keys and values have been received."""

    mode = "pipelined"

    def __init__(self, *args, perception_client: PerceptionClient, **options):
        """`perception_client` is the connection to the other process; it serves one session at a time."""
        self.perception_client = perception_client
        super().__init__(*args, **options)

    @staticmethod
    def make_runner(model, layout: Layout, *sizes) -> StepRunner:
        runner = StepRunner.single(model, layout, *sizes)
        runner.warm_up()
        return runner

    def open(self) -> None:
        super().open()
        self.visual = StreamState(self.variant, self.template, self.layout, self.window)
        """The visual side, as far as clips were received."""
        self.sent: collections.deque[bool] = collections.deque()
        """For each clip that was sent and not received, whether it is the last."""
        self.received = 0
        """Clips that were received and whose slot has not begun."""
        self.copying: collections.deque[tuple[int, DeviceEvent]] = collections.deque()
        """KV transfer buffers that are being copied into the cache, and the event after which they are free."""
        self.last_news = 0.0
        """When a clip was last received, or the first of those in `sent` was sent."""
        itemsize = max(torch.float32.itemsize, self.model.dtype.itemsize)
        self.number = self.perception_client.open(
            self.runner.cache.new_kv_buffer(self.layout.tokens_per_clip + self.layout.tail),
            max(rows * columns for rows, columns in self.clip_shapes) * itemsize,
            self.variant.name,
            self.template,
            self.layout,
            self.max_clips,
            self.chunk,
            self.window,
        )

    def arrive(self, clip: Tensor) -> None:
        super().arrive(clip)
        self._send()

    def clips_to_encode(self) -> list[Tensor]:
        return []

    def _begin_slots(self) -> None:
        self._send()
        while self.sent and self._receive(0):
            pass
        if self.received and not len(self.lead) and self.scheduler.may_begin_slot:
            self.received -= 1
            rows = self._begin_slot()
            self.lead = rows[rows.text]
            self._send()
        self._begin_tail()

    def wait(self) -> bool:
        while self.sent and self.pending and not self.token_ready:
            if self._receive(0):
                return False
        silent = self.sent and not (self.pending or self.received or self._receive(POLL_SECONDS))
        if silent and now() - self.last_news > self.perception_client.patience:
            raise self.perception_client.silent()
        return True

    def _send(self) -> None:
        """Send clips, as far as their positions are known: if these depend on what slots write and the schedule does
        not say it beforehand, a clip is sent only when the slot before it begins. At most as many clips are under way
        as there are KV transfer buffers, and one more; or as a window has room for."""
        held = self.scheduler.counts_unknown and self.variant.count == "rounds"
        most = 1 if held else PIXEL_BUFFERS if self.window is None else CLIPS_AHEAD
        while self.waiting and not self.scheduler.done and len(self.sent) + self.received < most:
            counts, pixel_buffer = self.scheduler.counts_before_next_clip(), self.scheduler.committed % PIXEL_BUFFERS
            clip, last = self.waiting.popleft(), self.scheduler.commit()
            if not self.sent:
                self.last_news = now()
            self.sent.append(last)
            fed = (clip if clip.dtype == torch.float32 else clip.to(self.model.dtype)).cpu().contiguous()
            raw = fed.flatten().view(torch.uint8).numpy()
            room = self.perception_client.pixel_buffers[pixel_buffer].numpy()[: len(raw)]
            self.perception_client.send(
                "clip",
                self.number,
                pixel_buffer,
                fed.shape,
                fed.dtype,
                last,
                counts,
                before=functools.partial(np.copyto, room, raw),
            )

    def _receive(self, seconds: float) -> bool:
        """Receive a clip, waiting for at most `seconds`. Returns whether one came."""
        self._free_buffers(wait=seconds > 0)
        if (message := self.perception_client.receive(seconds)) is None:
            return False
        self.last_news = now()
        _, _, kv_buffer = message
        due = self.visual.feed_clip(self.sent.popleft())
        index = self.batch_slot.visual_index(due)
        self.runner.cache.copy_in(index, self.perception_client.kv_buffers[kv_buffer])
        self.copying.append((kv_buffer, DeviceEvent(self.model.device)))
        self.received += 1
        return True

    def _free_buffers(self, wait: bool) -> None:
        """Return the KV transfer buffers that have been copied."""
        while self.copying and (wait or self.copying[0][1].query()):
            kv_buffer, copied = self.copying.popleft()
            copied.synchronize()
            self.perception_client.send("empty", self.number, kv_buffer)

    def release(self) -> None:
        super().release()
        for _, copied in self.copying:
            copied.synchronize()  # the next session receives its clips in the same buffers
        self.perception_client.finish(self.number)
