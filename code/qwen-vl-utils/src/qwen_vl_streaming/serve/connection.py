"""A WebSocket connection with limits: reads and checks JSON events, sends messages without waiting for the client.

What a client has not read is bounded, and so are its messages, mistakes and silence. Knows nothing about sessions.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from ..common.errors import InputError
from .options import Limits

logger = logging.getLogger(__name__)

BURST = 3
"""Seconds of messages_per_second that may come at once."""
NORMAL, GOING_AWAY, POLICY, INTERNAL_ERROR = 1000, 1001, 1008, 1011
"""WebSocket close codes."""
SEND_SECONDS = 20.0
"""A client that takes longer to read a message is disconnected."""
MOST_NESTED = 100
"""Lists and objects in a message; deep nesting would exhaust the stack of the JSON parser."""


ENCODE = json.JSONEncoder(allow_nan=False).encode  # `dumps` with options would make an encoder for each message


class Refused(Exception):
    """A message that is refused: `code` and text of the protocol's error."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Closing(Exception):
    """The connection is to be closed as against the rules."""


class Connection:
    def __init__(self, socket: WebSocket, limits: Limits):
        self.socket, self.limits = socket, limits
        self.outbox: asyncio.Queue[tuple[dict, bytes | None] | None] = asyncio.Queue()
        self.code, self.gone = NORMAL, False
        self.allowance, self.refilled, self.mistakes = BURST * limits.messages_per_second, 0.0, 0
        self.sender: asyncio.Task | None = None
        self.receiver: asyncio.Task | None = None

    async def run(self, handle: Callable[[dict], Awaitable[None]], busy: Callable[[], bool]) -> None:
        """Pass events to `handle`, one after the other, until the client goes, breaks the rules or `stop` is called.
        `handle` may raise Refused or InputError. Silence is allowed while `busy`. Then call `close`."""
        self.sender = sender = asyncio.create_task(self._send_all())
        self.receiver = receiver = asyncio.create_task(self._receive_all(handle, busy))
        sender.add_done_callback(lambda _: receiver.cancel())
        try:
            await receiver
        except asyncio.CancelledError:
            self.gone = sender.done()
        except WebSocketDisconnect:
            self.gone = True
        except Closing:
            self.code = POLICY
        except Exception:  # a bug: this client is disconnected, and others go on
            logger.exception("a connection has failed")
            self.code = INTERNAL_ERROR

    def stop(self, code: int) -> None:
        """End `run`; `close` will close with `code`."""
        self.code = code
        if self.receiver is not None:
            self.receiver.cancel()

    async def close(self) -> None:
        """Send what waits, and close."""
        self.outbox.put_nowait(None)
        if self.sender is not None:
            await asyncio.wait([self.sender], timeout=SEND_SECONDS)
            self.sender.cancel()

    def send(self, kind: str, droppable: bool = False, binary: bytes | None = None, **fields) -> None:
        """Queue a message and the `binary` one after it. A `droppable` one is skipped if the client reads slowly."""
        waiting, most = self.outbox.qsize(), self.limits.messages_waiting
        if waiting >= most and not droppable:
            self.stop(POLICY)
        if waiting < (most // 2 if droppable else 2 * most):
            self.outbox.put_nowait(({"type": kind, **fields}, binary))

    def error(self, code: str, message: str, event_id: str | None = None) -> None:
        self.send("error", error={"code": code, "message": message, "event_id": event_id})

    def refuse(self, refused: Refused | InputError, event_id: str | None = None) -> None:
        """Tell the client why what it asked for is refused."""
        self.error(refused.code if isinstance(refused, Refused) else "invalid_event", str(refused), event_id)

    async def receive(self, kind: str, busy: Callable[[], bool] = lambda: False) -> Any:
        """The next message. Raises Refused if it is not of `kind`, "text" or "bytes"."""
        while True:
            try:
                async with asyncio.timeout(self.limits.seconds_idle):  # `wait_for` would start a task
                    message = await self.socket.receive()
                break
            except TimeoutError:
                if not busy():
                    self.idle()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        self._count_message()
        if message.get(kind) is None:
            raise Refused("invalid_event", f"a {'text' if kind == 'text' else 'binary'} message was expected here")
        return message[kind]

    def idle(self) -> None:
        """End a connection on which nothing happens."""
        self.error("idle", f"no frames came for {self.limits.seconds_idle:g} s: connect again")
        raise Closing

    async def _send_all(self) -> None:
        try:
            async with asyncio.timeout(None) as limit:
                while (entry := await self.outbox.get()) is not None:
                    limit.reschedule(asyncio.get_running_loop().time() + SEND_SECONDS)
                    message, binary = entry
                    await self.socket.send_text(ENCODE(message))
                    if binary is not None:
                        await self.socket.send_bytes(binary)
                    limit.reschedule(None)
            if self.socket.application_state == WebSocketState.CONNECTED:
                await asyncio.wait_for(self.socket.close(self.code), SEND_SECONDS)
        except (WebSocketDisconnect, RuntimeError, OSError, TimeoutError):
            pass  # the client has gone, or does not read

    async def _receive_all(self, handle: Callable[[dict], Awaitable[None]], busy: Callable[[], bool]) -> None:
        while True:
            event: dict = {}
            try:
                event = self._parse(await self.receive("text", busy))
                await handle(event)
            except (Refused, InputError) as refused:
                self.refuse(refused, event.get("event_id"))
                self.mistakes += 1
                if self.mistakes >= self.limits.mistakes:
                    raise Closing from refused

    def _count_message(self) -> None:
        """Ends the connection of a client that keeps sending more than it may."""
        at, rate = time.monotonic(), self.limits.messages_per_second
        self.allowance = min(BURST * rate, self.allowance + rate * (at - self.refilled)) - 1
        self.refilled = at
        if self.allowance < 0:
            self.error("rate_limited", f"more than {rate} messages a second: send 2 frames a second")
            raise Closing

    def _parse(self, text: str) -> dict:
        """The event in a text message; its event_id is a short string, or None."""
        if len(text) > self.limits.message_bytes or text.count("[") + text.count("{") > MOST_NESTED:
            raise Refused("invalid_event", "the message is too long, or has too many parts")
        try:
            event = json.loads(text)
        except ValueError:
            raise Refused("invalid_event", "the message is not JSON") from None
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise Refused("invalid_event", "the message is not an object with a type")
        if not isinstance(event.setdefault("event_id", None), str | None) or len(event["event_id"] or "") > 100:
            raise Refused("invalid_event", "event_id must be a string of at most 100 characters")
        return event
