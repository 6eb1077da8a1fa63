"""Many sessions on one model: each writes what it would write alone."""

import collections
import math
import random
import time
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.step_runner import StepRunner, decode_counts_of
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.session_pool import SessionPool
from qwen_vl_streaming.timeline.timeline import Layout, Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import PARALLEL, check, close_done, feed_some, no_memory, random_case
from tiny import random_template

SEED = time.time_ns() % 100_000
LARGEST = Layout(40, 10, 10, (3, 3))


def let_in(pool, case, mode, **options):
    return pool.open(case.variant, case.template, case.layout, mode=mode, **{**case.options, **options})


@pytest.mark.parametrize("chunk_counts", [(1,), (0, 1, 2, 4)], ids=["one piece", "four chunk_counts"])
@pytest.mark.parametrize("part", range(3))
def test_each_writes_what_it_would_alone(model, part, chunk_counts):
    """Sessions of all variants, modes, schedules and sizes come and go; clips arrive at random."""
    print("seed", SEED, part)
    draw = random.Random(f"{SEED} {part}")
    pool = SessionPool(model, 5, LARGEST, max_clips=6, max_new_tokens=14, chunk_counts=chunk_counts)
    waiting, running, over = [], [], 0
    for _ in range(25):
        variant = draw.choice([*VARIANTS.values(), *PARALLEL])
        waiting.append((random_case(draw, variant), draw.choice(["serial", "fused"]) if variant.parallel else "serial"))
    while waiting or running:
        if waiting and len(running) < 5 and draw.random() < 0.3:
            case, mode = waiting.pop()
            running.append((case, let_in(pool, case, mode, ahead=draw.choice([0, 1, 3])), []))
        feed_some(draw, running, (0.1, 0.9))
        pool.step()
        for case, session, fed in close_done(running):
            if len(fed) == len(case.pixels) or session.ended or len(session.written) == case.most:
                check(model, case, session)
                over += 1
    assert over == 25
    pool.step()
    assert pool.idle and not pool.sessions
    assert len(pool.runner.free_slots) == 5 and not pool.runner.cache.allocated


def test_steps_have_few_kinds_of_rows(model):
    for slots, counts in {1: [1], 127: [127], 128: [32, 128], 160: [32, 160]}.items():
        assert decode_counts_of(slots) == counts
    with SessionPool(model, 128, LARGEST, max_clips=1, max_new_tokens=1) as pool:
        shapes = [(rows, n) for rows in (32, 128) for n in (0, 1, 2, 4, 8)]
        tokenless = [((32, n), False) for n in (1, 2, 4, 8)]
        assert pool.runner.kinds == [*tokenless, *((shape, True) for shape in shapes)]
    with SessionPool(model, 127, LARGEST, max_clips=1, max_new_tokens=1) as pool:
        assert pool.runner.shapes == [(127, n) for n in (0, 1, 2, 4, 8)]


