"""Limits on connections that uvicorn does not have: the time to send a request, and the number of small frames.

Knows nothing about sessions.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

REQUEST_SECONDS = 20.0
"""A connection that has sent no complete request after this time is closed."""
PIECE = 4096
"""Bytes that are parsed before the limit is checked again."""
SMALL = 1024
"""Bytes of a frame below which it counts: parsing a small frame costs more than sending it."""
SMALL_FRAMES_PER_SECOND, SMALL_FRAMES_AT_ONCE = 200.0, 1000.0


class GuardedHTTP(H11Protocol):
    """Closes connections that send nothing, or a request byte by byte."""

    seen: object = None
    """The request that was the newest one at the last check."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self._check)

    def _check(self) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # it is a WebSocket now
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.scope is self.seen and not answering:
            return self.transport.abort()
        self.seen = self.scope
        self.loop.call_later(REQUEST_SECONDS, self._check)


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """Closes connections that flood the event loop with pings, empty fragments or messages, which the limits of
    `connection.py` do not see, or not before all that has arrived is parsed."""

    allowance, refilled = SMALL_FRAMES_AT_ONCE, 0.0

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            if not self.transport.is_closing():
                super().data_received(data[start : start + PIECE])

    def _allowed(self, size: int) -> bool:
        if size < SMALL:
            at = self.loop.time()
            refilled = self.allowance + SMALL_FRAMES_PER_SECOND * (at - self.refilled)
            self.allowance, self.refilled = min(SMALL_FRAMES_AT_ONCE, refilled) - 1, at
            if self.allowance < 0:
                self.transport.abort()
        return not self.transport.is_closing()

    def handle_ping(self) -> None:
        if self._allowed(0):
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._allowed(0):
            super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        if self._allowed(len(event.data)):
            super().handle_cont(event)

    def handle_text(self, event: Frame) -> None:
        if self._allowed(len(event.data)):
            super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        if self._allowed(len(event.data)):
            super().handle_bytes(event)

    async def send(self, message) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":  # otherwise uvicorn logs an error for each refusal
            self.handshake_complete = True
