"""A fused clip that enters in chunks, each beside a token: the same tokens and logits, in as many steps as tokens."""

import random
import time
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine import split_kv
from qwen_vl_streaming.engine.device_event import DeviceEvent
from qwen_vl_streaming.engine.model_runner import ModelRunner
from qwen_vl_streaming.engine.step_runner import StepRunner, chunk_counts_of
from qwen_vl_streaming.model.quantization import quantize_model
from qwen_vl_streaming.reference import Streams, caption
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions import SessionPool, open_session
from qwen_vl_streaming.sessions.fused import choose_chunks
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.slot_scheduler import SlotScheduler
from qwen_vl_streaming.timeline.plan import Window
from qwen_vl_streaming.timeline.timeline import Layout, ModelSchedule, Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import PARALLEL, check, close_done, deciding_case, deciding_model, feed_some, most_of, play, random_case
from tiny import tiny_model

SEED = time.time_ns() % 100_000
STREAMING = [variant for variant in VARIANTS.values() if variant.streams]


def open_chunked(model, case, chunks: int, **options):
    """A session whose clips enter in `chunks` chunks: fused, beside tokens, or where the variant does not allow it
    serial, all in one step."""
    options = {**case.options, "chunk": None, **options}
    if case.variant.parallel:
        options |= {"mode": "fused", "chunks": chunks}
    else:
        window = options.get("window") and Window(*options["window"])
        sizes = case.layout, options["max_clips"], options["max_new_tokens"]
        options["runner"] = StepRunner.single(model, *sizes, None, 1.15, window, chunks)
    return open_session(model, case.variant, case.template, case.layout, **options)


def wide(draw: random.Random, case):
    """`case` with clips of more tokens, so that they have several chunks."""
    case.layout = case.template.layout((draw.randint(2, 3), draw.randint(2, 5)), 2.0)
    shape = len(case.pixels), 4 * case.layout.tokens_per_clip, 1176
    case.pixels = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    return case


def keep_logits(monkeypatch, model) -> tuple[list, list]:
    """Lists that receive the logits of each token: those of the engine, and those of the reference."""
    engine, reference = [], []

    def in_engine(self, hidden, *rest, choose=ModelRunner._choose):
        engine.append(model.lm_head(hidden)[0].float())
        choose(self, hidden, *rest)

    def in_reference(self, choose=Streams._choose):
        reference.append(self.logits[0].clone())
        return choose(self)

    monkeypatch.setattr(ModelRunner, "_choose", in_engine)
    monkeypatch.setattr(Streams, "_choose", in_reference)
    return engine, reference


@torch.no_grad()
def reference(model, case, session):
    """What the reference writes for the slots of `session`; with model-M it decides by itself where they end."""
    visual, scheduler = model.perceive(case.pixels, case.layout.grid), session.scheduler
    if not scheduler.complete:  # the session was done before the last clip was known: add one that no token attends to
        visual = torch.cat([visual, torch.zeros_like(visual[:1])])
    clips = len(visual) + scheduler.bare
    schedule, most = Schedule(tuple((session.counts + [0] * clips)[: clips - 1])), case.most
    if scheduler.most is not None:
        schedule = ModelSchedule(clips, most_of(case))
        most -= schedule.most_tokens(0)
    window = session.rounds.window
    streams = Streams(model, case.variant, [case.template], [case.layout], window=window, bare=scheduler.bare)
    return caption(streams, [visual], [schedule], most)[0]


