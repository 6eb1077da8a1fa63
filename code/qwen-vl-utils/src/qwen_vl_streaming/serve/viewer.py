"""One connection: reads a client's messages, checks them, and answers in the protocol of docs/serving.md.

Runs in the event loop and never blocks it: pictures are decoded in threads, models run elsewhere. A client's frames are
handled one after the other, so that a flood fills only its own socket. What a client does not read is limited.
"""

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from torch import Tensor

from ..common.clock import now
from ..common.errors import InputError
from ..model.prompts import QUESTIONS
from ..video.clip_recorder import ClipRecorder
from ..video.frames import FRAMES_PER_CLIP
from .catalog import FPS, ServedModel
from .frames import FORMATS, BadFrame, ClipBuilder, PreparedClip, decode_picture, prepare_clip
from .own_source import Opened, OwnSource, ShownClip
from .response import Response
from .seats import Ticket
from .workers import Worker

if TYPE_CHECKING:
    from .app import Server

logger = logging.getLogger(__name__)

BURST = 3
"""Seconds of messages_per_second that may come at once."""
POLICY, GOING_AWAY, INTERNAL_ERROR = 1008, 1001, 1011
"""WebSocket close codes."""
SEND_SECONDS = 20.0
"""A client that takes longer to read a message is disconnected."""
MOST_NESTED = 100
"""Lists and objects in a message; deep nesting would exhaust the stack of the JSON parser."""
MOST_FRAMES = 10**6
"""Frames of a recording."""


