"""A small server that follows the protocol of `/v1/realtime` with scripted answers, for tests of the page alone.

The word of a model is said by a table, not by a model: "parallel" writes three tokens after each clip, "interleave"
needs longer than a second for each, "offline" writes after the end.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import qwen_vl_streaming
import uvicorn
from qwen_vl_streaming.model.prompts import QUESTIONS
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

STATIC = Path(qwen_vl_streaming.__file__).parent / "serve/static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; worker-src 'self'; "
    "media-src blob:; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WORDS = (
    "The video shows a white circle on the right. A cyan triangle appears on the left. The white circle turns pink. "
    "<b>It</b> grows. The cyan triangle moves to the right and leaves. A red ring appears at the top. It shrinks. "
)
TOKENS = [" " + word for word in WORDS.split()]
SCHEDULES = ["wait-3", "wait-5", "greedy"]
MODELS = {"group": 0.05, "interleave": 1.7, "batch": None}
"""Seconds that each model needs for a clip; None: it waits for the end."""


@dataclass
class Stub:
    """Usage: `with Stub(["group"]) as server: page.open(server.url)`."""

    models: list[str]
    places: int = 0
    """Clients that are in the queue first; one leaves when `leave` is called."""
    refusal: str = ""
    """The message with which sessions are refused."""
    idle: float | None = None
    """Close connections after this many seconds without a message; `closed` counts them."""
    vanish_after: int | None = None
    """Close the connection after this many frames."""
    source: list[bytes] = field(default_factory=list)
    """JPEG frames of a source of the server's own, called "door"."""
    size: tuple[int, int] = (364, 196)
    """Width and height of a frame that are asked for."""
    frames: list[tuple[float, bytes]] = field(default_factory=list)
    """Those that came: time and JPEG."""
    updates: list[dict] = field(default_factory=list)
    held: bool = False
    """While this is set, no answer goes on after the end of the video."""
    left: int = 0
    closed: int = 0

    def leave(self) -> None:
        self.left += 1

    def __enter__(self) -> "Stub":
        routes = [
            Route("/", lambda _: FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": POLICY})),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/v1/records/{key}", lambda request: JSONResponse({"record": request.path_params["key"]})),
            WebSocketRoute("/v1/realtime", lambda websocket: Client(self, websocket).run()),
        ]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._thread.join()


