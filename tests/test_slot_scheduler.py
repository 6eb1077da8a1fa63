"""The slot scheduler alone: random schedules and events compared with a simple statement of the rule. No model."""

import itertools
import random
import time

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.sessions.slot_scheduler import GREEDY, SlotScheduler
from qwen_vl_streaming.timeline.timeline import Schedule, make_schedule
from qwen_vl_streaming.timeline.variants import VARIANTS

SEED = time.time_ns() % 100_000
GROUP = VARIANTS["group"]


def drive(draw: random.Random, scheduler: SlotScheduler, clips: int, late: bool, answer: int, ahead: int):
    """Random events until nothing more can happen: a clip arrives or is committed, a slot begins, a token is requested,
    a token is read, which ends the turn if it is number `answer`. Returns them in order."""
    events = []
    while True:
        may = []
        if scheduler.arrived < clips:
            may.append("arrive")
        elif late and not scheduler.all_arrived:
            may.append("end")
        if not scheduler.done:
            if scheduler.committed < scheduler.arrived:
                may.append("commit")
            clip_ready = scheduler.committed > len(scheduler.counts)
            if scheduler.may_begin_slot and (clip_ready or scheduler.tail_is_next):
                may.append("begin")
            if scheduler.may_write and len(scheduler.pending) <= ahead:
                may.append("request")
            if scheduler.pending:
                may.append("read")
        if not may:
            return events
        event = draw.choice(may)
        events.append(event)
        if event == "arrive":
            scheduler.arrive(last=not late and scheduler.arrived + 1 == clips)
        elif event == "end":
            scheduler.end()
        elif event == "commit":
            last = scheduler.commit()
            assert last == (scheduler.committed == clips and scheduler.all_arrived)
        elif event == "begin":
            scheduler.begin_slot()
        elif event == "request":
            scheduler.request()
        else:
            scheduler.read(end=scheduler.read_tokens + 1 == answer)


def expected_counts(quotas, slots: int, written: int) -> list[int]:
    """The rule: each slot writes its quota, and the last one the rest. Slots without tokens at the end of the answer
    are omitted."""
    counts = []
    for slot in range(1, slots + 1):
        left = written - sum(counts)
        counts.append(left if slot == slots else min(left, quotas(slot)))
    return counts


def random_schedule(draw: random.Random, clips: int, fixed: bool):
    quotas = Schedule(tuple(draw.randint(0, 3) for _ in range(clips - 1)))
    k = draw.randint(1, 4)
    return quotas if fixed else draw.choice([f"wait-{k}", f"random-{k}"])


def test_slots_write_their_quotas_and_the_last_one_the_rest():
    print("seed", SEED)
    for number in range(2000):
        draw = random.Random(f"{SEED} {number}")
        variant = draw.choice(list(VARIANTS.values()))
        clips, most, late = draw.randint(1, 6), draw.randint(1, 20), draw.random() < 0.5
        fixed = variant.streams and not late and draw.random() < 0.4
        schedule, answer = random_schedule(draw, clips, fixed), draw.choice([0, draw.randint(1, 20)])
        scheduler = SlotScheduler(variant, schedule, most, clips)
        events = drive(draw, scheduler, clips, late, answer, ahead=draw.randint(0, 4))

        written = min(most, answer or most)
        assert scheduler.done and scheduler.read_tokens == written and not scheduler.pending
        assert scheduler.ended == (0 < answer <= most)
        # A source that ends too late for its last clip to be the last one adds a slot.
        added = late and "end" in events and events[: events.index("end")].count("commit") == clips
        slots = clips + added
        if not variant.streams:
            quotas = [0] * slots
        elif fixed:
            quotas = [*schedule.quotas, 0]
        else:
            quotas = [*make_schedule(schedule, variant, slots + 1).quotas]
        wanted = expected_counts(lambda slot, quotas=quotas: quotas[slot - 1], slots, written)
        counts = scheduler.counts
        print(number, variant.name, schedule, events)
        assert sum(counts) == written and counts == wanted[: len(counts)]
        assert scheduler.complete == (scheduler.all_arrived and len(counts) == slots)
        assert scheduler.bare == (scheduler.complete and added)


def test_a_greedy_slot_writes_until_the_next_one_begins():
    print("seed", SEED)
    for number in range(500):
        draw = random.Random(f"{SEED} {number}")
        clips, most = draw.randint(1, 6), draw.randint(1, 20)
        scheduler = SlotScheduler(GROUP, GREEDY, most, None)
        events = drive(draw, scheduler, clips, draw.random() < 0.5, answer=0, ahead=0)
        counts = []
        for event in events:
            if event == "begin":
                counts.append(0)
            elif event == "request":
                counts[-1] += 1
        assert scheduler.counts == counts and sum(counts) == most


def test_a_slot_begins_and_writes_at_the_earliest_moment():
    """wait-2, step by step: what may happen when."""
    scheduler = SlotScheduler(GROUP, "wait-2", 6, 9)
    assert scheduler.may_begin_slot and not scheduler.may_write and not scheduler.slots_waiting
    scheduler.arrive(last=False)
    scheduler.arrive(last=False)
    assert scheduler.clips_waiting == 2 and scheduler.slots_waiting
    assert not scheduler.commit()
    scheduler.begin_slot()
    assert scheduler.may_write and not scheduler.may_begin_slot and scheduler.clips_waiting == 1
    scheduler.request()
    assert scheduler.may_write and not scheduler.may_begin_slot
    scheduler.request()
    assert scheduler.may_begin_slot and not scheduler.may_write  # though none was read
    scheduler.end()  # the second clip is not committed, so that it becomes the last one
    assert scheduler.commit()
    scheduler.begin_slot()
    assert scheduler.complete and not scheduler.bare and not scheduler.may_begin_slot
    for _ in range(4):
        assert scheduler.may_write
        scheduler.request()
    assert not scheduler.may_write and not scheduler.done
    assert [scheduler.read(end=False) for _ in range(6)] == [1, 1, 2, 2, 2, 2]
    assert scheduler.done and scheduler.counts == [2, 4]