class Refused(Exception):
    """A message that is refused: `code` and text of the protocol's error."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Closing(Exception):
    """The connection is to be closed with this WebSocket code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Viewer:
    def __init__(self, socket: WebSocket, server: "Server"):
        self.socket, self.server, self.limits = socket, server, server.settings.limits
        self.id = secrets.token_urlsafe(9)
        self.outbox: asyncio.Queue[tuple[dict, bytes | None] | None] = asyncio.Queue()
        self.receiver: asyncio.Task | None = None
        self.close_code = 1000
        self.allowance, self.refilled, self.mistakes, self.dropped = BURST * self.limits.messages_per_second, 0.0, 0, 0
        self._forget()

    def _forget(self) -> None:
        """Ready for another session.update."""
        self.ticket: Ticket | None = None
        self.responses: dict[str, Response] = {}
        self.builder: ClipBuilder | None = None
        self.own: OwnSource | None = None
        self.recorder: ClipRecorder | None = None
        self.ended = False
        self.clips: list[tuple[float, float | None]] = []
        """Of each clip, when it was complete, and the capture time of its newest frame."""

    # The connection

    async def run(self) -> None:
        """Serve the connection until it ends, whoever ends it."""
        self._send("session.created", session=self.server.about(self.id))
        sender = asyncio.create_task(self._send_all())
        self.receiver = asyncio.create_task(self._receive_all())
        sender.add_done_callback(lambda _: self.receiver.cancel())
        gone = False
        try:
            await self.receiver
        except asyncio.CancelledError:
            gone = sender.done()
        except WebSocketDisconnect:
            gone = True
        except Closing as closing:
            self.close_code = closing.code
        except Exception:  # a bug: this viewer is disconnected, and others go on
            logger.exception("a connection has failed")
            self.close_code = INTERNAL_ERROR
        finally:
            self._leave("lost" if gone else "cancelled")
            await self.responses_over()
            self.outbox.put_nowait(None)
            await asyncio.wait([sender], timeout=SEND_SECONDS)
            sender.cancel()

    async def stop(self) -> None:
        """The server stops: end the session with its records, tell the client, and close."""
        self._error("server_stopping", "the server stops: connect again later")
        self._leave("cancelled")
        await self.responses_over()
        self.close_code = GOING_AWAY
        self.receiver.cancel()

    async def responses_over(self, seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while any(not response.over for response in self.responses.values()) and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def _leave(self, why: str) -> None:
        """Give up what this viewer has or waits for."""
        if self.ticket is not None:
            self.server.seats.leave(self.ticket)
            self.ticket = None
        if self.own is not None:
            self.own.stop()
        for response in self.responses.values():
            response.cancel(why)

    def _send(self, kind: str, droppable: bool = False, binary: bytes | None = None, **fields) -> None:
        waiting = self.outbox.qsize()
        if waiting >= self.limits.messages_waiting // (2 if droppable else 1):
            if not droppable and self.receiver is not None:
                logger.info("a client does not read: disconnected")
                self.close_code = POLICY
                self.receiver.cancel()
            if droppable or waiting >= 2 * self.limits.messages_waiting:
                return
        self.outbox.put_nowait(({"type": kind, **fields}, binary))

    def _error(self, code: str, message: str, event_id: str | None = None) -> None:
        self._send("error", error={"code": code, "message": message, "event_id": event_id})

    async def _send_all(self) -> None:
        try:
            async with asyncio.timeout(None) as limit:
                while (entry := await self.outbox.get()) is not None:
                    limit.reschedule(asyncio.get_running_loop().time() + SEND_SECONDS)
                    message, binary = entry
                    await self.socket.send_text(json.dumps(message, allow_nan=False))
                    if binary is not None:
                        await self.socket.send_bytes(binary)
                    limit.reschedule(None)
            if self.socket.application_state == WebSocketState.CONNECTED:
                await asyncio.wait_for(self.socket.close(self.close_code), SEND_SECONDS)
        except (WebSocketDisconnect, RuntimeError, OSError, TimeoutError):
            pass  # the client has gone, or does not read

    async def _receive_all(self) -> None:
        while True:
            event: dict = {}
            try:
                event = self._parse(await self._receive("text"))
                await self._handle(event)
            except Refused as refused:
                self._refuse(refused.code, str(refused), event.get("event_id"))
            except BadFrame as bad:
                self.server.metrics.frames.labels("refused").inc()
                self._refuse(bad.code, str(bad), event.get("event_id"))
            except InputError as error:
                self._refuse("invalid_event", str(error), event.get("event_id"))

    def _refuse(self, code: str, message: str, event_id) -> None:
        self._error(code, message, event_id)
        self.mistakes += 1
        if self.mistakes >= self.limits.mistakes:
            raise Closing(POLICY)

    async def _receive(self, kind: str) -> str | bytes:
        """The next message. Raises Refused if it is not of `kind`, "text" or "bytes"."""
        while True:
            try:
                message = await asyncio.wait_for(self.socket.receive(), self.limits.seconds_idle)
                break
            except TimeoutError:
                busy = self.ticket or self.own or (self.ended and not self._all_over())
                if not busy or kind == "bytes":
                    self._error("idle", f"nothing came for {self.limits.seconds_idle:g} s: connect again")
                    raise Closing(POLICY) from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        self._count_message()
        if message.get(kind) is None:
            raise Refused("invalid_event", f"a {'text' if kind == 'text' else 'binary'} message was expected here")
        return message[kind]

    def _count_message(self) -> None:
        """Closes the connection of a client that keeps sending more than it may."""
        at, rate = time.monotonic(), self.limits.messages_per_second
        self.allowance = min(BURST * rate, self.allowance + rate * (at - self.refilled))
        self.refilled = at
        self.allowance -= 1
        if self.allowance < 0:
            self._error("rate_limited", f"more than {rate} messages a second: send 2 frames a second")
            raise Closing(POLICY)

    def _parse(self, text: str) -> dict:
        if len(text) > self.limits.message_bytes:
            raise Refused("invalid_event", f"a message of {len(text)} characters is too long")
        if text.count("[") + text.count("{") > MOST_NESTED:
            raise Refused("invalid_event", "the message has too many parts")
        try:
            event = json.loads(text)
        except ValueError:
            raise Refused("invalid_event", "the message is not JSON") from None
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise Refused("invalid_event", "the message is not an object with a type")
        event_id = event.get("event_id")
        if event_id is not None and not (isinstance(event_id, str) and len(event_id) <= 100):
            event["event_id"] = None
            raise Refused("invalid_event", "event_id must be a string of at most 100 characters")
        return event

    async def _handle(self, event: dict) -> None:
        match event["type"]:
            case "session.update":
                self._update(event.get("session"))
            case "input_video_frame.append":
                await self._append(event)
            case "input_video.end":
                await self._end_input()
            case "response.cancel":
                self._leave("cancelled")
                self.ended = True
            case kind:
                raise Refused("invalid_event", f"unknown type {kind[:50]!r}")

    # session.update

    def _all_over(self) -> bool:
        return all(response.over for response in self.responses.values())

    def _update(self, asked) -> None:
        if not isinstance(asked, dict):
            raise Refused("invalid_event", "session.update has no session")
        if self.ticket or (self.own and not self.ended) or not self._all_over():
            raise Refused("invalid_event", "a session runs or waits already: send response.cancel first")
        names = asked.get("models") or [*self.server.models][:1]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused("invalid_event", "models must be a list of names")
        if unknown := [name for name in names if name not in self.server.models]:
            raise Refused("invalid_event", f"unknown model {unknown[0][:50]!r}: one of {', '.join(self.server.models)}")
        models = [self.server.models[name] for name in dict.fromkeys(names)]
        question = asked.get("question") or QUESTIONS[-1]
        if not isinstance(question, str) or len(question) > self.limits.question_characters:
            most = self.limits.question_characters
            raise Refused("invalid_event", f"question must be a text of at most {most} characters")
        schedule = asked.get("schedule")
        if not isinstance(schedule, str | None) or len(schedule or "") > 20:
            raise Refused("invalid_event", "schedule must be a name such as wait-3")
        schedules = {model.name: model.check_schedule(schedule) for model in models}
        source = asked.get("source") or {}
        if not isinstance(source, dict) or source.get("kind") not in ("client", "server"):
            raise Refused("invalid_event", 'source must have the kind "client" or "server"')
        self._forget()
        keep = asked.get("keep") is True
        if source["kind"] == "client":
            self._client_source(models, question, schedules, source, keep)
        else:
            self._server_source(models, question, schedules, source, keep)

    def _client_source(self, models, question: str, schedules: dict, source: dict, keep: bool) -> None:
        width, height = (_integer(source, name, 1, 100_000) for name in ("width", "height"))
        frames = None if source.get("frames") is None else _integer(source, "frames", FRAMES_PER_CLIP, MOST_FRAMES)
        fps = source.get("frames_per_second", FPS)
        if not isinstance(fps, int | float) or not 0.1 <= fps <= FPS:
            raise Refused("invalid_event", f"frames_per_second must be from 0.1 to {FPS:g}")
        count = None if frames is None else -(-frames // FRAMES_PER_CLIP)
        size = models[0].budget.size(height, width, frames=0 if count is None else FRAMES_PER_CLIP * count)

        def begin() -> None:
            self.builder, self.size = ClipBuilder(fps, frames), size

        about = {"source": "client"}
        self._request(models, question, schedules, size, FRAMES_PER_CLIP / fps, count, about, source, keep, begin)

    def _server_source(self, models, question: str, schedules: dict, source: dict, keep: bool) -> None:
        name = source.get("name")
        if not isinstance(name, str) or name not in self.server.settings.sources:
            raise Refused("invalid_event", "source must have the name of one of the server's own: see session.created")

        def tell(what: Opened | ShownClip | Exception | None) -> None:
            if own is not self.own:  # cancelled meanwhile
                return
            if isinstance(what, Opened):
                self._open_own(models, question, schedules, name, what, keep)
            elif isinstance(what, ShownClip):
                for picture, moment in zip(what.pictures, what.times, strict=True):
                    fields = {"time": moment, "bytes": len(picture)}
                    self._send("output_video_frame", droppable=True, binary=picture, **fields)
                if self.recorder is not None:
                    self.server.executor.submit(self._keep, what.frames)
                self._feed(what.clip, what.completed, what.times[-1], what.last)
            else:
                if what is not None:
                    self._error("source_failed", str(what))
                self._end_responses()

        own = self.server.own_source(name, models[0], tell)
        self.own = own

    def _open_own(self, models, question: str, schedules: dict, name: str, opened: Opened, keep: bool) -> None:
        height, width = opened.size
        source = {"kind": "server", "name": name, "width": width, "height": height}
        about = {"source": name, **opened.about}
        try:
            self._request(
                models,
                question,
                schedules,
                opened.size,
                opened.seconds,
                opened.count,
                about,
                source,
                keep,
                self.own.begin,
            )
        except (InputError, Refused) as error:
            self.own.stop()
            self.ended = True
            self._error(getattr(error, "code", "invalid_event"), str(error))

    def _request(
        self,
        models: list[ServedModel],
        question: str,
        schedules: dict[str, str],
        size: tuple[int, int],
        seconds: float,
        count: int | None,
        about: dict,
        source: dict,
        keep: bool,
        begin: Callable[[], None],
    ) -> None:
        """Ask for room for one session of each model; when there is some, open them and call `begin`."""
        plans = {}
        for model in models:
            template = model.template(question)
            layout = model.layout(template, size, seconds)
            limits = self.server.session_limits(model, layout, count)
            spec = self.server.spec(model.name)
            needed = spec.blocks(layout, limits)
            base = spec.largest.prompt - self.limits.question_tokens
            if layout.prompt > base + self.limits.question_tokens:
                raise Refused("invalid_event", f"question has more than {self.limits.question_tokens} tokens")
            if layout.tokens_per_clip > spec.clip_tokens or needed > spec.blocks(spec.largest, spec.limits):
                raise Refused("frame_too_large", f"{size[1]} x {size[0]} frames do not fit: use another source")
            plans[model.name] = template, layout, limits, needed

        def granted(workers: dict[str, Worker] | None) -> None:
            self.ticket = None
            if workers is None:
                return self._error("failed", "the model is not available any more")
            self._open(workers, plans, schedules, {**about, "question": question}, keep)
            height, width = size
            window = self.server.settings.window
            self._send(
                "session.updated",
                session={
                    "models": [*workers],
                    "question": question,
                    "schedule": schedules[models[0].name],
                    "source": {name: source.get(name) for name in ("kind", "name", "width", "height", "frames")},
                    "frame": {"width": width, "height": height},
                    "window": window and list(window),
                },
            )
            for response in self.responses.values():
                self._send("response.created", response={"id": response.id, "model": response.model.name})
            begin()

        self.ticket = Ticket(
            {name: plan[3] for name, plan in plans.items()},
            granted,
            lambda place: self._send("session.queued", place=place),
        )
        if not self.server.seats.request(self.ticket):
            self.ticket = None
            raise Refused("queue_full", "all sessions are taken and too many viewers wait: try again later")

    def _open(self, workers: dict[str, Worker], plans: dict, schedules: dict, about: dict, keep: bool) -> None:
        def send(message: dict) -> None:
            self._send(message.pop("type"), **message)

        for name, worker in workers.items():
            template, layout, limits, needed = plans[name]
            model = self.server.models[name]
            most = model.most_clips(layout, self.server.settings.max_clips)
            response = Response(model, worker, self._captured, send, self.server.metrics, most)
            response.dropped = lambda: self.dropped
            self.responses[name] = response
            record = self.server.record_path(response.id, model.variant.name)
            if keep and self.recorder is None:
                self.recorder = ClipRecorder(record.with_suffix(".clips.safetensors"))
            kept = {"kept": self.recorder.path.name} if self.recorder else {}
            options = {**limits, "schedule": schedules[name], "record": record, "about": {**about, **kept}}
            worker.open(response.id, response, needed, template, layout, options)

    # Frames

    def _captured(self, clip: int) -> tuple[float, float | None] | None:
        return self.clips[clip - 1] if 1 <= clip <= len(self.clips) else None

    async def _append(self, event: dict) -> None:
        size = _integer(event, "bytes", 1, 2**31)
        form, moment = event.get("format"), event.get("time")
        data = await self._receive("bytes")
        arrived = now()
        if size != len(data):
            raise Refused("invalid_event", f"{size} bytes were announced, but {len(data)} came")
        if len(data) > self.limits.frame_bytes:
            raise BadFrame("frame_too_large", f"{len(data)} bytes: at most {self.limits.frame_bytes} are allowed")
        if form not in FORMATS:
            raise Refused("invalid_event", f"format must be one of {', '.join(FORMATS)}")
        if not _is_number(moment) or not abs(moment) < 1e9:
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
        self._send(
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
        self.ended = self.ended or last
        for response in self.responses.values():
            response.feed(clip, completed, last)
            if response.waiting > self.limits.clips_waiting:
                response.cancel("too_slow")

    async def _end_input(self) -> None:
        if self.builder is None:
            raise Refused("invalid_event", "no session takes frames now")
        if not self.ended:
            at = now()
            for prepared, last in await self.server.in_thread(lambda: self._prepare(self.builder.finish())):
                self._feed(prepared, at, self.clips[-1][1] if self.clips else 0.0, last)
        self._end_responses()

    def _end_responses(self) -> None:
        if self.ended:
            return
        self.ended = True
        if not self.clips:
            self._error("invalid_event", "the source has ended before one clip was complete")
            return self._leave("cancelled")
        for response in self.responses.values():
            response.end()


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(fields: dict, name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise Refused("invalid_event", f"{name} must be an integer from {least} to {most}")
    return value


def kept_clips(record: Path, about: dict) -> Path | None:
    """The file of the clips that a viewer agreed to have kept, for the record in `record`."""
    name = about.get("kept")
    return record.with_name(name) if isinstance(name, str) and Path(name).name == name else None
