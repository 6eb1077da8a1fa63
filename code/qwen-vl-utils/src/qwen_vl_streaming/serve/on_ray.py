"""The server on Ray Serve, for more than one machine: each replica is a whole server with its own models.

    serve run qwen_vl_streaming.serve.on_ray:build flags="--model DIR" replicas=4 gpus=1

Ray's proxies spread connections over replicas; a connection, and so a session, stays with its replica. Needs ray:
pip install -e "code/qwen-vl-utils[serve,ray]".
"""

import contextlib
import os
import shlex
from collections.abc import AsyncIterator

from ray import serve  # pyright: ignore[reportMissingImports] - an optional extra
from starlette.applications import Starlette

from ..common.progress import quiet_libraries
from .app import WebApp
from .catalog import load_catalog, place
from .options import parse
from .server import Server
from .workers import start_workers


def build(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` deploys. `flags` are those of `python -m qwen_vl_streaming.serve` without `--sessions`; its
    `--port` is Ray's matter. `replicas`, and `gpus` and `sessions` of each, are numbers."""
    flags, sessions = shlex.split(arguments["flags"]), int(arguments.get("sessions", 64))

    def make_app() -> Starlette:
        """Called in each replica."""
        quiet_libraries()
        settings = parse(__doc__, os.environ, [*flags, "--sessions", str(sessions)])
        models = load_catalog(settings)
        server = Server(settings, models, start_workers(place(models, settings)))
        app = WebApp(server)

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            server.start()
            yield
            await app.stop()

        return app.starlette(lifespan)

    class Replica:
        pass

    deployment = serve.deployment(
        name="qwen-vl-streaming",
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_cpus": 1, "num_gpus": float(arguments.get("gpus", 1))},
        max_ongoing_requests=2 * sessions + 100,
    )
    return deployment(serve.ingress(make_app)(Replica)).bind()