@pytest.mark.parametrize(("chunks", "flex"), [(1, False), (3, False), (1, True)], ids=["whole clips", "chunks", "flex"])
def test_steps_of_few_sessions_have_few_rows(model, chunks, flex, monkeypatch):
    """Many sessions at a time, then four, then one. Each step has the fewest rows for those that take part, is of a
    kind that is prepared before the first session, and leaves what other slots hold as it is."""
    print("seed", SEED)
    draw, slots, used = random.Random(f"{SEED} {chunks} {flex}"), 12, collections.Counter()
    monkeypatch.setattr(StepRunner, "use_flex", flex)
    with SessionPool(
        model, slots, LARGEST, max_clips=6, max_new_tokens=14, decode_counts=(2, 5), chunks=chunks
    ) as pool:
        runner = pool.runner
        state = [runner.text_ids, runner.penalized_ids, runner.ended, runner.last_hidden]
        step = runner.step

        def spy(requests):
            (rows, entering), sample = kind = runner.kind_of(requests)
            assert kind in runner.kinds
            needed = sum(request.chunks(runner.chunk_size) for request in requests)
            assert rows >= len(requests) and entering >= needed
            fewer = [shape for (shape, samples) in runner.kinds if samples == sample and shape[0] >= len(requests)]
            totals = [own + n * runner.chunk_size for own, n in fewer if n >= needed]
            assert rows + entering * runner.chunk_size == min(totals)
            used[rows, sample] += 1
            busy = {request.batch_slot.index for request in requests}
            others = [index for index in range(slots) if index not in busy]
            before = [of_slot[others] for of_slot in state]
            pending = step(requests)
            assert all(torch.equal(of_slot[others], kept) for of_slot, kept in zip(state, before, strict=True))
            return pending

        monkeypatch.setattr(runner, "step", spy)
        many = 20 if flex else 60
        waiting = [random_case(draw, draw.choice([*VARIANTS.values(), *PARALLEL])) for _ in range(many)]
        running = []
        while waiting or running:
            together = slots if len(waiting) > many // 3 else 4 if len(waiting) > many // 6 else 1
            while waiting and len(running) < together:
                case = waiting.pop()
                mode = "fused" if case.variant.parallel else "serial"
                running.append((case, let_in(pool, case, mode, ahead=draw.choice([0, 1, 3])), []))
            draw.shuffle(running)
            feed_some(draw, running)
            pool.step()
            for case, session, _ in close_done(running):
                check(model, case, session)
    assert {rows for rows, sample in used if sample} == {2, 5, slots}, used
    assert any(not sample for _, sample in used)


def test_a_waiting_session_reads_its_tokens_while_others_continue(model):
    """One session has all three tokens of its clip, although two steps may be in flight and another session is always
    busy."""
    template = replace(random_template(random.Random(3)), end=-1)
    layout = template.layout((2, 3), 2.0)
    with SessionPool(model, 2, layout, max_clips=40, max_new_tokens=99) as pool:
        quiet, busy = (pool.open(VARIANTS["group"], template, layout, schedule="wait-3", ahead=2) for _ in "12")
        quiet.feed(torch.randn(24, 1176))
        for _ in range(12):
            busy.feed(torch.randn(24, 1176))
            pool.step()
            assert not busy.idle
        assert len(quiet.written) == 3


def test_prompts_of_sessions_that_open_together_enter_together(model, monkeypatch):
    """As chunks of the same steps: a step for each would delay the first tokens of many sessions by seconds."""
    template = replace(random_template(random.Random(3)), end=-1)
    layout = template.layout((2, 3), 2.0)
    with SessionPool(model, 16, layout, max_clips=4, max_new_tokens=9, chunk_counts=(1, 8)) as pool:
        steps, step = [], pool.runner.step
        monkeypatch.setattr(pool.runner, "step", lambda requests: steps.append(len(requests)) or step(requests))
        sessions = [pool.open(VARIANTS["group"], template, layout) for _ in range(16)]
        assert not steps and not pool.idle
        while not pool.idle:
            pool.step()
        assert steps == [8, 8]
        for session in sessions:
            session.feed(torch.randn(24, 1176))
        pool.step()
        pool.step()
        assert all(session.written for session in sessions)


def test_the_session_that_has_waited_longest_for_a_chunk_is_next(model):
    """Two sessions that always have waiting clips do not block a third one, whenever its clips arrive."""
    print("seed", SEED)
    draw = random.Random(SEED)
    template = replace(random_template(draw), end=-1)
    layout = template.layout((2, 3), 2.0)
    with SessionPool(model, 5, layout, max_clips=120, max_new_tokens=999, chunk_counts=(1,)) as pool:
        sessions = [pool.open(VARIANTS["group"], template, layout, mode="serial", schedule="wait-1") for _ in range(5)]
        while not pool.idle:  # their prompts enter
            pool.step()
        for part in range(20):
            for _ in range(draw.randint(1, 5)):
                for session in sessions[:2]:
                    session.feed(torch.randn(24, 1176))
                pool.step()
            sessions[4].feed(torch.randn(24, 1176))
            for _ in range(3):
                pool.step()
            assert len(sessions[4].written) == part + 1