class Client:
    """One connection."""

    def __init__(self, stub: Stub, websocket: WebSocket):
        self.stub, self.websocket = stub, websocket
        self.clips: dict[str, asyncio.Queue] = {}
        self.answers: list[asyncio.Task] = []
        self.start = 0.0

    async def send(self, kind: str, **fields) -> None:
        await self.websocket.send_text(json.dumps({"type": kind, **fields}))

    async def run(self) -> None:
        await self.websocket.accept("qwen-vl-streaming")
        models = [
            {"name": name, "variant": name, "mode": "serial", "schedules": SCHEDULES} for name in self.stub.models
        ]
        session = {
            "id": "s1", "models": models, "questions": QUESTIONS, "sources": ["door"] if self.stub.source else [],
            "frames_per_second": 2, "limits": {"frame_bytes": 1 << 20, "question_characters": 500},
        }  # fmt: skip
        await self.send("session.created", session=session)
        try:
            while True:
                message = await asyncio.wait_for(self.websocket.receive_text(), self.stub.idle)
                await self.receive(json.loads(message))
        except TimeoutError:
            await self.send("error", error={"code": "idle", "message": "nothing came", "event_id": None})
            await self.websocket.close()
            self.stub.closed += 1
        except (WebSocketDisconnect, RuntimeError, KeyError):
            for task in self.answers:
                task.cancel()

    async def receive(self, message: dict) -> None:
        match message["type"]:
            case "session.update":
                await self.update(message["session"])
            case "input_video_frame.append":
                await self.frame(message, await self.websocket.receive_bytes())
            case "input_video.end":
                self.give(None)
            case "response.cancel":
                for task in self.answers:
                    task.cancel()
                for name in self.clips:
                    await self.done(name, "cancelled", [], 0)

    async def update(self, session: dict) -> None:
        self.stub.updates.append(session)
        if self.stub.refusal:
            await self.send("error", error={"code": "queue_full", "message": self.stub.refusal, "event_id": None})
            return
        for place in range(self.stub.places, 0, -1):
            left = self.stub.left
            await self.send("session.queued", place=place)
            while self.stub.left == left:
                await asyncio.sleep(0.01)
        width, height = self.stub.size
        await self.send("session.updated", session={**session, "frame": {"width": width, "height": height}})
        self.start = time.monotonic()
        self.clips = {name: asyncio.Queue() for name in session["models"]}
        self.answers = [asyncio.create_task(self.answer(name)) for name in self.clips]
        if session["source"]["kind"] == "server":
            self.answers.append(asyncio.create_task(self.play()))

    async def play(self) -> None:
        """The server's own source."""
        for number, jpeg in enumerate(self.stub.source):
            if number % 2 == 0:  # the frames of a clip come together
                await asyncio.sleep(max(0, self.start + number / 2 + 0.5 - time.monotonic()))
            last = {"last": True} if number == len(self.stub.source) - 1 else {}
            await self.send("output_video_frame", time=number / 2, bytes=len(jpeg), **last)
            await self.websocket.send_bytes(jpeg)
            if number % 2:
                self.give(number / 2)
        self.give(None)

    async def frame(self, header: dict, jpeg: bytes) -> None:
        assert len(jpeg) == header["bytes"] and header["format"] == "jpeg"
        self.stub.frames.append((header["time"], jpeg))
        if len(self.stub.frames) == self.stub.vanish_after:
            self.stub.vanish_after = None
            await self.websocket.close()
            return
        if len(self.stub.frames) % 2 == 0:
            self.give(header["time"])
        waiting = {name: max(0, queue.qsize() - 1) for name, queue in self.clips.items() if MODELS[name]}
        event = header["event_id"]
        about = {"time": header["time"], "age_ms": 1.5, "dropped": 0, "waiting": waiting, "deadline_misses": waiting}
        await self.send("input_video_frame.acknowledged", event_id=event, **about)

    def give(self, captured: float | None) -> None:
        for queue in self.clips.values():
            queue.put_nowait(captured)

    async def answer(self, name: str) -> None:
        needed, clips, captured, ages, tokens = MODELS[name], 0, 0.0, [], iter(TOKENS)
        await self.send("response.created", response={"id": f"r-{name}", "model": name})
        while (newest := await self.clips[name].get()) is not None:
            captured, clips = newest, clips + 1
            if needed is None:
                continue
            for token in islice(tokens, 3):
                await asyncio.sleep(needed / 3)
                await self.token(name, token, clips, captured, ages)
        while self.stub.held:
            await asyncio.sleep(0.01)
        for token in tokens:
            await asyncio.sleep(0.01)
            await self.token(name, token, clips, captured, ages)
        await self.done(name, "completed", ages, clips)

    async def token(self, name: str, token: str, slot: int, captured: float, ages: list[float]) -> None:
        now = time.monotonic() - self.start
        ages.append(1000 * (now - captured))
        waiting = self.clips[name].qsize() if MODELS[name] else 0
        about = {"slot": slot, "time": now, "capture_time": captured, "age_ms": ages[-1]}
        about |= {"waiting": waiting, "deadline_misses": waiting}
        ids = {"response_id": f"r-{name}", "model": name, "token_ids": [7]}
        await self.send("response.output_text.delta", delta=token, **ids, **about)

    async def done(self, name: str, status: str, ages: list[float], clips: int) -> None:
        ages = sorted(ages) or [0.0]
        figures = {
            "tokens": len(ages), "clips": clips, "tokens_per_second": 3.0, "deadline_misses": 0, "clips_waiting": 0,
            "age_ms": {"median": ages[len(ages) // 2], "p95": ages[int(len(ages) * 0.95)]}, "dropped": 0,
        }  # fmt: skip
        response = {"id": f"r-{name}", "model": name, "status": status, "text": "", "record_id": f"rec-{name}"}
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self.send("response.done", response={**response, "figures": figures})
