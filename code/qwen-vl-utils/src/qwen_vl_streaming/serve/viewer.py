"""One viewer's connection, in the protocol of docs/serving.md: passes its events to its sessions, one after the other.

A client's frames are handled one by one, so that a flood fills only its own socket.
"""

import asyncio
import secrets
import threading
import time

from starlette.websockets import WebSocket

from ..common.clock import now
from .connection import GOING_AWAY, Connection, Refused
from .frames import BadFrame
from .request import read_request
from .server import Server
from .viewer_session import ViewerSession

SOURCES_CLOSING = 2
"""Sources of the server's own that one viewer may have open, those that are closing included."""


class Viewer:
    def __init__(self, socket: WebSocket, server: Server):
        self.server, self.limits = server, server.settings.limits
        self.connection = Connection(socket, self.limits)
        self.session: ViewerSession | None = None
        """The newest one, which may be over."""
        self.threads: list[threading.Thread] = []
        """Those that read sources of the server's own; one may outlive its session."""

    async def run(self) -> None:
        """Serve the connection until either side ends it."""
        self.connection.send("session.created", session=self.server.about(secrets.token_urlsafe(9)))
        await self.connection.run(self._handle, self._busy)
        await self._leave("lost" if self.connection.gone else "cancelled")
        await self.connection.close()

    async def stop(self) -> None:
        """The server stops: end the session with its records, notify the client, and close."""
        self.connection.error("server_stopping", "the server stops: connect again later")
        await self._leave("cancelled")
        self.connection.stop(GOING_AWAY)

    async def _leave(self, why: str, seconds: float = 5.0) -> None:
        """Leave the session, and wait until its responses are over."""
        if self.session is not None:
            self.session.leave(why)
            end = time.monotonic() + seconds
            while not self.session.all_over and time.monotonic() < end:
                await asyncio.sleep(0.01)

    def _busy(self) -> bool:
        return self.session is not None and self.session.busy

    async def _handle(self, event: dict) -> None:
        session = self.session
        if session is not None and session.stalls:
            self.connection.idle()
        match event["type"]:
            case "session.update":
                self._update(event.get("session"))
            case "input_video_frame.append":
                data, arrived = await self.connection.receive("bytes"), now()
                try:
                    await self._frames().append(event, data, arrived)
                except BadFrame as bad:
                    self.server.metrics.frames.labels("refused").inc()
                    raise Refused(bad.code, str(bad)) from bad
            case "input_video.end":
                await self._frames().end_input()
            case "response.cancel":
                if session is not None:
                    session.leave("cancelled")
            case kind:
                raise Refused("invalid_event", f"unknown type {kind[:50]!r}")

    def _update(self, asked) -> None:
        if self.session is not None and self.session.active:
            raise Refused("invalid_event", "a session runs or waits already: send response.cancel first")
        if self.server.stopping:
            raise Refused("server_stopping", "the server stops: connect again later")
        request = read_request(asked, self.server.models, self.server.settings)
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        if request.own_source is not None and len(self.threads) == SOURCES_CLOSING:
            raise Refused("invalid_event", "the sources before have not ended yet: try again in a second")
        self.session = ViewerSession(request, self.server, self.connection)
        self.session.begin()
        if self.session.own is not None:
            self.threads.append(self.session.own.thread)

    def _frames(self) -> ViewerSession:
        """The session, which takes frames. Raises Refused if none does."""
        if self.session is None:
            raise Refused("invalid_event", "no session takes frames now: send session.update")
        return self.session
