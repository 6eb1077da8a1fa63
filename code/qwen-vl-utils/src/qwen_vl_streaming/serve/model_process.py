"""The process that owns one model on one device: loads it, makes its session pool, and runs the `ModelLoop`."""

import functools
import logging
import signal
import sys
from multiprocessing.connection import Connection

import torch

from ..common.ending import die_with_parent, explain, leave, run_to_end
from ..common.progress import quiet_libraries
from ..live.setup import WARM_UP_STEPS, load_on
from ..sessions import SessionPool
from ..sessions.session_pool import RESERVE
from ..timeline.variants import VARIANTS
from .model_loop import ADVICE, ModelLoop
from .model_spec import ModelSpec
from .pixel_buffers import PixelBuffers

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 1e-3
"""How long a thread may keep Python's lock from others: each part of a clip that is read needs it."""


def run_process(connection: Connection, pixels: PixelBuffers, spec: ModelSpec, parent: int) -> None:
    """The main function of the process. It ends with the process `parent`, to which it leaves signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)
    quiet_libraries()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.setswitchinterval(SWITCH_SECONDS)
    run = functools.partial(run_model, connection, pixels, spec)
    run_to_end(run, lambda error: logger.exception("model %s", spec.name))
    leave(0)  # at once: Python's own end takes seconds


def run_model(connection: Connection, pixels: PixelBuffers, spec: ModelSpec) -> None:
    """Load the model and serve until None comes or the pipe is closed."""
    try:
        _serve(connection, pixels, spec)
    finally:
        connection.close()


def _serve(connection: Connection, pixels: PixelBuffers, spec: ModelSpec) -> None:
    try:
        model = load_on(spec.path, spec.device, spec.dtype, spec.weights)
        connection.send(("loaded",))
        pool = make_pool(model, spec, connection.recv())
    except EOFError:
        return
    except Exception as error:
        if (reason := explain(error, ADVICE, ADVICE)) is None:
            connection.send(("refused", f"model {spec.name} cannot be served ({type(error).__name__}: {error})"))
            raise
        connection.send(("refused", reason))
        return
    with pool:
        connection.send(("ready", len(pool.runner.free_slots), len(pool.runner.cache.free_blocks)))
        ModelLoop(connection, pixels, spec, pool).run()


def make_pool(model, spec: ModelSpec, sharing: int) -> SessionPool:
    """A pool in the memory that is free, if `sharing` models that are still to make theirs share it."""
    typical, memory = spec.common[0], None
    if model.device.type == "cuda":
        memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0] / sharing)
    pool = SessionPool(
        model,
        spec.sessions,
        spec.largest,
        memory=memory,
        **spec.limits,
        chunk=typical.tokens_per_clip + typical.tail,
        clip_tokens=spec.clip_tokens,
        grids=[layout.grid for layout in spec.common],
    )
    patches = typical.tokens_per_clip * model.model.visual.spatial_merge_size**2
    clip = torch.zeros(patches, model.model.visual.patch_embed.proj.weight[0].numel())
    options = {"mode": spec.mode, "max_clips": 2, "max_new_tokens": 9, "window": None}
    with pool.open(VARIANTS[spec.variant], spec.template, typical, **options) as session:
        session.feed(clip)
        session.feed(clip, last=True)
        for _ in range(WARM_UP_STEPS):
            pool.step()
    return pool
