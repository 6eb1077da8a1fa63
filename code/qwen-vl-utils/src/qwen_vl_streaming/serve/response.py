"""One answer of one model to one viewer: from the worker's events to the protocol's messages and the figures."""

import functools
import secrets
import statistics
from collections import deque
from collections.abc import Callable

from ..common.clock import now
from ..live.screen import Pieces
from .catalog import ServedModel
from .connection import Connection
from .frames import PreparedClip
from .metrics import Metrics
from .workers import Worker

MOST_TEXT = 100_000
"""Characters of the newest text that `response.done` repeats."""


class Response:
    """Created when there is room for it in `worker`; over when the worker says so."""

    def __init__(
        self,
        model: ServedModel,
        worker: Worker,
        most: int | None,
        captured: Callable[[int], tuple[float, float | None] | None],
        dropped: Callable[[], int],
        connection: Connection,
        metrics: Metrics,
    ):
        """Args:
        most: Clips to watch, or None for all.
        captured: For a clip (1…), when it was complete and the capture time of its newest frame.
        dropped: How many frames were not used.
        """
        self.id = secrets.token_urlsafe(12)
        self.model, self.worker, self.most, self.captured, self.dropped = model, worker, most, captured, dropped
        self.connection, self.metrics = connection, metrics
        self.pieces, self.text = Pieces(model.decode, model.end_of_slot_id), ""
        self.opened = now()
        self.sent_clips = self.slots = self.tokens = self.misses = 0
        self.ages: deque[float] = deque(maxlen=10_000)
        self.newest: tuple[int, float, float | None] | None = None
        """Slot, time and time per output token of the newest token."""
        self.missed_slot = 0
        self.over = False
        self.why: str | None = None
        """The status to report in place of "cancelled"."""
        metrics.sessions.labels(model.name).inc()

    @property
    def waiting(self) -> int:
        """Clips whose slot has not begun."""
        return max(0, self.sent_clips - self.slots)

    def feed(self, clip: PreparedClip, completed: float, last: bool, at_once: bool) -> None:
        """`at_once`: in this thread, if that needs no wait."""
        if self.over or (self.most is not None and self.sent_clips >= self.most):
            return
        self.sent_clips += 1
        last = last or self.sent_clips == self.most
        send = self.worker.send_clip if at_once else functools.partial(self.worker.send, "clip")
        send(self.id, clip, completed, last)

    def end(self) -> None:
        """The source has ended without a clip that was announced as the last."""
        if not self.over and self.sent_clips != self.most:
            self.worker.send("end", self.id)

    def cancel(self, why: str) -> None:
        """Stop now; `why` is the status to report."""
        if not self.over and self.why is None:
            self.why = why
            self.worker.send("cancel", self.id, why)

    # What the worker says

    def begun(self, slots: int) -> None:
        self.slots = slots

    def token(self, token: int, slot: int, time: float) -> None:
        if token != self.model.end_of_slot_id:
            self.tokens += 1
            self.metrics.tokens.labels(self.model.name).inc()
        following = self.captured(slot + 1)
        if following and time > following[0] and slot > self.missed_slot:
            self.missed_slot = slot
            self.misses += 1
        self._say(self.pieces.add(token), [token], slot, time)
        self._measure(slot, time)  # once it is said, which the histograms would delay
        self.metrics.share.labels(self.model.name).observe(max(0.0, now() - time))

    def _newest_frame(self, slot: int, time: float) -> tuple[float, float | None]:
        """When the newest clip that a token of `slot` saw was complete, and the capture time of its newest frame."""
        return self.captured(min(slot, self.sent_clips)) or (time, None)

    def _say(self, delta: str, ids: list[int], slot: int, time: float) -> None:
        self.text = (self.text + delta)[-MOST_TEXT:]
        completed, capture_time = self._newest_frame(slot, time)
        self.connection.send(
            "response.output_text.delta",
            response_id=self.id,
            model=self.model.name,
            delta=delta,
            token_ids=ids,
            slot=slot,
            time=round(time - self.opened, 4),
            capture_time=capture_time,
            age_ms=round(1e3 * (time - completed), 2),
            waiting=self.waiting,
            deadline_misses=self.misses,
        )

    def _measure(self, slot: int, time: float) -> None:
        metrics, name = self.metrics, self.model.name
        age = time - self._newest_frame(slot, time)[0]
        self.ages.append(age)
        metrics.age.labels(name).observe(max(0.0, age))
        gap = None
        if self.newest is None:
            if first := self.captured(1):
                metrics.ttft.labels(name).observe(max(0.0, time - first[0]))
        elif self.newest[0] == slot:
            gap = time - self.newest[1]
            metrics.tpot.labels(name).observe(gap)
            if self.newest[2] is not None:
                metrics.jitter.labels(name).observe(abs(gap - self.newest[2]))
        self.newest = slot, time, gap

    def done(self, how: str, figures: dict | None, recorded: bool) -> None:
        self.over = True
        if self.newest is not None and (rest := self.pieces.rest()):
            slot, time, _ = self.newest
            self._say(rest, [], slot, time)
        name, ages = self.model.name, sorted(self.ages)
        status = {"completed": "completed", "cancelled": self.why or "cancelled"}.get(how, "failed")
        if status == "failed":
            what = {"out_of_memory": "ran out of memory", "lost": "was lost"}.get(how, "has failed")
            code = how if how == "out_of_memory" else "failed"
            self.connection.error(code, f"model {name} {what}: this session has ended")
        found = figures or {"clips": self.slots, "tokens_per_second": None, "missed_deadlines": self.misses}
        report = {
            "tokens": self.tokens,
            "clips": found["clips"],
            "tokens_per_second": found["tokens_per_second"],
            "age_ms": {
                "median": round(1e3 * statistics.median(ages), 2) if ages else None,
                "p95": round(1e3 * ages[int(0.95 * (len(ages) - 1))], 2) if ages else None,
            },
            "deadline_misses": found["missed_deadlines"],
            "clips_waiting": self.waiting if status != "completed" else 0,
            "dropped": self.dropped(),
        }
        response = {
            "id": self.id,
            "model": name,
            "status": status,
            "text": self.text,
            "record_id": self.id if recorded else None,
            "figures": report,
        }
        self.connection.send("response.done", response=response)
        self.metrics.sessions.labels(name).dec()
        self.metrics.misses.labels(name).inc(found["missed_deadlines"])
        self.metrics.responses.labels(name, status).inc()