def test_one_session_too_many_is_refused_without_affecting_others(model):
    case = random_case(random.Random(3), VARIANTS["group"], "wait-2")
    config = model.model.language_model.config
    case.pixels, case.layout = torch.randn(4, 24, 1176), case.template.layout((2, 3), 2.0)
    case.most = 12
    options = {"max_clips": 4, "max_new_tokens": 12}
    each = PagedKVCache.block_bytes(config, model.dtype)
    pool = SessionPool(
        model, 3, case.layout, memory=5 * each, **options
    )  # two with two blocks each, and one unused block
    first, second = (let_in(pool, case, "fused", **options) for _ in range(2))
    with pytest.raises(
        InputError, match=r"one more session needs 0\.\d+ GiB .* 0\.000 are free with 2 sessions running"
    ):
        let_in(pool, case, "fused", **options)
    for session in (first, second):
        for number, clip in enumerate(case.pixels, 1):
            session.feed(clip, last=number == 4)
    while not pool.idle:
        pool.step()
    for session in (first, second):
        check(model, case, session)
    first.close()
    third = let_in(pool, case, "serial", **options)
    with pytest.raises(InputError, match="use fused or serial"):
        let_in(pool, case, "pipelined", **options)
    with pytest.raises(InputError, match="let no clip enter"):
        SessionPool(model, 3, case.layout, chunk_counts=(), **options)
    with pytest.raises(InputError, match=r"one session needs .* GiB"):
        SessionPool(model, 3, case.layout, memory=each, **options)
    with pytest.raises(InputError, match=r"penalty 3\.0 differs from 1\.15, with which the runner was made"):
        let_in(pool, case, "fused", **options, penalty=3.0)
    with pytest.raises(InputError, match="a clip of 25 visual tokens does not fit in a StepRunner made for at most 6"):
        pool.open(case.variant, case.template, case.template.layout((5, 5), 2.0), **options)
    pool.close()
    assert third.closed and second.closed


def test_the_penalty_of_a_pool_is_that_of_its_sessions(model, tmp_path):
    case = random_case(random.Random(3), VARIANTS["group"], "wait-2")
    options = {"max_clips": len(case.pixels), "max_new_tokens": case.most}
    with SessionPool(model, 2, case.layout, penalty=3.0, **options) as pool:
        session = pool.open(case.variant, case.template, case.layout, schedule="wait-2", record=tmp_path / "r.json")
        for number, clip in enumerate(case.pixels, 1):
            session.feed(clip, last=number == len(case.pixels))
        while not pool.idle:
            pool.step()
    record = read_record(tmp_path / "r.json")
    assert record.penalty == 3 and all(difference.tie for difference in replay(record, model, list(case.pixels)))


def test_the_clips_of_one_session_do_not_affect_others(model):
    """Bitwise: the same forward step with other clips in the other batch slots."""
    draw = random.Random(5)
    cases = [random_case(draw, VARIANTS["gap"], "wait-2") for _ in range(3)]
    layout = cases[0].template.layout((2, 2), 2.0)
    cases = [replace(case, layout=case.template.layout((2, 2), 2.0), pixels=torch.randn(3, 16, 1176)) for case in cases]
    picked = []
    for other in range(2):
        pool = SessionPool(model, 3, Layout(40, 10, 10, layout.grid), max_clips=3, max_new_tokens=9)
        sessions = [let_in(pool, replace(case, steps=[]), "fused", max_clips=3, max_new_tokens=9) for case in cases]
        for number in range(3):
            for session, case in zip(sessions, cases, strict=True):
                pixels = case.pixels[number]
                session.feed(torch.randn_like(pixels) if other and case is not cases[1] else pixels, last=number == 2)
        mine = []
        for _ in range(4):
            pool.step()
            mine.append(pool.runner.last_hidden[sessions[1].rounds.batch_slot.index].clone())
        picked.append(torch.stack(mine))
        pool.close()
    assert torch.equal(*picked)