def check_logits(monkeypatch, model, draw: random.Random, case, **options) -> None:
    """Assert that a session with a random number of chunks has the reference's tokens, slots and logits."""
    wide(draw, case)
    chunks, ahead = draw.randint(2, case.layout.tokens_per_clip), draw.choice([0, 1, 3])
    print(case.variant.name, case.layout.grid, chunks, case.schedule, case.steps, case.late, ahead, options)
    with monkeypatch.context() as patched:
        engine, plain = keep_logits(patched, model)
        with open_chunked(model, case, chunks, ahead=ahead, **options) as session:
            play(session, case)
        expected, mine = reference(model, case, session), session.caption()
    assert (mine.tokens, mine.slots) == (expected.tokens, expected.slots)
    assert mine.schedule == expected.schedule[: len(mine.schedule)]
    count = len(mine.tokens)
    assert (torch.stack(engine[:count]) - torch.stack(plain[:count])).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_tokens_and_logits_equal_the_reference(model, variant, monkeypatch):
    """Random schedules, chunks, arrivals, ends and windows."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    for _ in range(10):
        window = draw.choice([None, None, (1, 1), (2, 5)])
        check_logits(monkeypatch, model, draw, random_case(draw, variant, may_be_late=True), window=window)


@pytest.mark.parametrize("variant", STREAMING, ids=lambda v: v.name)
def test_the_model_may_decide_when_a_slot_ends(variant, monkeypatch):
    """A slot may end before all chunks of the next clip have entered, and be silent."""
    print("seed", SEED)
    draw, model = random.Random(f"{SEED} decides {variant.name}"), deciding_model()
    for _ in range(8):
        check_logits(monkeypatch, model, draw, deciding_case(draw, variant, may_be_late=True))


@pytest.mark.parametrize("decode_splits", [1, 5])
@pytest.mark.parametrize("variant", ["group", "interleave"])
def test_flex_attention(model, variant, decode_splits, monkeypatch):
    """As on a GPU, where it is compiled: chunks of one clip are attended to in one step, each with its own mask, and
    the keys of a decode row are divided into splits, of which some have none."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} flex {variant} {decode_splits}")
    monkeypatch.setattr(ModelRunner, "use_flex", True)
    monkeypatch.setattr(split_kv, "num_decode_splits", lambda cache: decode_splits)
    check_logits(monkeypatch, model, draw, random_case(draw, VARIANTS[variant]), window=draw.choice([None, (2, 5)]))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_in_8_bits(kind, monkeypatch):
    print("seed", SEED)
    draw, model = random.Random(f"{SEED} {kind}"), tiny_model()
    quantize_model(model, kind)
    for variant in PARALLEL:
        check_logits(monkeypatch, model, draw, random_case(draw, variant))


def open_wide(model, schedule: str, header: int = 1, **options):
    """A fused session for clips of 8 visual tokens, with a tail of one."""
    case = random_case(random.Random(3), VARIANTS["group"])
    template = replace(case.template, tail=(187,), header=tuple(range(header)), end=-1)
    options = {"max_clips": 5, "max_new_tokens": 30, **options}
    return open_session(
        model, case.variant, template, template.layout((2, 4), 2.0), mode="fused", schedule=schedule, **options
    )


def rows_of_steps(session, monkeypatch, one_by_one=False, clips=5) -> list[int]:
    """Feed clips, at once or each when all tokens before it are written. Returns the visual rows of each step."""
    steps, run = [], session.runner.step

    def step(requests):
        steps.append(int(requests[0].prefill.visual.sum()))
        return run(requests)

    monkeypatch.setattr(session.runner, "step", step)
    for pixels in torch.randn(clips, 32, 1176):
        session.feed(pixels)
        if one_by_one:
            list(session.tokens())
    list(session.tokens())
    return steps


