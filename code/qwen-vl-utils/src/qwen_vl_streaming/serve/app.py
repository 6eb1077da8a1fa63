"""The web application: routes, who may connect, security headers.

Knows nothing about the protocol within a connection: see `viewer.py`.
"""

import asyncio
import collections
import hmac
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from .options import is_loopback
from .server import Server
from .viewer import Viewer
from .viewer_session import kept_clips

STATIC = Path(__file__).with_name("static")
PROTOCOL = "qwen-vl-streaming"
TOKEN_PROTOCOL = "token."
RECORD_ID = re.compile(r"[\w-]{16}")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class WithHeaders:
    """Adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class WebApp:
    """The connections to one server."""

    def __init__(self, server: Server):
        self.server, self.settings = server, server.settings
        self.viewers: set[Viewer] = set()
        self.addresses: collections.Counter[str] = collections.Counter()
        server.metrics.viewers.set_function(lambda: len(self.viewers))

    async def stop(self) -> None:
        """End all sessions, each with its record and its response.done, and the model processes."""
        self.server.stopping = True
        await asyncio.gather(*(viewer.stop() for viewer in [*self.viewers]), return_exceptions=True)
        end = time.monotonic() + 2
        while self.viewers and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.server.close()

    # Who may connect

    def refusal(self, connection: HTTPConnection, needs_token: bool = True) -> tuple[int, str] | None:
        """Why a request is refused, with its HTTP status, or None."""
        origin = connection.headers.get("origin")
        try:
            host = urlsplit(f"//{connection.headers.get('host', '')}")
            name, asking = host.hostname or "", urlsplit(origin or "").netloc
        except ValueError:
            return 400, "Host or Origin is not an address"
        public = {urlsplit(each).netloc for each in self.settings.origins}
        # Without this, a page elsewhere could reach a server on the loopback through a host name of its own.
        if is_loopback(self.settings.host) and not (is_loopback(name) or host.netloc in public):
            return 403, "this host name is not served: see --origin"
        if origin and asking != host.netloc and origin not in self.settings.origins:
            return 403, "this origin may not connect: see --origin"
        if needs_token and self.settings.token and not self._has_token(connection):
            return 401, "a token is needed"
        return None

    def _has_token(self, connection: HTTPConnection) -> bool:
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        candidates = [given] if scheme.lower() == "bearer" else []
        offered = connection.scope.get("subprotocols", [])
        candidates += [name.removeprefix(TOKEN_PROTOCOL) for name in offered if name.startswith(TOKEN_PROTOCOL)]
        wanted = self.settings.token.encode()
        return any(hmac.compare_digest(given.encode(), wanted) for given in candidates)

    # Routes

    async def realtime(self, socket: WebSocket) -> None:
        address = socket.client.host if socket.client else ""
        if refusal := self.refusal(socket):
            status, reason = refusal
            return await socket.send_denial_response(PlainTextResponse(f"{reason}\n", status))
        if self.server.stopping or self.addresses[address] >= self.settings.per_client:
            reason = "the server stops" if self.server.stopping else f"more than {self.settings.per_client} connections"
            status = 503 if self.server.stopping else 429
            return await socket.send_denial_response(PlainTextResponse(f"{reason}\n", status))
        await socket.accept(PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", []) else None)
        viewer = Viewer(socket, self.server)
        self.viewers.add(viewer)
        self.addresses[address] += 1
        try:
            await viewer.run()
        finally:
            self.viewers.discard(viewer)
            self.addresses[address] -= 1
            if not self.addresses[address]:
                del self.addresses[address]

    def answer(self, make: Callable, needs_token: bool = True) -> Callable:
        """A route that answers with `make(request)`, where the request is allowed."""

        async def route(request: Request) -> Response:
            if refusal := self.refusal(request, needs_token):
                return PlainTextResponse(f"{refusal[1]}\n", refusal[0])
            return await asyncio.to_thread(make, request)

        return route

    def page(self, _: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    def health(self, _: Request) -> Response:
        condition = self.server.condition
        return JSONResponse({"status": condition}, 200 if condition == "ok" else 503)

    def measured(self, _: Request) -> Response:
        return Response(self.server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def listed(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.server.about("")["models"]})

    def record(self, request: Request) -> Response:
        """A record, without the server's paths, or the clips that belong to it. Only the viewer was given its id."""
        key = request.path_params["key"]
        found = RECORD_ID.fullmatch(key) and next(self.settings.records.glob(f"*-{key}.json"), None)
        if not found:
            return PlainTextResponse("there is no such record\n", 404)
        data = json.loads(found.read_text())
        if request.url.path.endswith("/clips"):
            clips = kept_clips(found, data["about"])
            if clips is None or not clips.is_file():
                return PlainTextResponse("the clips were not kept\n", 404)
            return FileResponse(clips, filename=f"{key}.clips.safetensors")
        data["model"]["path"] = Path(data["model"]["path"]).name
        if "path" in data["about"].get("video", {}):
            data["about"]["video"]["path"] = Path(data["about"]["video"]["path"]).name
        headers = {"Content-Disposition": f'attachment; filename="{key}.json"'}
        return Response(json.dumps(data, indent=1), media_type="application/json", headers=headers)

    def starlette(self, lifespan: Callable | None = None) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.answer(self.page, needs_token=False)),
                Route("/health", self.answer(self.health, needs_token=False)),
                Route("/metrics", self.answer(self.measured)),
                Route("/v1/models", self.answer(self.listed)),
                Route("/v1/records/{key}", self.answer(self.record)),
                Route("/v1/records/{key}/clips", self.answer(self.record)),
                WebSocketRoute("/v1/realtime", self.realtime),
                Mount("/static", StaticFiles(directory=STATIC)),
            ],
            lifespan=lifespan,
            middleware=[Middleware(WithHeaders)],
            exception_handlers={404: lambda *_: PlainTextResponse("not found\n", 404)},
        )