def test_an_error_in_a_step_ends_all_sessions_with_their_records(model, tmp_path, monkeypatch):
    case = random_case(random.Random(4), VARIANTS["overlap"], Schedule((1, 1)))
    case.pixels, case.layout = torch.randn(3, 24, 1176), case.template.layout((2, 3), 2.0)
    pool = SessionPool(model, 2, LARGEST, max_clips=3, max_new_tokens=9)
    sessions = [
        let_in(pool, case, "fused", record=tmp_path / f"{n}.json", max_clips=3, max_new_tokens=9) for n in range(2)
    ]
    for session in sessions:
        session.feed(case.pixels[0])
    while not pool.idle:
        pool.step()

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory left")

    sessions[0].feed(case.pixels[1])
    monkeypatch.setattr(pool.runner, "step", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        pool.step()
    for n, session in enumerate(sessions):
        record = read_record(tmp_path / f"{n}.json")
        assert session.closed and record.end == "failed: no memory left" and len(record.tokens) == 1
        assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


@pytest.mark.parametrize("fails", [False, True], ids=["closed", "an error in a step"])
def test_a_record_that_cannot_be_written_does_not_affect_others(model, tmp_path, monkeypatch, fails):
    case = random_case(random.Random(4), VARIANTS["gap"], "wait-1")
    pool = SessionPool(model, 3, LARGEST, max_clips=6, max_new_tokens=20)
    (tmp_path / "file").touch()
    sessions = [
        pool.open(case.variant, case.template, case.layout, schedule="wait-1", record=path)
        for path in (tmp_path / "file/r.json", tmp_path / "1.json", tmp_path / "2.json")
    ]
    for session in sessions:
        session.feed(case.pixels[0])
    if fails:
        monkeypatch.setattr(pool.runner, "step", lambda _: no_memory())
    with pytest.raises(torch.OutOfMemoryError if fails else InputError, match=r"no memory|cannot be written"):
        pool.step() if fails else pool.close()
    assert all(session.closed for session in sessions) and len(pool.runner.free_slots) == 3
    ends = {read_record(tmp_path / f"{n}.json").end for n in (1, 2)}
    assert ends == {"failed: no memory left" if fails else "cancelled"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_slots": 0}, "batch_slots 0 must be at least 1"),
        ({"batch_slots": 2.0}, "batch_slots 2.0 must be a whole number"),
        ({"max_clips": True}, "max_clips True must be a whole number"),
        ({"max_clips": None}, "max_clips None must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5 must be a whole number"),
        ({"memory": "1"}, "memory '1' must be a whole number"),
        ({"chunk": 0}, "chunk 0 must be at least 1"),
        ({"chunks": 1.0}, "chunks 1.0 must be from 1 to the"),
        ({"clip_tokens": 10**30}, r"clip_tokens 10+ must be at most"),
        ({"chunk_counts": 3}, "chunk_counts 3 must be a list"),
        ({"chunk_counts": (1, 2.5)}, "chunk_counts: each 2.5 must be a whole number"),
        ({"decode_counts": 3}, "decode_counts 3 must be a list"),
        ({"decode_counts": (0,)}, "decode_counts: each 0 must be at least 1"),
        ({"penalty": math.nan}, "penalty nan must be above 0"),
        ({"penalty": 0}, "penalty 0 must be above 0"),
        ({"window": (True, 3)}, "must be two integers"),
    ],
)
def test_wrong_numbers_are_refused(model, given, message):
    with pytest.raises(InputError, match=message):
        SessionPool(model, **{"batch_slots": 1, "layout": LARGEST, "max_clips": 3, "max_new_tokens": 5, **given})


def test_wrong_numbers_of_a_session_are_refused(model):
    layout = Layout(3, 2, 2, (2, 2))
    with SessionPool(model, 1, layout, max_clips=3, max_new_tokens=5) as pool:
        for given in (
            {"max_clips": 1.5},
            {"chunk": 2.0},
            {"ahead": -1},
            {"penalty": "1"},
            {"schedule": 3},
            {"mode": []},
        ):
            with pytest.raises(InputError, match=next(iter(given))):
                pool.open(VARIANTS["group"], random_template(random.Random(0)), layout, **given)