def test_a_source_that_ends_too_late_adds_a_slot_without_a_clip():
    scheduler = SlotScheduler(GROUP, "wait-1", 6, 9)
    scheduler.arrive(last=False)
    assert not scheduler.commit()
    scheduler.end()
    scheduler.end()  # changes nothing
    assert not scheduler.tail_is_next and scheduler.slots_waiting  # clip 1 comes first
    scheduler.begin_slot()
    assert scheduler.tail_is_next and not scheduler.may_begin_slot  # slot 1 writes its token first
    assert scheduler.clips_waiting == 0 and scheduler.slots_waiting
    scheduler.request()
    assert scheduler.may_begin_slot
    scheduler.begin_slot()
    assert scheduler.complete and scheduler.bare and not scheduler.slots_waiting


@pytest.mark.parametrize("how", ["the turn ends", "an error"])
def test_requests_that_depend_on_unread_tokens_are_dropped(how):
    scheduler = SlotScheduler(GROUP, "wait-2", 99, 9)
    for number in range(1, 4):
        scheduler.arrive(last=number == 3)
        scheduler.commit()
        scheduler.begin_slot()
        for _ in range(2):
            scheduler.request()
    assert scheduler.counts == [2, 2, 2] and scheduler.complete
    assert scheduler.read(end=False) == 1
    if how == "an error":
        scheduler.drop_pending()  # the oldest of them is the second token of slot 1
        assert scheduler.counts == [1]
    else:
        assert scheduler.read(end=False) == 1
        assert scheduler.read(end=True) == 2
        assert scheduler.counts == [2, 1] and scheduler.done
    assert not scheduler.pending and not scheduler.complete and not scheduler.bare


def test_counts_for_the_positions_of_a_clip():
    fixed = SlotScheduler(GROUP, Schedule((2, 0, 3)), 99, 4)
    greedy = SlotScheduler(GROUP, GREEDY, 99, 4)
    for number in range(1, 5):
        for scheduler in (fixed, greedy):
            scheduler.arrive(last=number == 4)
    seen = []
    for _ in range(4):
        seen.append(fixed.counts_before_next_clip())
        fixed.commit()
    assert seen == [[], [2], [2, 0], [2, 0, 3]]  # before any slot has begun
    greedy.commit()
    greedy.begin_slot()
    for _ in range(5):
        greedy.request()
    assert greedy.counts_before_next_clip() == [5]
    greedy.commit()
    assert greedy.counts_before_next_clip() == [5, 0]  # slot 2 has not begun


def test_random_quotas_do_not_change_as_the_stream_grows():
    """In any order of requests, and for any length of the stream."""
    asked = list(range(1, 400))
    random.Random(SEED).shuffle(asked)
    scheduler = SlotScheduler(GROUP, "random-3", 10**9, None)
    quotas = make_schedule("random-3", GROUP, 400).quotas
    assert [scheduler.quota(slot) for slot in asked] == [quotas[slot - 1] for slot in asked]


def test_invalid_clips_are_refused():
    """Without changing the state."""

    def state(scheduler):
        return scheduler.arrived, scheduler.total, scheduler.counts

    full = SlotScheduler(GROUP, "wait-1", 9, 1)
    full.arrive(last=False)
    over = SlotScheduler(GROUP, "wait-1", 9, 9)
    over.arrive(last=True)
    fixed = SlotScheduler(GROUP, Schedule((1,)), 9, 9)
    for scheduler, last, match in (
        (full, False, "clip 2 exceeds max_clips 1"),
        (over, False, "clip 2 came after the last one, clip 1"),
        (fixed, True, "clip 1 as the last one does not fit a schedule for 2 clips"),
    ):
        before = state(scheduler)
        with pytest.raises(InputError, match=match):
            scheduler.arrive(last)
        assert state(scheduler) == before
    fixed.arrive(last=False)
    with pytest.raises(InputError, match="clip 2 as the last one does not fit"):
        fixed.arrive(last=False)
    with pytest.raises(InputError, match="the source ended after 1 clips, but 2 were expected"):
        fixed.end()
    with pytest.raises(InputError, match="the source ended after 0 clips, but at least 1 were expected"):
        SlotScheduler(GROUP, "wait-1", 9, 9).end()
    with pytest.raises(InputError, match="does not fit into max_clips 2"):
        SlotScheduler(GROUP, Schedule((1, 1)), 9, 2)
    with pytest.raises(InputError, match="unknown schedule 'wait-0'"):
        SlotScheduler(GROUP, "wait-0", 9, 2)


def test_a_stream_without_a_window_of_clips_may_continue():
    scheduler = SlotScheduler(GROUP, "wait-1", 10**9, None)
    for _ in itertools.repeat(None, 1000):
        scheduler.arrive(last=False)
        scheduler.commit()
        scheduler.begin_slot()
        scheduler.request()
        scheduler.read(end=False)
    assert scheduler.counts == [1] * 1000 and scheduler.slots_waiting is False
