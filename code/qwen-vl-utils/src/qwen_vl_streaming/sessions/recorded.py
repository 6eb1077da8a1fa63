"""Captions many recorded videos with sessions of a pool, as fast as possible: for schedules in which the model decides
when a slot ends, so that `engine/batch.py` cannot plan them.

All clips of a video have arrived when its session opens. Everything else is as in live sessions, and so are the
captions. Knows nothing about data sets, video files and metrics.
"""

import collections
import gc
import itertools
from collections.abc import Iterable, Iterator

import torch

from ..engine.batch import Job, does_not_fit
from ..engine.kv_cache import PagedKVCache
from ..reference import PENALTY, Caption
from ..timeline.timeline import ModelSchedule
from ..timeline.variants import Variant
from .session import Session
from .session_pool import RESERVE, SessionPool, blocks_needed


def caption_sessions(
    model,
    variant: Variant,
    jobs: Iterable[Job],
    *,
    batch_size: int,
    memory: int | None = None,
    penalty: float = PENALTY,
    max_new_tokens: int = 300,
) -> Iterator[tuple[Job, Caption]]:
    """Yields each job, whose schedule is a ModelSchedule, with its caption, in order of completion. Arguments and
    errors as in `engine.batch.caption_all`."""
    block_bytes = PagedKVCache.block_bytes(model.model.language_model.config, model.dtype)
    if memory is None and model.device.type == "cuda":
        memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0])

    def blocks_of(job: Job) -> int:
        count = blocks_needed(job.layout, len(job.pixels), max_new_tokens, None)
        if memory is not None and count > memory // block_bytes - 1:
            raise does_not_fit(job.key, count * block_bytes, memory)
        return count

    def make_pool(first: Iterable[Job]) -> SessionPool:
        first = [*first]
        largest = max(first, key=blocks_of)
        return SessionPool(
            model,
            len(first),
            largest.layout,
            memory=memory,
            max_clips=len(largest.pixels),
            max_new_tokens=max_new_tokens,
            clip_tokens=max(job.layout.tokens_per_clip for job in first),
            penalty=penalty,
        )

    def fits(pool: SessionPool, job: Job) -> bool:
        """Whether the tables of `pool` are wide enough for `job`."""
        cache, text = pool.runner.cache, job.layout.header + max_new_tokens
        clip_tokens = pool.runner.clip_features.shape[1]
        wide = blocks_of(job) <= cache.block_tables.shape[1] and text <= pool.runner.text_capacity
        return wide and job.layout.tokens_per_clip <= clip_tokens

    jobs = iter(jobs)
    pending = collections.deque(itertools.islice(jobs, batch_size))
    running: dict[str, tuple[Job, Session]] = {}
    pool = None
    while pending or running:
        if pool is None or (not running and not fits(pool, pending[0])):
            pool = None
            gc.collect()  # frees the old pool, which is in reference cycles, before allocating the next one
            pool = make_pool(pending)
        while pending and pool.runner.free_slots and fits(pool, pending[0]):
            if blocks_of(pending[0]) > len(pool.runner.cache.free_blocks):
                break
            job = pending.popleft()
            pending.extend(itertools.islice(jobs, 1))
            running[job.key] = job, _open(model, pool, variant, job, max_new_tokens)
        pool.step()
        for key in [key for key, (_, session) in running.items() if session.done]:
            yield _close(*running.pop(key))


@torch.no_grad()
def _open(model, pool: SessionPool, variant: Variant, job: Job, max_new_tokens: int) -> Session:
    """A session to which all clips of `job` are fed. They are encoded together, which is faster than one by one."""
    if not isinstance(job.schedule, ModelSchedule):
        raise ValueError(f"job {job.key} has a Schedule, which is known in advance: use engine.batch.caption_all")
    session = pool.open(
        variant,
        job.template,
        job.layout,
        mode="fused" if variant.parallel else "serial",
        schedule=job.schedule.name,
        max_clips=len(job.pixels),
        max_new_tokens=max_new_tokens,
    )
    (visual_tokens,) = model.perceive_all([job.pixels], [job.grid])
    for number, clip in enumerate(visual_tokens, 1):
        session.feed(clip, last=number == len(visual_tokens))
    return session


def _close(job: Job, session: Session) -> tuple[Job, Caption]:
    session.close()
    caption = session.caption()
    rest = [0] * (len(job.pixels) - len(caption.schedule))  # slots after the end of the answer
    return job, Caption(caption.tokens, caption.slots, caption.schedule + rest)
