"""What all connections share: settings, models and their processes, who waits for room, threads, metrics.

Knows nothing about the web: see `app.py`.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..model.frame_patches import FramePatches
from ..model.prompts import QUESTIONS
from ..sessions.session_pool import blocks_needed
from .admission import Admission
from .catalog import FPS, ServedModel
from .connection import Refused
from .metrics import Metrics
from .options import Settings
from .own_source import Opened, OwnSource
from .request import Plan
from .workers import Worker


class Server:
    """What all connections share."""

    def __init__(self, settings: Settings, models: dict[str, ServedModel], workers: Sequence[Worker]):
        self.settings, self.models, self.workers = settings, models, workers
        self.admission, self.metrics = Admission(workers, settings.queue), Metrics()
        processor = next(iter(models.values())).processor
        self.patches, self.exact_patches = FramePatches(processor, settings.dtype), FramePatches(processor)
        """Of the frames that models get, and of those whose hash records have."""
        self.executor = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "frames")
        self.reading: list[OwnSource] = []
        """Sources of the server's own that are open, for one viewer each."""
        self.stopping = False
        self.metrics.queue.set_function(lambda: len(self.admission.queue))

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

    def close(self) -> None:
        """End the model processes; their sessions end with their records."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()

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

    def plan(self, model: ServedModel, question: str, opened: Opened) -> Plan:
        """A session of `model` for a source. Raises Refused if it does not fit."""
        settings = self.settings
        spec = next(worker.spec for worker in self.workers if worker.spec.name == model.name)
        template = model.template(question)
        layout = model.layout(template, opened.size, opened.seconds)
        most = model.most_clips(layout, settings.most_clips)
        stream = spec.limits
        clips, tokens = settings.window or (stream["max_clips"], stream["max_new_tokens"])
        limits = {**stream, "max_clips": min(most or stream["max_clips"], stream["max_clips"])}
        if opened.count is not None and opened.count <= clips and settings.max_new_tokens <= tokens:
            # A recording that fits into the window has its own limits, as in eval.sh.
            limits = {"max_clips": opened.count, "max_new_tokens": settings.max_new_tokens, "window": None}
        blocks = blocks_needed(layout, **limits)
        if layout.prompt > spec.largest.prompt:
            raise Refused("invalid_event", f"question has more than {settings.limits.question_tokens} tokens")
        if layout.tokens_per_clip > spec.clip_tokens or blocks > blocks_needed(spec.largest, **stream):
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