def test_a_clip_is_spread_over_the_tokens_of_a_slot(model, monkeypatch):
    """In as many steps as there are tokens. With the tail a clip has 9 rows: in 4 chunks 3, 3, 2 and nothing."""
    for k, chunks, expected in (
        (4, 1, [8, 8, 0, 0] + [8, 0, 0, 0] * 3 + [0] * 4),
        (4, 4, [8, 3, 3, 2] + [3, 3, 2, 0] * 3 + [0] * 4),
        (4, 2, [8, 5, 3, 0] + [5, 3, 0, 0] * 3 + [0] * 4),
        (2, 4, [8] + [3, 5] * 4 + [0]),  # what is left enters with the first token that sees it
        (1, 4, [8] * 5),  # no token is left that a chunk could be beside
    ):
        with open_wide(model, f"wait-{k}", chunks=chunks) as session:
            assert rows_of_steps(session, monkeypatch) == expected, (k, chunks)
            assert len(session.written) == len(expected) == 5 * k
    with open_wide(model, "wait-4", header=12, chunks=8) as session:  # 20 rows: 16, then 4
        assert rows_of_steps(session, monkeypatch, clips=2) == [8, 0, 2, 2, 2, 2, 0, 0, 0]
    with open_wide(model, "wait-4", chunks=4) as session:
        assert rows_of_steps(session, monkeypatch, one_by_one=True) == [8, 0, 0, 0] * 5  # tokens wait for these


def test_tokens_do_not_wait_for_the_vision_encoder(model, monkeypatch):
    """Its clip starts to enter when it is encoded; what is left by the end of the slot enters with the next token."""
    unready = []
    monkeypatch.setattr(DeviceEvent, "query", lambda self: not unready or unready.pop())
    for steps, expected in ((0, [3, 3, 2, 0]), (2, [0, 0, 3, 5]), (9, [0, 0, 0, 8])):
        with open_wide(model, "wait-4", chunks=4) as session:
            session.feed(torch.randn(32, 1176))
            session.step()
            unready[:] = [False] * steps
            assert rows_of_steps(session, monkeypatch, clips=1) == [*expected, 0, 0, 0]  # 3 tokens, and 4 that see it
        unready.clear()


def test_a_greedy_slot_writes_beside_all_chunks(model):
    with open_wide(model, "greedy", chunks=3) as session:
        for pixels in torch.randn(3, 32, 1176):
            session.feed(pixels)
        while len(session.counts) < 3:
            session.step()
        assert session.counts == [3, 3, 1]


@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_a_record_does_not_depend_on_it(model, variant, tmp_path):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    case = wide(draw, random_case(draw, variant, draw.choice(["wait-2", "wait-3", "random-3"])))
    records = []
    for chunks in (1, 4):
        with open_chunked(model, case, chunks, record=tmp_path / f"{chunks}.json") as session:
            play(session, case)
        records.append(read_record(tmp_path / f"{chunks}.json"))
    times = {"opened": 0.0, "arrived": [], "visible": [], "times": []}
    assert replace(records[0], **times) == replace(records[1], **times)
    assert not replay(records[1], model, list(case.pixels))


def test_sessions_of_a_pool(model):
    """Of all variants, with smaller clips, more chunks than a step has room for, and clips that take several steps."""
    print("seed", SEED)
    draw, layout = random.Random(SEED), Layout(40, 10, 10, (3, 5))
    pool = SessionPool(
        model, 4, layout, max_clips=6, max_new_tokens=14, chunks=draw.choice([2, 3, 7]), chunk=12, chunk_counts=(1, 2)
    )
    waiting, running, over = [], [], 0
    for _ in range(20):
        variant = draw.choice([*VARIANTS.values(), *PARALLEL])
        waiting.append(wide(draw, random_case(draw, variant)))
    while waiting or running:
        if waiting and len(running) < 4 and draw.random() < 0.3:
            case = waiting.pop()
            mode = "fused" if case.variant.parallel else "serial"
            options = {**case.options, "chunk": None, "ahead": draw.choice([0, 1, 3])}
            running.append((case, pool.open(case.variant, case.template, case.layout, mode=mode, **options), []))
        feed_some(draw, running)
        pool.step()
        for case, session, _ in close_done(running):
            check(model, case, session)
            over += 1
    assert over == 20


