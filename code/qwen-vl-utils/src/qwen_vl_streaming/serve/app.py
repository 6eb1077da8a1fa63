"""The web application: routes, who may connect, security headers, and what all connections share.

Knows nothing about the protocol within a connection: see `viewer.py`.
"""

import asyncio
import collections
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from ..model.prompts import QUESTIONS
from .admission import Admission
from .catalog import FPS, ServedModel
from .connection import Refused
from .metrics import Metrics
from .model_process import ModelSpec
from .options import Settings, is_loopback
from .own_source import Opened, OwnSource
from .request import Plan
from .viewer import Viewer, kept_clips
from .workers import Worker

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


class Server:
    """What all connections share."""

    def __init__(self, settings: Settings, models: dict[str, ServedModel], workers: Sequence[Worker]):
        self.settings, self.models, self.workers = settings, models, workers
        self.admission, self.metrics = Admission(workers, settings.queue), Metrics()
        self.processor = next(iter(models.values())).processor
        self.executor = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "frames")
        self.viewers: set[Viewer] = set()
        self.addresses: collections.Counter[str] = collections.Counter()
        self.reading: list[OwnSource] = []
        """Sources of the server's own that are open, for one viewer each."""
        self.stopping = False
        self.metrics.queue.set_function(lambda: len(self.admission.queue))
        self.metrics.viewers.set_function(lambda: len(self.viewers))

    def start(self) -> None:
        """Call it in the event loop."""
        for worker in self.workers:
            worker.listen(asyncio.get_running_loop())

    @property
    def condition(self) -> str:
        """What /health says: "ok" while every model has a process and the server does not stop."""
        served = {worker.spec.name for worker in self.workers if not worker.lost}
        coming = served | {worker.spec.name for worker in self.workers if not worker.given_up}
        if self.stopping:
            return "stopping"
        if served >= self.models.keys():
            return "ok"
        return "a model is starting again" if coming >= self.models.keys() else "a model is lost"

    async def stop(self) -> None:
        """End all sessions, each with its record and its response.done."""
        self.stopping = True
        await asyncio.gather(*(viewer.stop() for viewer in [*self.viewers]), return_exceptions=True)
        end = time.monotonic() + 2
        while self.viewers and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.executor.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()

    # For viewers

    def about(self, session: str) -> dict:
        """What session.created says."""
        limits = self.settings.limits
        return {
            "id": session,
            "models": [
                {"name": each.name, "variant": each.variant.name, "mode": each.mode, "schedules": each.schedules}
                for each in self.models.values()
            ],
            "questions": [*QUESTIONS],
            "sources": [*self.settings.sources],
            "frames_per_second": FPS,
            "limits": {
                "frame_bytes": limits.frame_bytes,
                "pixels": limits.pixels,
                "question_characters": limits.question_characters,
                "seconds_idle": limits.seconds_idle,
            },
        }

    def spec(self, name: str) -> ModelSpec:
        return next(worker.spec for worker in self.workers if worker.spec.name == name)

    def plan(self, model: ServedModel, question: str, opened: Opened) -> Plan:
        """A session of `model` for a source. Raises Refused if it does not fit."""
        spec, settings = self.spec(model.name), self.settings
        template = model.template(question)
        layout = model.layout(template, opened.size, opened.seconds)
        most = model.most_clips(layout, settings.most_clips)
        clips, tokens = settings.window or (settings.pool_clips, settings.pool_tokens)
        limits = {**spec.limits, "max_clips": min(most or spec.max_clips, spec.max_clips)}
        if opened.count is not None and opened.count <= clips and settings.max_new_tokens <= tokens:
            # A recording that fits into the window has its own limits, as in eval.sh.
            limits = {"max_clips": opened.count, "max_new_tokens": settings.max_new_tokens, "window": None}
        blocks = spec.blocks(layout, limits)
        if layout.prompt > spec.largest.prompt:
            raise Refused("invalid_event", f"question has more than {settings.limits.question_tokens} tokens")
        if layout.tokens_per_clip > spec.clip_tokens or blocks > spec.blocks(spec.largest, spec.limits):
            height, width = opened.size
            raise Refused("frame_too_large", f"frames of {width} x {height} pixels do not fit: use another source")
        return Plan(template, layout, limits, most, blocks)

    def own_source(self, name: str, model: ServedModel, notify: Callable) -> OwnSource:
        settings = self.settings
        self.reading = [source for source in self.reading if source.thread.is_alive()]
        if len(self.reading) >= settings.sessions * len(self.workers) + settings.queue:
            raise Refused("queue_full", "too many viewers watch sources of the server: try again later")
        source = OwnSource(name, settings.sources[name], model, settings.dtype, settings.most_clips, notify)
        self.reading.append(source)
        return source

    def record_path(self, key: str, variant: str) -> Path:
        return self.settings.records / f"{time.strftime('%Y%m%d-%H%M%S')}-{variant}-{key}.json"

    def in_thread(self, function: Callable, *arguments) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)

    def share(self, names, seconds: float) -> None:
        """Count the time between a frame's arrival and its clip's way to the models."""
        for name in names:
            self.metrics.share.labels(name).observe(seconds)

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
        if self.settings.loopback and not (is_loopback(name) or host.netloc in public):
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
        if self.stopping or self.addresses[address] >= self.settings.per_client:
            reason = "the server stops" if self.stopping else f"more than {self.settings.per_client} connections"
            status = 503 if self.stopping else 429
            return await socket.send_denial_response(PlainTextResponse(f"{reason}\n", status))
        await socket.accept(PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", []) else None)
        viewer = Viewer(socket, self)
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
        condition = self.condition
        return JSONResponse({"status": condition}, 200 if condition == "ok" else 503)

    def measured(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def listed(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.about("")["models"]})

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

    def app(self, lifespan: Callable | None = None) -> Starlette:
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
