"""A server and a page on which models describe a camera or a film while it runs.

    python -m qwen_vl_streaming.serve --model DIR [--model NAME=DIR ...] [--source NAME=SOURCE ...]

Then open http://127.0.0.1:8000. docs/serving.md has the protocol, the limits and how to reach it from elsewhere. On
Ctrl-C or SIGTERM, every session ends with its record. Exit status: 0 then; 2 for user errors; 1 if all models are lost
for good.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

import torch
import uvicorn

from ..common.ending import leave
from ..common.errors import InputError
from ..common.progress import quiet_libraries
from ..common.redact import Redacting
from .app import WebApp
from .catalog import load_catalog, place
from .guards import GuardedHTTP, GuardedWebSocket
from .model_process import SWITCH_SECONDS
from .options import Settings, bind, parse
from .server import Server
from .workers import start_workers

logger = logging.getLogger("qwen_vl_streaming.serve")

HANDSHAKE_MARGIN = 1024
"""Connections beyond sessions and queue."""


class Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`, which ends sessions before connections."""

    def capture_signals(self):
        return contextlib.nullcontext()


def make_uvicorn(app: WebApp) -> Uvicorn:
    settings = app.settings
    config = uvicorn.Config(
        app.starlette(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        log_config=None,  # its messages go where ours go, without secrets
        proxy_headers=False,  # any client of a proxy can write them
        http=GuardedHTTP,
        ws=GuardedWebSocket,
        ws_max_size=settings.limits.frame_bytes + 2**16,
        ws_per_message_deflate=False,
        limit_concurrency=settings.sessions * len(app.server.workers) + settings.queue + HANDSHAKE_MARGIN,
        timeout_graceful_shutdown=2,
    )
    return Uvicorn(config)


async def serve(server: Server, listener: socket.socket) -> int:
    """Serve until a signal or until all models are lost. Returns the exit status."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: sys.exit(1) if stop.is_set() else stop.set())
    server.start()
    app = WebApp(server)
    web = make_uvicorn(app)
    running = asyncio.create_task(web.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.wait())
    status = 0
    while not stop.is_set() and not running.done():
        await asyncio.wait([running, stopped], timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        if all(worker.given_up for worker in server.workers):
            logger.error("all models are lost: the server ends")
            status = 1
            break
    await app.stop()
    web.should_exit = True
    await running
    return status


def address(listener: socket.socket, settings: Settings) -> str:
    host = settings.host.strip("[]")
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{listener.getsockname()[1]}"


def main() -> None:
    settings = parse(__doc__, os.environ)
    quiet_libraries()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Redacting())
    torch.set_num_threads(1)  # pictures are prepared in threads, each of which is one
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = bind(settings.host, settings.port)
    try:
        settings.records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--records {settings.records} cannot be made ({error.strerror}): give another") from error
    models = load_catalog(settings)
    specs = place(models, settings)
    print(f"loading {', '.join(f'{spec.name} on {spec.device}' for spec in specs)}", flush=True)
    workers = start_workers(specs)
    server = Server(settings, models, workers)
    room = ", ".join(f"{worker.spec.name}: {worker.batch_slots} sessions" for worker in workers)
    need = "#token=… (QWEN2_5_VL_SERVE_TOKEN)" if settings.token else ""
    print(f"{room}\nopen {address(listener, settings)}/{need}", flush=True)
    status = asyncio.run(serve(server, listener))
    for worker in workers:
        worker.join()
    leave(status)  # at once: Python's own end takes seconds
