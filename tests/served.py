"""A server in threads of the test's process, its models included, and the client of docs/serving.md."""

import asyncio
import contextlib
import json
import multiprocessing
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from published import ROOT
from qwen_vl_streaming.model.trained import training_keys
from qwen_vl_streaming.serve import model_process, workers
from qwen_vl_streaming.serve.app import WebApp
from qwen_vl_streaming.serve.catalog import load_catalog, place
from qwen_vl_streaming.serve.cli import make_uvicorn
from qwen_vl_streaming.serve.options import bind, parse
from qwen_vl_streaming.serve.pixel_buffers import PixelBuffers
from qwen_vl_streaming.serve.process_handle import ProcessHandle
from qwen_vl_streaming.serve.server import Server
from qwen_vl_streaming.sessions import SessionPool
from qwen_vl_streaming.timeline.variants import VARIANTS
from waiting import SECONDS, until
from websockets.asyncio.client import connect

BUDGET = {"min_pixels_per_frame": 3136, "max_pixels_per_frame": 6272, "max_pixels_per_video": 31360, "budget": "video"}


def client() -> SimpleNamespace:
    """The names of the Python client in docs/serving.md."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/serving.md").read_text(), re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "client"}
    exec(block, names)
    return SimpleNamespace(**names)


def trained(checkpoint: Path, folder: Path, variant: str) -> Path:
    """A copy of `checkpoint` that says it was trained as `variant`, with small frames."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(training_keys(VARIANTS[variant], 3), pixel_budget=BUDGET)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Running:
    """A server that runs."""

    def __init__(self, app: WebApp, port: int, loop: asyncio.AbstractEventLoop, pools: list[SessionPool]):
        self.app, self.server, self.port, self.loop, self.pools = app, app.server, port, loop, pools
        self.http, self.address = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}/v1/realtime"

    def connect(self, **options):
        return connect(self.address, **{"subprotocols": ["qwen-vl-streaming"], **options})

    def record(self, key: str) -> Path:
        (found,) = self.server.settings.records.glob(f"*-{key}.json")
        return found

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.app.stop(), self.loop).result(SECONDS)


@contextlib.contextmanager
def running(flags: list[str], environment: dict | None = None, threads: bool = True, **limits) -> Iterator[Running]:
    """`threads`: models run in threads of this process, so that tests can reach them."""
    settings = parse("", environment or {}, [*flags, "--port", "0", "--device", "cpu"])
    settings = replace(settings, limits=replace(settings.limits, **limits))
    listener, models = bind("127.0.0.1", 0), load_catalog(settings)
    pools: list[SessionPool] = []
    make_pool = model_process.make_pool
    with mock.patch.object(workers, "RESTARTS", 0 if threads else workers.RESTARTS):
        with (
            mock.patch.object(model_process, "make_pool", lambda *given: pools.append(make_pool(*given)) or pools[-1]),
            mock.patch.object(ProcessHandle, "start", start_thread if threads else ProcessHandle.start),
        ):
            server = Server(settings, models, workers.start_workers(place(models, settings)))
        app, started, loop = WebApp(server), threading.Event(), asyncio.new_event_loop()
        web = make_uvicorn(app)

        async def serve() -> None:
            server.start()
            started.set()
            await web.serve(sockets=[listener])

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
        thread.start()
        started.wait(SECONDS)
        try:
            yield Running(app, listener.getsockname()[1], loop, pools)
        finally:
            if not server.stopping:
                asyncio.run_coroutine_threadsafe(app.stop(), loop).result(SECONDS)
            web.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


def start_thread(spec) -> ProcessHandle:
    """In place of `ProcessHandle.start`: runs the model in a thread of this process. Waits until it has loaded, because
    transformers does not load two models at once in one process."""
    pixels = PixelBuffers(spec.clip_bytes, spec.dtype)
    connection, theirs = multiprocessing.Pipe()
    threading.Thread(target=model_process.run_model, args=(theirs, pixels, spec), daemon=True).start()
    connection.poll(None)
    return ProcessHandle(spec.name, connection, pixels, None)


def gather(events) -> dict[str, list[dict]]:
    """Events by type."""
    found: dict[str, list[dict]] = {}
    for event in events:
        found.setdefault(event["type"], []).append(event)
    return found


def play(address: str, film: Path, **asked) -> dict[str, list[dict]]:
    """All events of the documented client that shows `film`."""

    async def run() -> list[dict]:
        async with asyncio.timeout(SECONDS):
            return [event async for event in client().watch(address, str(film), **asked)]

    return gather(asyncio.run(run()))


def token_ids(events: dict[str, list[dict]], model: str) -> list[int]:
    deltas = events.get("response.output_text.delta", [])
    return [token for delta in deltas if delta["model"] == model for token in delta["token_ids"]]


def drive(run, seconds: float = SECONDS) -> object:
    async def limited():
        async with asyncio.timeout(seconds):
            return await run()

    return asyncio.run(limited())


def settled(server: Running) -> None:
    """Wait until nothing runs, and check that nothing is left behind."""
    inside = server.server
    until(lambda: not (server.app.viewers or any(worker.listeners for worker in inside.workers)))
    assert not server.app.addresses and not inside.admission.queue
    assert {worker.batch_slots for worker in inside.workers} == {inside.settings.sessions}
    assert [len(pool.runner.free_slots) for pool in server.pools] == [inside.settings.sessions] * len(server.pools)
    free = [len(pool.runner.cache.free_blocks) for pool in server.pools]
    assert free == [worker.blocks for worker in inside.workers]


def without_weights(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder
