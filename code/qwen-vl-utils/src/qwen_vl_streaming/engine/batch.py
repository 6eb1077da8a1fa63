"""Captions many videos on one device, in a batch that is refilled as streams end. Knows nothing about data sets, video
files and metrics.

If the visual side of a variant never attends to text, a video is fed whole and its text follows slot by slot.
`interleave` is fed clip by clip, and the text rows of other streams are fed in the same steps. A caption does not
depend on the batch.
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
from ..stream import PENALTY, Caption
from ..timeline.plan import make_plan
from ..timeline.timeline import Layout, ModelSchedule, Schedule
from ..timeline.variants import Variant
from .device_event import DeviceEvent
from .kv_cache import PagedKVCache
from .runner import Runner

ENCODER_PATCHES = 32_768
"""Patches that the vision tower encodes at once. The language model gets a quarter as many tokens."""
MIN_CLIP_ROWS = 256
"""Clip rows of a mixed step, if enough are waiting. Fewer rows take as long, because the weights have to be read."""
FULL_CLIP_ROWS = 4096
"""Waiting clip rows that are all fed in one step. Divided over several steps, they would slow down each of them."""
POLL_INTERVAL = 4
"""Steps between two polls of which streams have ended."""
RESERVED_MEMORY = 0.2
"""Share of the GPU's free memory that is left for activations."""


