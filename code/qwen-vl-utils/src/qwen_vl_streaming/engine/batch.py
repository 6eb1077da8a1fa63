"""Captions of many videos on one device, in a batch that is refilled as streams end. Knows nothing of data sets, video
files and metrics.

A video whose visual side never sees text is taken in whole and revealed to its text slot by slot; `interleave` is fed
clip by clip, and the words that other streams have due ride with those clips. What is written does not depend on the
batch.
"""

import collections
import gc
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InputError
from ..model.prompts import Template
from ..reference import PENALTY, Caption
from ..timeline.plan import make_plan
from ..timeline.timeline import Layout, Schedule
from ..timeline.variants import Variant
from .device_event import DeviceEvent
from .kv_cache import PagedKVCache
from .runner import Runner

PACK = 32_768  # patches that the vision tower takes in at once; the language model sees a quarter as many tokens
LEAST = 256  # rows of clips in a pass where so many wait: fewer take no less time, since weights must be read
FULL = 4096  # rows of clips that are one pass where so many wait: parted they take longer than words by themselves
POLL = 4  # steps between two looks at which streams have ended
RESERVE = 0.2  # share of the free memory that is left to activations


@dataclass(frozen=True)
class Job:
    """One video to caption."""

    key: str
    """The caller's own name for it."""
    pixels: Tensor
    """(N, patches, pixels of a patch) on the CPU, as `prompts.clip_pixels` gives them."""
    layout: Layout
    template: Template
    schedule: Schedule

    @property
    def grid(self) -> tuple[int, int]:
        return self.layout.grid


class Batch:
    """Streams that share a model, their seats and pages, and a look now and then at which of them have ended."""

    def __init__(
        self, model, variant: Variant, batch_slots: int, cache: PagedKVCache, penalty: float, most: int, longest: int
    ):
        self.model, self.variant, self.most = model, variant, most
        self.engine = Runner(model, batch_slots, cache, longest, penalty)
        if self.engine.fast:
            model.settle_tower()
            self.engine.capture()
        self.empty = list(range(batch_slots - 1, -1, -1))
        self.jobs: dict[int, Job] = {}
        self.visual_tokens: dict[int, Tensor] = {}
        self.watched: dict[int, int] = {}
        """The step at which a seat was last fed a clip."""
        self.looks: collections.deque = collections.deque()
        self.steps = 0

    @property
    def finished(self) -> bool:
        """All that these streams may write has been begun."""
        return all(stream.done for stream in self.engine.seated.values())

    def admit(self, jobs: list[Job], visual_tokens: list[Tensor]) -> None:
        """Seat `jobs`, which must fit, and take in what can be taken in at once of their `visual_tokens`, each (N,
        tokens of a clip, C)."""
        batch_slots = [self.empty.pop() for _ in jobs]
        for batch_slot, job in zip(batch_slots, jobs, strict=True):
            self.jobs[batch_slot], self.watched[batch_slot] = job, self.steps
            self.engine.admit(batch_slot, make_plan(self.variant, job.layout, job.schedule, self.most), job.template)
        if self.variant.parallel or not self.variant.streams:
            self.engine.take_in(batch_slots, visual_tokens)
        else:
            self.visual_tokens |= dict(zip(batch_slots, visual_tokens, strict=True))

    def step(self) -> None:
        """A word in each stream that has one due, and with them the next clips of some that wait for theirs."""
        engine = self.engine
        if feeding := self._next_to_watch():
            self.watched |= dict.fromkeys(feeding, self.steps)
            feeding += [batch_slot for batch_slot, stream in engine.seated.items() if stream.speaks]
            engine.extend(feeding, [self.visual_tokens[batch_slot] for batch_slot in feeding])
        else:
            engine.write()
        self.steps += 1
        if self.steps % POLL == 0 or self.finished:
            self._look()

    def _next_to_watch(self) -> list[int]:
        """Some of the seats that wait, those that have gone without a clip for longest first: of all that are seated
        one in as many as a slot has words, so that every pass has clips and the words of others to ride with them. All
        of them where their clips fill a pass."""
        seated = self.engine.seated
        rows = {batch_slot: len(stream.next_span()[1]) for batch_slot, stream in seated.items() if stream.waits}
        if sum(rows.values()) >= FULL:
            return list(rows)
        quotas = [stream.plan.schedule.quotas for stream in seated.values()]
        slots, words = sum(map(len, quotas)), sum(map(sum, quotas))
        share, fed, chosen = len(seated) / max(words / max(slots, 1), 1), 0, []
        for batch_slot in sorted(rows, key=self.watched.__getitem__):
            if len(chosen) >= share and fed >= LEAST:
                break
            chosen.append(batch_slot)
            fed += rows[batch_slot]
        return chosen

    def _look(self) -> None:
        """Have the device say what is written so far, without waiting for it."""
        engine = self.engine
        ids, ended = (tensor.to("cpu", non_blocking=True) for tensor in (engine.ids, engine.ended))
        ready = DeviceEvent(engine.device)
        done = {batch_slot for batch_slot, stream in engine.seated.items() if stream.done}
        self.looks.append((ready, ids, ended, done, dict(self.jobs)))

    def collect(self) -> Iterator[tuple[Job, Caption]]:
        """The captions that are known to be complete. Waits for the device where that is two looks behind, or where
        nothing is left to do."""
        while self.looks:
            ready, ids, ended, done, jobs = self.looks[0]
            if not ready.query():
                if len(self.looks) < 2 and not self.finished:
                    return
                ready.synchronize()
            self.looks.popleft()
            for batch_slot, job in jobs.items():
                if self.jobs.get(batch_slot) is job and (batch_slot in done or ended[batch_slot]):
                    yield job, self._leave(batch_slot, job, ids[batch_slot].tolist())

    def _leave(self, batch_slot: int, job: Job, ids: list[int]) -> Caption:
        first = len(job.template.header)
        tokens = ids[first : first + self.most]
        if job.template.end in tokens:
            tokens = tokens[: tokens.index(job.template.end) + 1]
        slots = self.engine.seated[batch_slot].plan.slots(len(tokens))
        self.engine.leave(batch_slot)
        del self.jobs[batch_slot]
        self.visual_tokens.pop(batch_slot, None)
        self.empty.append(batch_slot)
        return Caption(tokens, slots, [slots.count(slot) for slot in range(1, job.schedule.clips + 1)])


