"""Decides when: when a slot begins, when a token may be written, when the stream is over. Only counts, no tensors.

A `Session` reports what happens (a clip arrived, a slot began, a token was requested, a token was read) and asks what
may happen next. The rule is the same in all execution modes:

    a slot begins    as soon as its clip is ready and the slot before it has written its quota; a greedy slot has no
                     quota and gives way to the next clip at any time
    a token          may be written while the newest slot is below its quota; the last slot writes the rest
    model-M          a slot has written its quota with the end-of-slot token or its M-th token; because only a token
                     that was read can end a slot, none is requested while one is pending, except in the last slot
    the answer ends  with the end-of-turn token, with the end-of-slot token in the last slot, or after `max_new_tokens`

Knows nothing of models, token ids, and how a clip becomes ready.
"""

import collections
from statistics import median

from ..common.errors import InputError
from ..timeline.timeline import Schedule, make_schedule, model_schedule_most
from ..timeline.variants import Variant

GREEDY = "greedy"
"""A schedule: each slot writes until the next clip is ready."""
FIRST_SLOTS = 8


class SlotScheduler:
    """The slots of one stream. A clip *arrives*, is *committed* once it starts to enter the model (from then on it is
    settled whether it is the last one), and is visible to the text once its slot *begins*."""

    def __init__(self, variant: Variant, schedule: str | Schedule, max_new_tokens: int, max_clips: int | None):
        """`schedule` is wait-K, random-K, model-M, "greedy", or a Schedule for a known number of clips.
        `max_clips=None` accepts any number of clips. Raises InputError for an unknown schedule, one for more than
        `max_clips` clips, and model-M for an offline variant."""
        if isinstance(schedule, Schedule) and max_clips is not None and schedule.clips > max_clips:
            raise InputError(
                f"a schedule for {schedule.clips} clips does not fit into max_clips {max_clips}: raise max_clips"
            )
        self.variant, self.schedule = variant, schedule
        self.max_new_tokens, self.max_clips = max_new_tokens, max_clips
        self.greedy = schedule == GREEDY
        self.most = None if isinstance(schedule, Schedule) else model_schedule_most(schedule)
        """M of model-M, by which the model decides when a slot ends; None for other schedules."""
        self.fixed_clips = schedule.clips if isinstance(schedule, Schedule) else None
        self._quotas: tuple[int, ...] = schedule.quotas if isinstance(schedule, Schedule) else ()
        if self.most is not None and not variant.streams:
            raise InputError(f"{variant.name} writes only after the whole video: it cannot have schedule {schedule}")
        if not (self.greedy or self.most is not None or isinstance(schedule, Schedule)):
            make_schedule(schedule, variant, 1)
        self.counts: list[int] = []
        """k_1 … of the slots that have begun, including tokens that were requested and not read yet."""
        self.pending: collections.deque[int] = collections.deque()
        """The slot of each token that was requested and not read yet."""
        self.arrived = self.committed = self.read_tokens = 0
        self.total: int | None = None
        """The number of slots N, once it is known: all clips have arrived."""
        self.ended = False
        """The token that ends the answer was read."""
        self.slot_ended = False
        """The end-of-slot token was read in the newest slot."""
        self.last_slot_limit: int | None = None
        """Tokens that the last slot may write, where `limit` was called before it began."""

    # State

    @property
    def all_arrived(self) -> bool:
        return self.total is not None

    @property
    def complete(self) -> bool:
        """The last slot has begun: it writes the rest."""
        return self.total is not None and len(self.counts) >= self.total

    @property
    def bare(self) -> bool:
        """The last slot has begun without a clip: see `end`."""
        return self.total is not None and self.complete and self.total > self.arrived

    @property
    def clips_waiting(self) -> int:
        """Clips that have arrived and whose slot has not begun."""
        return max(0, self.arrived - len(self.counts))

    @property
    def slots_waiting(self) -> bool:
        """A slot is still to begin with what has arrived so far."""
        return len(self.counts) < (self.arrived if self.total is None else self.total)

    @property
    def tail_is_next(self) -> bool:
        """The next slot is the last one and has no clip: only the tail enters."""
        return self.total is not None and self.arrived == len(self.counts) < self.total

    @property
    def requested_tokens(self) -> int:
        return self.read_tokens + len(self.pending)

    @property
    def done(self) -> bool:
        """No further token will be written."""
        return self.ended or self.read_tokens >= self.max_new_tokens

    @property
    def counts_unknown(self) -> bool:
        """How many tokens a slot writes is known only once it is over."""
        return self.greedy or self.most is not None

    @property
    def reads_first(self) -> bool:
        """A token must be read before the next one can be requested: it may end the slot."""
        return self.most is not None and not self.complete

    # Questions

    def quota(self, slot: int) -> float:
        """Tokens that `slot` (1…) may write, at most, if it is not the last one."""
        if not self.variant.streams:
            return 0
        if self.greedy:
            return float("inf")
        if self.most is not None:
            return self.most
        if slot > len(self._quotas) and not isinstance(self.schedule, Schedule):
            # A longer schedule of the same name begins like the shorter one.
            self._quotas = make_schedule(self.schedule, self.variant, 2 * slot + 1).quotas
        return self._quotas[slot - 1]

    @property
    def typical_quota(self) -> float:
        """The median quota of the first slots, without the last one; 0 if it is the only one, and for greedy slots,
        which give way to the next clip."""
        if self.greedy:
            return 0
        slots = range(1, min(FIRST_SLOTS + 1, self.fixed_clips or FIRST_SLOTS + 1))
        return median(map(self.quota, slots)) if slots else 0

    @property
    def may_begin_slot(self) -> bool:
        """The newest slot has written what it may, so that the next one may begin once its clip is ready."""
        if self.complete or self.requested_tokens >= self.max_new_tokens:
            return False
        return not self.counts or self.greedy or self.slot_ended or self.counts[-1] >= self.quota(len(self.counts))

    @property
    def may_write(self) -> bool:
        """A token may be requested for the newest slot."""
        if self.ended or self.requested_tokens >= self.max_new_tokens or not self.counts:
            return False
        if self.complete:
            return True
        if self.slot_ended or (self.reads_first and self.pending):
            return False
        return self.counts[-1] < self.quota(len(self.counts))

    def counts_before_next_clip(self) -> list[int]:
        """k_1 … of the slots before the next clip to be committed, by which that clip's positions are computed. Slots
        that have not begun count with their quotas; of a schedule whose quotas are unknown, with 0."""
        if self.counts_unknown:
            return [*self.counts, *[0] * (self.committed - len(self.counts))]
        return [int(self.quota(slot)) for slot in range(1, self.committed + 1)]

    # Events

    def arrive(self, last: bool) -> None:
        """A clip has arrived, which may be known to be the last. Raises InputError, changing nothing, where the stream
        cannot have it."""
        number = self.arrived + 1
        if self.all_arrived:
            raise InputError(f"clip {number} came after the last one, clip {self.arrived}: open another session for it")
        if self.max_clips is not None and number > self.max_clips:
            raise InputError(
                f"clip {number} exceeds max_clips {self.max_clips}: open the session with a larger max_clips, or with "
                "a window, which drops the oldest clips"
            )
        if self.fixed_clips is not None and last != (number == self.fixed_clips):
            raise InputError(f"clip {number} as the last one does not fit a schedule for {self.fixed_clips} clips")
        self.arrived = number
        if last:
            self.total = number

    def end(self) -> None:
        """The source has ended without announcing its last clip. If the newest clip is not committed yet, it becomes
        the last one; otherwise a last slot without a clip follows, in which only the tail enters. Raises InputError if
        no clip has arrived, or fewer than a fixed schedule needs."""
        if self.all_arrived:
            return
        if not self.arrived or self.fixed_clips is not None:
            wanted = "at least 1" if self.fixed_clips is None else self.fixed_clips
            raise InputError(f"the source ended after {self.arrived} clips, but {wanted} were expected")
        self.total = self.arrived + (self.committed == self.arrived)

    def limit(self, tokens: int) -> None:
        """Lowers `max_new_tokens` so that at most `tokens` more are written, besides those due in slots before the last
        one: how far a session is behind does not shorten its answer. With model-M those are known once the last slot
        begins, and the limit applies from then on."""
        if self.most is not None and self.total is not None and not self.complete:
            self.last_slot_limit = tokens
            return
        before = 0
        if self.total is not None and not self.counts_unknown:
            before = sum(int(self.quota(slot)) for slot in range(1, self.total))
        self.max_new_tokens = max(1, min(self.max_new_tokens, max(self.requested_tokens, before) + tokens))

    def commit(self) -> bool:
        """The next clip starts to enter the model. Returns whether it is the last one, which is now settled."""
        self.committed += 1
        return self.committed == self.total

    def begin_slot(self) -> None:
        self.counts.append(0)
        self.slot_ended = False
        if self.complete and self.last_slot_limit is not None:
            self.limit(self.last_slot_limit)

    def request(self) -> None:
        """A token was requested for the newest slot."""
        self.counts[-1] += 1
        self.pending.append(len(self.counts))

    def read(self, end: bool, end_of_slot: bool = False) -> int:
        """The oldest pending token was read; `end`: it is the end-of-turn token, so that all that was requested or
        began after it is dropped. `end_of_slot`: it is the end-of-slot token, which ends the answer in the last slot,
        and with model-M each other one. Returns the token's slot."""
        slot = self.pending.popleft()
        self.read_tokens += 1
        end = end or (end_of_slot and slot == self.total)
        if end_of_slot and self.most is not None and slot == len(self.counts):
            self.slot_ended = True
        if end:
            self.ended = True
            self._drop_after(slot)
        return slot

    def drop_pending(self) -> None:
        """Forget the tokens that were not read, and the slots that began because of them."""
        if self.pending:
            self._drop_after(self.pending[0])

    def _drop_after(self, slot: int) -> None:
        for other in self.pending:
            self.counts[other - 1] -= 1
        self.pending.clear()
        del self.counts[slot:]