@dataclass(frozen=True)
class Job:
    """One video to caption."""

    key: str
    """The caller's name for it."""
    pixels: Tensor
    """(N, patches, pixels of a patch) on the CPU, as `prompts.clip_pixels` returns them."""
    layout: Layout
    template: Template
    schedule: Schedule | ModelSchedule
    """`caption_all` takes a Schedule, `sessions.caption_sessions` a ModelSchedule."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.layout.grid


class Batch:
    """Schedules the streams of one Runner: which are fed next, and which have ended."""

    def __init__(
        self,
        model,
        variant: Variant,
        batch_slots: int,
        cache: PagedKVCache,
        penalty: float,
        max_new_tokens: int,
        text_capacity: int,
    ):
        self.model, self.variant, self.max_new_tokens = model, variant, max_new_tokens
        self.runner = Runner(model, batch_slots, cache, text_capacity, penalty)
        if self.runner.on_cuda:
            model.settle_tower()
            self.runner.capture()
        self.free_slots = list(range(batch_slots - 1, -1, -1))
        self.jobs: dict[int, Job] = {}
        self.visual_tokens: dict[int, Tensor] = {}
        self.clip_step: dict[int, int] = {}
        """The step at which each slot was last fed a clip."""
        self.polls: collections.deque = collections.deque()
        self.steps = 0

    @property
    def finished(self) -> bool:
        """Whether all tokens that the streams may write have been requested from the device."""
        return all(sequence.done for sequence in self.runner.sequences.values())

    def admit(self, jobs: list[Job], visual_tokens: list[Tensor]) -> None:
        """Starts `jobs`, which must fit, and feeds those of their `visual_tokens` that can be fed at once. Each is (N,
        tokens of a clip, C)."""
        batch_slots = [self.free_slots.pop() for _ in jobs]
        for batch_slot, job in zip(batch_slots, jobs, strict=True):
            self.jobs[batch_slot], self.clip_step[batch_slot] = job, self.steps
            if isinstance(job.schedule, ModelSchedule):
                raise ValueError("a ModelSchedule has no plan in advance: use sessions.caption_sessions")
            plan = make_plan(self.variant, job.layout, job.schedule, self.max_new_tokens)
            self.runner.admit(batch_slot, plan, job.template)
        if self.variant.parallel or not self.variant.streams:
            self.runner.prefill(batch_slots, visual_tokens)
        else:
            self.visual_tokens |= dict(zip(batch_slots, visual_tokens, strict=True))

    def step(self) -> None:
        """Writes a token in each stream that can, and feeds the next clips of some streams that need them."""
        runner = self.runner
        if feeding := self._next_to_feed():
            self.clip_step |= dict.fromkeys(feeding, self.steps)
            feeding += [batch_slot for batch_slot, sequence in runner.sequences.items() if sequence.can_decode]
            runner.mixed_step(feeding, [self.visual_tokens[batch_slot] for batch_slot in feeding])
        else:
            runner.decode()
        self.steps += 1
        if self.steps % POLL_INTERVAL == 0 or self.finished:
            self._poll()

    def _next_to_feed(self) -> list[int]:
        """Batch slots whose clips are fed in this step: those without one for longest.

        With k tokens per slot, one stream in k is fed clips at a time, so that each step has clips beside the text rows
        of the others. If all waiting clips fill a step, all of them are fed.
        """
        sequences = self.runner.sequences
        rows = {slot: len(sequence.next_spans()[1]) for slot, sequence in sequences.items() if sequence.needs_clips}
        if sum(rows.values()) >= FULL_CLIP_ROWS:
            return list(rows)
        quotas = [sequence.plan.schedule.quotas for sequence in sequences.values()]
        slots, tokens = sum(map(len, quotas)), sum(map(sum, quotas))
        share, fed, chosen = len(sequences) / max(tokens / max(slots, 1), 1), 0, []
        for batch_slot in sorted(rows, key=self.clip_step.__getitem__):
            if len(chosen) >= share and fed >= MIN_CLIP_ROWS:
                break
            chosen.append(batch_slot)
            fed += rows[batch_slot]
        return chosen

    def _poll(self) -> None:
        """Starts copying what has been written so far to the host, without waiting for it."""
        runner = self.runner
        ids, ended = (tensor.to("cpu", non_blocking=True) for tensor in (runner.text_ids, runner.ended))
        ready = DeviceEvent(runner.device)
        done = {batch_slot for batch_slot, sequence in runner.sequences.items() if sequence.done}
        self.polls.append((ready, ids, ended, done, dict(self.jobs)))

    def collect(self) -> Iterator[tuple[Job, Caption]]:
        """Yields the captions that are complete. Waits for the device only if it is two polls behind or nothing is
        left to do."""
        while self.polls:
            ready, ids, ended, done, jobs = self.polls[0]
            if not ready.query():
                if len(self.polls) < 2 and not self.finished:
                    return
                ready.synchronize()
            self.polls.popleft()
            for batch_slot, job in jobs.items():
                if self.jobs.get(batch_slot) is job and (batch_slot in done or ended[batch_slot]):
                    yield job, self._release(batch_slot, job, ids[batch_slot].tolist())

    def _release(self, batch_slot: int, job: Job, ids: list[int]) -> Caption:
        first = len(job.template.header)
        tokens = ids[first : first + self.max_new_tokens]
        slots = self.runner.sequences[batch_slot].plan.slots(len(tokens))
        if ends := job.template.ends(tokens, slots, job.schedule.clips):
            tokens, slots = tokens[: ends[0] + 1], slots[: ends[0] + 1]
        self.runner.release(batch_slot)
        del self.jobs[batch_slot]
        self.visual_tokens.pop(batch_slot, None)
        self.free_slots.append(batch_slot)
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
    """Yields each job with its caption, in order of completion.

    Takes from `jobs` only when there is room: at most `batch_size` streams run at once, and their keys and values take
    at most `memory` bytes (by default most of the GPU's free memory). The first `batch_size` jobs size the batch, so
    give the longest videos first. `penalty` is the repetition penalty (1.0 turns it off), and each job writes at most
    `max_new_tokens`. Raises InputError for a video that does not fit by itself.
    """
    config = model.model.language_model.config
    block_bytes = PagedKVCache.block_bytes(config, model.dtype)
    if memory is None and model.device.type == "cuda":
        memory = int((1 - RESERVED_MEMORY) * torch.cuda.mem_get_info(model.device)[0])
    limit = None if memory is None else memory // block_bytes - 1

    def blocks_of(job: Job) -> int:
        layout = job.layout
        visual = layout.prompt + len(job.pixels) * layout.tokens_per_clip + layout.tail
        count = PagedKVCache.blocks_needed(visual, layout.header + max_new_tokens)
        if memory is not None and limit is not None and count > limit:
            raise does_not_fit(job.key, count * block_bytes, memory)
        return count

    @torch.no_grad()
    def encode(jobs: list[Job]) -> list[Tensor]:
        return model.perceive_all([job.pixels for job in jobs], [job.grid for job in jobs]) if jobs else []

    jobs = iter(jobs)
    pending = collections.deque(itertools.islice(jobs, batch_size))
    encoded: list[Tensor] = []  # visual tokens of the first pending jobs
    batch = None
    while pending or (batch and batch.jobs):
        if batch is None or (not batch.jobs and not _fits(batch, pending[0], blocks_of(pending[0]))):
            batch = cache = None
            gc.collect()  # frees the old batch, which is in reference cycles, before allocating the next one
            needs = [blocks_of(job) for job in pending]
            cache = PagedKVCache(
                config, batch_size, min(sum(needs), limit or sum(needs)), max(needs), model.dtype, model.device
            )
            text_capacity = max_new_tokens + max(job.layout.header for job in pending)
            batch = Batch(model, variant, batch_size, cache, penalty, max_new_tokens, text_capacity)
        free, group, together = len(batch.runner.cache.free_blocks), [], _encoded_together(pending)
        while len(group) < min(together, len(batch.free_slots)):
            count = blocks_of(pending[0])
            if count > free or not _fits(batch, pending[0], count):
                break
            group.append(pending.popleft())
            free -= count
            pending.extend(itertools.islice(jobs, 1))
        if group:
            ready, encoded = encoded[: len(group)], encoded[len(group) :]
            batch.admit(group, ready + encode(group[len(ready) :]))
            continue
        batch.step()
        if batch.finished and not encoded:  # keeps the device busy while captions are collected and jobs admitted
            encoded = encode([pending[i] for i in range(_encoded_together(pending))])
        yield from batch.collect()


def does_not_fit(video: str, needed: int, memory: int) -> InputError:
    """The error for a video that needs more bytes for its keys and values than there are."""
    return InputError(
        f"video {video} needs {needed / 2**30:.3g} GiB for its keys and values, and {memory / 2**30:.3g} are "
        "available: give it fewer pixels, or more memory (--memory)"
    )


def _encoded_together(pending: collections.deque[Job]) -> int:
    """How many of the first `pending` jobs the vision tower encodes at once."""
    sizes = itertools.accumulate(job.pixels.shape[:2].numel() for job in pending)
    return sum(size <= ENCODER_PATCHES or i == 0 for i, size in enumerate(sizes))


def _fits(batch: Batch, job: Job, blocks: int) -> bool:
    """Whether the tables of `batch` are wide enough for `job`."""
    runner = batch.runner
    return (
        blocks <= runner.cache.block_tables.shape[1]
        and job.layout.header + batch.max_new_tokens <= runner.text_capacity
    )
