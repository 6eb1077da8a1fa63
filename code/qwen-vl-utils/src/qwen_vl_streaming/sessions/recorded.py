"""Captions many recorded videos with sessions of a pool, as fast as possible: for schedules in which the model decides
when a slot ends, so that `engine/batch.py` cannot plan them.

All clips of a video have arrived when its session opens. Everything else is as in live sessions, and so are the
captions. Knows nothing about data sets, video files and metrics.
"""

import collections
import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..engine.batch import Job, does_not_fit
from ..engine.kv_cache import PagedKVCache
from ..stream import PENALTY, Caption
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
    clip_tokens: int | None = None,
) -> Iterator[tuple[Job, Caption]]:
    """Yields each job, whose schedule is a ModelSchedule, with its caption, in order of completion. Arguments and
    errors as in `engine.batch.caption_all`, except that end-of-slot tokens before the last slot do not count for
    `max_new_tokens`: see `ModelSchedule.most_tokens`. `clip_tokens` is the most visual tokens of a clip of any job;
    default: of the first jobs. A job with larger clips, or longer than the first jobs, waits until the others are done
    and another pool is made, which takes a while on a GPU."""
    block_bytes = PagedKVCache.block_bytes(model.model.language_model.config, model.dtype)
    if memory is None and model.device.type == "cuda":
        memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0])
    limit = None if memory is None else memory // block_bytes - 1

    def most_tokens(job: Job) -> int:
        return _own_schedule(job).most_tokens(max_new_tokens)

    def blocks_of(job: Job) -> int:
        count = blocks_needed(job.layout, len(job.pixels), most_tokens(job), None)
        if memory is not None and limit is not None and count > limit:
            raise does_not_fit(job.key, count * block_bytes, memory)
        return count

    def make_pool(first: Sequence[Job], chunk: int | None) -> SessionPool:
        # Room for the largest of all and for the longest answer of all, or if that is too much, for the next job.
        for group in (first, first[:1]):
            largest = max(group, key=blocks_of)
            text = max(job.layout.header + most_tokens(job) for job in group)
            most = text - largest.layout.header
            if limit is None or blocks_needed(largest.layout, len(largest.pixels), most, None) <= limit:
                break
        return SessionPool(
            model,
            len(first),
            largest.layout,
            memory=memory,
            max_clips=len(largest.pixels),
            max_new_tokens=most,
            chunk=chunk,
            clip_tokens=max(clip_tokens or 0, *(job.layout.tokens_per_clip for job in first)),
            penalty=penalty,
            decode_counts=(),  # all slots are in use until the end: fewer kinds of steps take less time to compile
        )

    def fits(pool: SessionPool, job: Job) -> bool:
        """Whether the tables of `pool` are wide enough for `job`."""
        runner, text = pool.runner, job.layout.header + most_tokens(job)
        wide = blocks_of(job) <= runner.cache.block_tables.shape[1] and text <= runner.text_capacity
        return wide and job.layout.tokens_per_clip <= runner.clip_features.shape[1]

    def run(pool: SessionPool) -> Iterator[tuple[Job, Caption]]:
        """Runs the next jobs in `pool`, until one does not fit."""
        runner = pool.runner
        running: list[tuple[Job, Session]] = []
        while running or (pending and fits(pool, pending[0])):
            while pending and runner.free_slots and fits(pool, pending[0]):
                if blocks_of(pending[0]) > len(runner.cache.free_blocks):
                    break
                job = pending.popleft()
                pending.extend(itertools.islice(jobs, 1))
                running.append((job, _open(model, pool, variant, job, most_tokens(job))))
            pool.step()
            for job, session in [*running]:
                if session.done:
                    running.remove((job, session))
                    session.close()
                    caption = session.caption()
                    rest = [0] * (len(job.pixels) - len(caption.schedule))
                    yield job, Caption(caption.tokens, caption.slots, caption.schedule + rest)

    jobs = iter(jobs)
    pending = collections.deque(itertools.islice(jobs, batch_size))
    chunk = None
    while pending:
        pool = make_pool([*pending], chunk)
        chunk = pool.runner.chunk_size  # the same in all pools, so that steps are not compiled again
        yield from run(pool)
        del pool
        gc.collect()  # frees the pool, which is in reference cycles, before allocating the next one


def _own_schedule(job: Job) -> ModelSchedule:
    if not isinstance(job.schedule, ModelSchedule):
        raise ValueError(f"job {job.key} has a Schedule, which is known in advance: use engine.batch.caption_all")
    return job.schedule


@torch.no_grad()
def _open(model, pool: SessionPool, variant: Variant, job: Job, max_new_tokens: int) -> Session:
    """A session to which all clips of `job` are fed. They are encoded together, which is faster than one by one."""
    session = pool.open(
        variant,
        job.template,
        job.layout,
        mode="fused" if variant.parallel else "serial",
        schedule=_own_schedule(job).name,
        max_clips=len(job.pixels),
        max_new_tokens=max_new_tokens,
    )
    (visual_tokens,) = model.perceive_all([job.pixels], [job.grid])
    for number, clip in enumerate(visual_tokens, 1):
        session.feed(clip, last=number == len(visual_tokens))
    return session