def caption_all(
    model,
    variant: Variant,
    jobs: Iterable[Job],
    *,
    batch_size: int,
    memory: int | None = None,
    penalty: float = PENALTY,
    max_new_tokens: int = 300,
) -> Iterator[tuple[Job, Caption]]:
    """Yield each job with its caption, in order of completion.

    `jobs` is pulled from only when there is room: at most `batch_size` streams run at once, and their keys and values
    take at most `memory` bytes (by default most of what a GPU has free). Give the longest videos first: the first
    `batch_size` of them size the batch. `penalty` is the repetition penalty (1.0 turns it off); at most
    `max_new_tokens` are written for a job. Raises InputError for a video that does not fit by itself.
    """
    config = model.model.language_model.config
    each = PagedKVCache.block_bytes(config, model.dtype)
    if memory is None and model.device.type == "cuda":
        memory = int((1 - RESERVE) * torch.cuda.mem_get_info(model.device)[0])
    most, limit = max_new_tokens, None if memory is None else memory // each - 1

    def blocks_of(job: Job) -> int:
        layout = job.layout
        visual = layout.prompt + len(job.pixels) * layout.tokens_per_clip + layout.tail
        count = PagedKVCache.blocks_needed(visual, layout.header + most)
        if limit is not None and count > limit:
            raise InputError(
                f"video {job.key} needs {count * each / 2**30:.3g} GiB for its keys and values, and there are "
                f"{memory / 2**30:.3g}: give it fewer pixels, or more memory (--memory)"
            )
        return count

    @torch.no_grad()
    def perceive(jobs: list[Job]) -> list[Tensor]:
        return model.perceive_all([job.pixels for job in jobs], [job.grid for job in jobs]) if jobs else []

    jobs = iter(jobs)
    pending = collections.deque(itertools.islice(jobs, batch_size))
    ahead: list[Tensor] = []  # visual tokens of the first that are pending
    batch = None
    while pending or (batch and batch.jobs):
        if batch is None or (not batch.jobs and not _fits(batch, pending[0], blocks_of(pending[0]), most)):
            batch = cache = None
            gc.collect()  # its memory goes before the next one's comes: its parts refer to each other
            needs = [blocks_of(job) for job in pending]
            cache = PagedKVCache(
                config, batch_size, min(sum(needs), limit or sum(needs)), max(needs), model.dtype, model.device
            )
            batch = Batch(
                model, variant, batch_size, cache, penalty, most, most + max(job.layout.header for job in pending)
            )
        free, group, together = len(batch.engine.cache.free_blocks), [], _together(pending)
        while len(group) < min(together, len(batch.empty)):
            count = blocks_of(pending[0])
            if count > free or not _fits(batch, pending[0], count, most):
                break
            group.append(pending.popleft())
            free -= count
            pending.extend(itertools.islice(jobs, 1))
        if group:
            seen, ahead = ahead[: len(group)], ahead[len(group) :]
            batch.admit(group, seen + perceive(group[len(seen) :]))
            continue
        batch.step()
        if batch.finished and not ahead:  # for the device to be at while captions are collected and others seated
            ahead = perceive([pending[i] for i in range(_together(pending))])
        yield from batch.collect()


def _together(pending: collections.deque[Job]) -> int:
    """How many of the first that are `pending` the vision tower takes in at once."""
    sizes = itertools.accumulate(job.pixels.shape[:2].numel() for job in pending)
    return sum(size <= PACK or i == 0 for i, size in enumerate(sizes))


def _fits(batch: Batch, job: Job, blocks: int, most: int) -> bool:
    """Whether the tables of `batch` are wide enough for `job`."""
    table, positions = batch.engine.cache.block_tables, batch.engine.positions
    return blocks <= table.shape[1] and job.layout.header + most <= positions.shape[1]
