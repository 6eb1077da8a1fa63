"""One viewer's sessions, in the protocol of docs/serving.md: what is asked, the frames that come, the responses.

Runs in the event loop and never blocks it: pictures are decoded in threads, models run elsewhere. A client's frames are
handled one after the other, so that a flood fills only its own socket.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.websockets import WebSocket
from torch import Tensor

from ..common.clock import now
from ..common.errors import InputError
from ..video.clip_recorder import ClipRecorder
from ..video.frames import FRAMES_PER_CLIP
from .admission import Ticket
from .connection import GOING_AWAY, Connection, Refused
from .frames import FORMATS, BadFrame, ClipBuilder, PreparedClip, decode_picture, prepare_clip
from .own_source import Opened, OwnSource, ShownClip
from .request import Plan, Request, integer, is_number, read_request
from .response import Response
from .workers import Worker

if TYPE_CHECKING:
    from .app import Server

logger = logging.getLogger(__name__)

SOURCES_CLOSING = 2
"""Sources of the server's own that one viewer may have open, those that are closing included."""


class Viewer:
    def __init__(self, socket: WebSocket, server: "Server"):
        self.server, self.limits = server, server.settings.limits
        self.connection = Connection(socket, self.limits)
        self.send, self.error = self.connection.send, self.connection.error
        self.dropped, self.progress = 0, 0.0
        self.threads: list[threading.Thread] = []
        """Those that read sources of the server's own; one may outlive its session."""
        self._forget()

    def _forget(self) -> None:
        """Ready for another session.update."""
        self.ticket: Ticket | None = None
        self.responses: dict[str, Response] = {}
        self.builder: ClipBuilder | None = None
        self.size = 0, 0
        """(height, width) of the frames that the client should send."""
        self.own: OwnSource | None = None
        self.recorder: ClipRecorder | None = None
        self.ended = False
        self.clips: list[tuple[float, float | None]] = []
        """Of each clip, when it was complete, and the capture time of its newest frame."""

    async def run(self) -> None:
        """Serve the connection until either side ends it."""
        self.send("session.created", session=self.server.about(secrets.token_urlsafe(9)))
        await self.connection.run(self._handle, self._busy)
        self._leave("lost" if self.connection.gone else "cancelled")
        await self._responses_over()
        await self.connection.close()

    async def stop(self) -> None:
        """The server stops: end the session with its records, notify the client, and close."""
        self.error("server_stopping", "the server stops: connect again later")
        self._leave("cancelled")
        await self._responses_over()
        self.connection.stop(GOING_AWAY)

    async def _responses_over(self, seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not self._all_over() and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def _all_over(self) -> bool:
        return all(response.over for response in self.responses.values())

    def _busy(self) -> bool:
        """The client need not send anything now."""
        return self.ticket is not None or bool(self.own and not self.ended) or (self.ended and not self._all_over())

    def _leave(self, why: str) -> None:
        """Give up what this viewer has or waits for."""
        if self.ticket is not None:
            self.server.admission.leave(self.ticket)
            self.ticket = None
        if self.own is not None:
            self.own.stop()
        for response in self.responses.values():
            response.cancel(why)

    async def _handle(self, event: dict) -> None:
        stalls = time.monotonic() - self.progress > self.limits.seconds_idle
        if stalls and not (self._all_over() or self._busy()):
            self.connection.idle()
        match event["type"]:
            case "session.update":
                self._update(event.get("session"))
            case "input_video_frame.append":
                try:
                    await self._append(event)
                except BadFrame as bad:
                    self.server.metrics.frames.labels("refused").inc()
                    raise Refused(bad.code, str(bad)) from bad
            case "input_video.end":
                await self._end_input()
            case "response.cancel":
                self._leave("cancelled")
                self.ended = True
            case kind:
                raise Refused("invalid_event", f"unknown type {kind[:50]!r}")

    # session.update

    def _update(self, asked) -> None:
        if self.ticket or (self.own and not self.ended) or not self._all_over():
            raise Refused("invalid_event", "a session runs or waits already: send response.cancel first")
        if self.server.stopping:
            raise Refused("server_stopping", "the server stops: connect again later")
        request = read_request(asked, self.server.models, self.server.settings)
        self._forget()
        if request.own_source is not None:
            self.threads = [thread for thread in self.threads if thread.is_alive()]
            if len(self.threads) == SOURCES_CLOSING:
                raise Refused("invalid_event", "the sources before have not ended yet: try again in a second")
            self.own = self.server.own_source(request.own_source, request.models[0], self._notify_own(request))
            self.own.keep = self._keep
            self.threads.append(self.own.thread)
            return
        source, (height, width) = request.source, request.picture
        clips = None if request.frames is None else -(-request.frames // FRAMES_PER_CLIP)
        budget = request.models[0].budget
        size = budget.size(height, width, frames=FRAMES_PER_CLIP * (clips or 0))

        def begin() -> None:
            self.builder, self.size = ClipBuilder(request.fps, request.frames), size

        about: dict = {"source": "client"}
        if clips is not None:  # by which `replay --video` finds the same clips
            about["video"] = {"fps": request.fps, "budget": asdict(budget)}
        self._ask_for_room(request, Opened(size, FRAMES_PER_CLIP / request.fps, clips, about), source, begin)

    def _notify_own(self, request: Request) -> Callable[[Opened | ShownClip | Exception | None], None]:
        """What to do with what a source of the server's own says."""

        def notify(what: Opened | ShownClip | Exception | None) -> None:
            own = self.own
            if own is None or own.stopped:
                return
            if isinstance(what, Opened):
                source = {**request.source, "width": what.size[1], "height": what.size[0]}
                try:
                    self._ask_for_room(request, what, source, own.begin)
                except (Refused, InputError) as refused:
                    own.stop()
                    self.ended = True
                    self.error(refused.code if isinstance(refused, Refused) else "invalid_event", str(refused))
            elif isinstance(what, ShownClip):
                for number, (picture, moment) in enumerate(zip(what.pictures, what.times, strict=True), 1):
                    last = what.last and number == len(what.pictures)
                    shown = {"time": moment, "bytes": len(picture), **({"last": True} if last else {})}
                    self.send("output_video_frame", droppable=not last, binary=picture, **shown)
                self._feed(what.clip, what.completed, what.times[-1], what.last)
            else:
                if what is not None:
                    self.error("source_failed", str(what))
                self._end_responses(explain=what is None)

        return notify

    def _ask_for_room(self, request: Request, opened: Opened, source: dict, begin: Callable[[], None]) -> None:
        """Ask for a session in each model; as soon as there is room, open them and call `begin`. Raises Refused."""
        plans = {model.name: self.server.plan(model, request.question, opened) for model in request.models}

        def granted(workers: dict[str, Worker] | None) -> None:
            self.ticket = None
            if workers is None:
                self._leave("cancelled")
                self.ended = True
                return self.error("failed", "the model is not available any more")
            about = {**opened.about, "source": source.get("name", "client"), "question": request.question}
            self._open(workers, plans, request, about)
            (height, width), window = opened.size, self.server.settings.window
            session = {
                "models": [*workers],
                "question": request.question,
                "schedule": request.schedules[request.models[0].name],
                "source": source,
                "frame": {"width": width, "height": height},
                "window": window and list(window),
            }
            self.send("session.updated", session=session)
            for response in self.responses.values():
                self.send("response.created", response={"id": response.id, "model": response.model.name})
            self.progress = time.monotonic()
            begin()

        self.ticket = Ticket(
            {name: plan.blocks for name, plan in plans.items()},
            granted,
            lambda place: self.send("session.queued", place=place),
        )
        if not self.server.admission.request(self.ticket):
            self.ticket = None
            raise Refused("queue_full", "all sessions are taken and too many viewers wait: try again later")

    def _open(self, workers: dict[str, Worker], plans: dict[str, Plan], request: Request, about: dict) -> None:
        def send(message: dict) -> None:
            self.send(message.pop("type"), **message)

        for name, worker in workers.items():
            plan, model = plans[name], self.server.models[name]
            response = Response(model, worker, self._captured, send, self.server.metrics, plan.most)
            response.dropped = lambda: self.dropped
            self.responses[name] = response
            record = self.server.record_path(response.id, model.variant.name)
            if request.keep:
                self.recorder = self.recorder or ClipRecorder(record.with_suffix(".clips.safetensors"))
                about["kept"] = self.recorder.path.name
            options = {**plan.limits, "schedule": request.schedules[name], "record": record, "about": dict(about)}
            worker.open(response.id, response, plan.blocks, plan.template, plan.layout, options)

    # Frames

    def _captured(self, clip: int) -> tuple[float, float | None] | None:
        return self.clips[clip - 1] if 1 <= clip <= len(self.clips) else None

    async def _append(self, event: dict) -> None:
        data = await self.connection.receive("bytes")
        arrived = now()
        size, form, moment = integer(event, "bytes", 1, 2**31), event.get("format"), event.get("time")
        if size != len(data):
            raise Refused("invalid_event", f"{size} bytes were announced, but {len(data)} came")
        if len(data) > self.limits.frame_bytes:
            raise BadFrame("frame_too_large", f"{len(data)} bytes: at most {self.limits.frame_bytes} are allowed")
        if form not in FORMATS:
            raise Refused("invalid_event", f"format must be one of {', '.join(FORMATS)}")
        if moment is None or not is_number(moment) or not abs(moment) < 1e9:
            raise Refused("invalid_event", "time must be the capture time in seconds")
        if self.builder is None or self.ended:
            raise Refused("invalid_event", "no session takes frames now: send session.update, wait for session.updated")
        builder = self.builder
        if (missed := builder.place(moment)) is None:
            self.dropped += 1
            self.server.metrics.frames.labels("dropped").inc()
        else:
            used = await self.server.in_thread(self._take, builder, data, form, missed)
            self.server.metrics.frames.labels("used").inc()
            for prepared, last in used:
                self._feed(prepared, arrived, moment, last)
                self.server.share(self.responses, now() - arrived)
        self.send(
            "input_video_frame.acknowledged",
            droppable=True,
            event_id=event.get("event_id"),
            time=moment,
            age_ms=round(1e3 * (now() - arrived), 2),
            dropped=self.dropped,
            waiting={name: response.waiting for name, response in self.responses.items()},
            deadline_misses={name: response.misses for name, response in self.responses.items()},
        )

    def _take(self, builder: ClipBuilder, data: bytes, form: str, missed: int) -> list[tuple[PreparedClip, bool]]:
        """In a thread: decode a picture, and prepare the clips that it completes."""
        return self._prepare(builder.add(decode_picture(data, form, self.limits.pixels, self.size), missed))

    def _prepare(self, clips: list[tuple[Tensor, bool]]) -> list[tuple[PreparedClip, bool]]:
        processor, dtype = self.server.processor, self.server.settings.dtype
        for frames, _ in clips:
            self._keep(frames)
        return [(prepare_clip(processor, frames, dtype), last) for frames, last in clips]

    def _keep(self, frames: Tensor) -> None:
        if self.recorder is not None:
            try:
                self.recorder.add(frames)
            except InputError as error:
                logger.error("%s", error)
                self.recorder = None

    def _feed(self, clip: PreparedClip, completed: float, moment: float | None, last: bool) -> None:
        self.clips.append((completed, moment))
        self.progress = time.monotonic()
        self.ended = self.ended or last
        for response in self.responses.values():
            response.feed(clip, completed, last)
            if response.waiting > self.limits.clips_waiting:
                response.cancel("too_slow")

    async def _end_input(self) -> None:
        if self.own is not None and not self.ended:
            self.own.stop()
            return self._end_responses()
        if (builder := self.builder) is None:
            raise Refused("invalid_event", "no session takes frames now")
        if not self.ended:
            at = now()
            for prepared, last in await self.server.in_thread(lambda: self._prepare(builder.finish())):
                self._feed(prepared, at, self.clips[-1][1] if self.clips else 0.0, last)
        self._end_responses()

    def _end_responses(self, explain: bool = True) -> None:
        if self.ended:
            return
        self.ended = True
        if not self.clips:
            if explain:
                self.error("invalid_event", "the source has ended before one clip was complete")
            return self._leave("cancelled")
        for response in self.responses.values():
            response.end()


def kept_clips(record: Path, about: dict) -> Path | None:
    """The file of the clips that a viewer agreed to have kept, for the record in `record`."""
    name = about.get("kept")
    return record.with_name(name) if isinstance(name, str) and Path(name).name == name else None