def test_few_kinds_of_steps_are_captured(model):
    assert [chunk_counts_of(chunks) for chunks in (1, 2, 3, 4, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8]]
    layout = Layout(9, 4, 3, (3, 5))
    for chunks, size, counts in ((1, 19, [0, 1]), (4, 5, [0, 1, 2, 4])):
        runner = StepRunner.single(model, layout, 3, 9, None, 1.15, None, chunks)
        assert (runner.chunk_size, runner.chunk_counts) == (size, counts)
    pool = SessionPool(model, 3, layout, max_clips=3, max_new_tokens=9, chunks=4)
    assert (pool.runner.chunk_size, pool.runner.chunk_counts) == (5, [0, 1, 2, 4, 8, 12])


def test_the_rule_applies_where_the_caller_does_not_say(model, monkeypatch):
    monkeypatch.setattr("qwen_vl_streaming.sessions.session.choose_chunks", lambda *_: 4)
    for options, chunks in (({}, 4), ({"chunks": 2}, 2), ({"chunk": 5}, 1)):
        with open_wide(model, "wait-4", **options) as session:
            assert session.runner.clip_chunks == chunks
        with open_wide(model, "wait-4", runner=session.runner) as again:
            assert again.runner.clip_chunks == chunks
    with open_session(model, session.variant, session.template, session.layout) as serial:
        assert serial.runner.clip_chunks == 1


@pytest.mark.parametrize(
    "grid, schedule, chunks",
    [
        ((7, 13), "wait-3", 1),  # the paper's clips
        ((8, 16), "wait-8", 1),
        ((16, 16), "wait-1", 1),  # a chunk needs a token beside it
        ((16, 16), "wait-2", 2),
        ((16, 16), "greedy", 1),  # gives way to the next clip
        ((16, 32), "model-3", 3),
        ((32, 32), "wait-16", 4),
        ((32, 32), Schedule((0, 2, 2, 9)), 2),
        ((32, 32), Schedule(()), 1),
    ],
)
def test_large_clips_enter_in_chunks_by_the_measured_rule(grid, schedule, chunks):
    scheduler = SlotScheduler(VARIANTS["group"], schedule, 99, None)
    assert choose_chunks(Layout(9, 4, 3, grid), scheduler.typical_quota) == chunks


def test_a_large_clip_is_written_about_as_by_the_reference(model):
    case = random_case(random.Random(SEED), VARIANTS["group"], "wait-2")
    case.layout = case.template.layout((16, 16), 2.0)
    case.pixels = torch.randn(3, 4 * 256, 1176, generator=torch.Generator().manual_seed(SEED))
    case.steps = case.steps[:1] * 3
    with open_session(
        model, case.variant, case.template, case.layout, **{**case.options, "chunk": None}, mode="fused"
    ) as session:
        assert session.runner.clip_chunks == 2
        check(model, case, play(session, case))


def test_numbers_of_chunks_that_are_not_possible(model):
    with open_wide(model, "wait-4") as session:
        runner = session.runner
    for wrong, match in (
        ({"chunks": 0}, "chunks 0 must be from 1 to the 8 visual tokens"),
        ({"chunks": 9}, "chunks 9 must be from 1 to the 8 visual tokens"),
        ({"chunks": 2, "chunk": 3}, "chunk 3 and chunks 2 both"),
        ({"chunks": 2, "runner": runner}, "chunks 2 differs from 1, with which the runner was made"),
    ):
        with pytest.raises(InputError, match=match):
            open_wide(model, "wait-4", **wrong)
    case = random_case(random.Random(3), VARIANTS["interleave"])
    case.layout = case.template.layout((2, 4), 2.0)
    with pytest.raises(InputError, match="chunks 2 is for mode fused: in serial, no token"):
        open_session(model, case.variant, case.template, case.layout, chunks=2)
    with pytest.raises(InputError, match="chunks 99 must be from 1 to the 12 visual tokens"):
        SessionPool(model, 2, case.template.layout((1, 10), 2.0), chunks=99, chunk=12)
