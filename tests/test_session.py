"""A live session writes the same tokens in every execution mode, for any arrival times."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE, PagedKVCache
from qwen_vl_streaming.engine.paged_attention import MixedAttention
from qwen_vl_streaming.engine.step_inputs import StepInputs
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.engine.stream_state import StreamState
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions import open_session
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.timeline.plan import Window, make_plan
from qwen_vl_streaming.timeline.timeline import CLIP, Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import MANY, PARALLEL, check, play, random_case
from tiny import random_counts, random_template
from waiting import SECONDS

SEED = time.time_ns() % 100_000
MODES = ("serial", "fused")


def open_case(model, case, mode, **options):
    return open_session(model, case.variant, case.template, case.layout, mode=mode, **{**case.options, **options})


@pytest.mark.parametrize("part", range(4))
def test_tokens_equal_the_reference(model, part):
    """Random variants, modes, schedules, chunks and arrivals; one session after the other, each with a time limit."""
    print("seed", SEED)
    for number in range(part, MANY, 4):
        draw = random.Random(f"{SEED} {number}")
        variant = draw.choice([*VARIANTS.values(), *PARALLEL])
        case = random_case(draw, variant, may_be_late=True)
        mode = draw.choice(MODES) if variant.parallel else "serial"
        print(number, variant.name, mode, case.schedule, case.steps)
        begin = time.monotonic()
        with open_case(model, case, mode) as session:
            check(model, case, play(session, case))
        assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_a_fixed_schedule_gives_the_same_tokens_in_all_modes(model, variant):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    for schedule in ("wait-1", "wait-3", "random-3"):
        case = random_case(draw, variant, schedule)
        written = []
        for mode in MODES:
            for chunk in (None, 1, 3):
                draw.shuffle(case.steps)
                with open_case(model, case, mode, chunk=chunk) as session:
                    written.append(play(session, case).caption())
        assert all(caption == written[0] for caption in written)


@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_a_clip_is_fed_together_with_tokens(model, variant):
    """In fused mode tokens are written between the arrival of a clip and its slot; a slot of `greedy` has as many as
    the clip has chunks."""
    case = random_case(random.Random(3), variant, "greedy")
    case.layout = case.template.layout((2, 3), 2.0)
    pixels = torch.randn(4, 24, 1176)
    with open_case(model, case, "fused", chunk=2, max_clips=4, max_new_tokens=40) as session:
        for clip in pixels[:3]:
            session.feed(clip)
        while len(session.counts) < 3:
            session.step()
        assert session.counts == [3, 3, 1]  # 6 visual tokens, two per step; the third slot has just begun
    with open_case(model, case, "serial", chunk=2, max_clips=4) as session:
        for clip in pixels[:3]:
            session.feed(clip)
        while len(session.counts) < 3:
            session.step()
        assert session.counts[:2] == [0, 0]


@pytest.mark.parametrize("mode", ["serial", "fused"])
def test_a_late_clip_is_fed_with_its_first_token(model, mode, monkeypatch):
    """A clip that arrives after the slot before it is over needs no separate forward step in fused mode."""
    case = random_case(random.Random(3), VARIANTS["group"], "wait-3")
    steps = []
    with open_case(model, case, mode, chunk=None, max_clips=6, max_new_tokens=40) as session:
        run = session.runner.step
        monkeypatch.setattr(session.runner, "step", lambda asks: steps.append(asks) or run(asks))
        for clip in torch.randn(6, *case.pixels[0].shape):
            session.feed(clip)
            assert len(list(session.tokens())) == 3
    assert len(steps) == 6 * (3 if mode == "fused" else 4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_rows_follow_the_plan(variant, seed):
    """A live session, which knows only the past and computes each piece from its first row, feeds the same rows as a
    plan, which knows everything in advance and computes each row."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name} {seed}")
    template = random_template(draw)
    layout = template.layout((draw.randint(1, 3), draw.randint(1, 3)), draw.choice([2.0, 5 / 3]))
    window = Window(draw.randint(1, 3), draw.randint(1, 5)) if seed % 2 else None
    counts = random_counts(draw, variant)
    plan = make_plan(variant, layout, Schedule(tuple(counts[:-1])), sum(counts))
    feed = StreamState(variant, template, layout, window)
    dues, answer = [StreamState.prompt(variant, template, layout, window)], []
    for number, count in enumerate(counts, 1):
        dues.append(feed.feed_clip(number == len(counts)))
        for _ in range(count):
            dues.append(feed.feed_text())
            answer.append(draw.randrange(150))
            feed.stream.write(answer[-1])
    for run, flag in ((plan.visual, False), (plan.text, True)):
        table = np.concatenate([due[due.text == flag].table for due in dues], 1)
        fed = table.shape[1]
        assert fed in (len(run) - flag, len(run))  # only a later clip could use the last token
        of, order = run.rows, torch.arange(len(run))
        ids, text_row, clip_row = (
            template.ids(of, answer),
            order.where(of.text, -1),
            of.index.where(of.part == CLIP, -1),
        )
        start = torch.zeros(2, len(run)).long()
        if window is not None:
            start = torch.stack(window.start(layout, run.seen_visual, run.seen_text, len(counts)))
        if variant.parallel and not flag:
            start[1] = torch.from_numpy(table[7])  # these rows see no text
        expected = [*run.positions, order, run.seen_visual, run.seen_text, *start, ids, text_row, clip_row, of.part]
        assert np.array_equal(torch.stack(expected)[:, :fed].numpy(), table)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_a_session_feeds_its_timeline(model, variant, mode, monkeypatch):
    """Positions and visibility of every row, with slots that write more and fewer tokens than a clip has positions."""
    print("seed", SEED)
    draw, passed, run_pass = random.Random(f"{SEED} {variant.name}"), [], StepRunner.step

    def spy(self, asks):
        passed.extend(due for ask in asks for due in (ask.prefill, ask.decode))
        return run_pass(self, asks)

    monkeypatch.setattr(StepRunner, "step", spy)
    for schedule in ("greedy", Schedule((4, 0, 3, 1))):
        case = random_case(draw, variant, schedule)
        case.layout = case.template.layout((1, 2), 2.0)
        case.pixels, case.steps = torch.randn(5, 8, 1176), [draw.randint(0, 7) for _ in range(5)]
        passed.clear()
        with open_case(model, case, mode, max_clips=5, max_new_tokens=16) as session:
            play(session, case)
        counts = session.counts + [0] * (5 - len(session.counts))
        plan = make_plan(variant, case.layout, Schedule(tuple(counts[:-1])), sum(counts))
        for run, flag in ((plan.visual, False), (plan.text, True)):
            mine = [due[due.text == flag] for due in passed]
            fed = sum(map(len, mine))
            assert fed > 0
            upto = min(fed, len(run) - flag)
            for field in ("positions", "seen_visual", "seen_text"):
                got = torch.from_numpy(np.concatenate([getattr(due, field) for due in mine], -1))[..., :upto]
                assert torch.equal(got, getattr(run, field)[..., :upto]), field


@pytest.mark.parametrize("mode", MODES)
def test_visual_tokens_may_be_given(model, mode):
    case = random_case(random.Random(5), VARIANTS["overlap"], "wait-2")
    with torch.no_grad():
        tokens = model.perceive(case.pixels, case.layout.grid)
    with open_case(model, case, mode) as session:
        from_pixels = play(session, case).caption()
    case.pixels = tokens
    with open_case(model, case, mode) as session:
        assert play(session, case).caption() == from_pixels


class OnGPU(torch.Tensor):
    """Stands for a tensor on a GPU where there is none."""

    is_cuda = True


def test_clips_on_a_gpu_enter_a_model_on_the_cpu(model):
    case = random_case(random.Random(7), VARIANTS["group"], "wait-2")
    with open_case(model, case, "serial") as session:
        expected = play(session, case).caption()
    case.pixels = case.pixels.cuda() if torch.cuda.is_available() else case.pixels.as_subclass(OnGPU)
    with open_case(model, case, "serial") as session:
        assert play(session, case).caption() == expected


def test_a_runner_serves_one_stream_after_another(model):
    """The cache contents of an earlier stream are not visible: a session on a used runner writes the same as on a new
    one."""
    case = random_case(random.Random(6), VARIANTS["group"], "wait-2")
    first = open_case(model, case, "fused")
    written, runner = [play(first, case).caption()], first.runner
    first.close()
    for tensor in runner.cache.store:
        tensor.normal_()
    runner.text_ids.fill_(3), runner.ended.fill_(True), runner.penalized_ids.fill_(True)
    for mode in MODES:
        with open_case(model, case, mode, runner=runner) as session:
            written.append(play(session, case).caption())
    assert written[1:] == written[:1] * 2
    with (
        open_case(model, case, "serial", runner=runner),
        pytest.raises(InputError, match="all 1 batch slots are in use"),
    ):
        open_case(model, case, "serial", runner=runner)
    with pytest.raises(InputError, match="made for shorter ones"):
        open_case(model, case, "serial", runner=runner, max_clips=1000)


@pytest.mark.parametrize("width", [None, 40])
@pytest.mark.parametrize("batch_slots", [1, 3])
def test_attention_masks_single_keys_only_in_the_blocks_of_a_clip(model, batch_slots, width, monkeypatch):
    """All blocks before a clip are listed as full, even if rows of a forward step are idle."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {batch_slots} {width}")
    template, many = random_template(draw), draw.randint(6, 8)
    layout = template.layout((draw.randint(6, 9), 8), 2.0)
    room = {"schedule": Schedule((0,) * many), "max_clips": many + 1, "max_new_tokens": 4}
    visual, text = StepRunner.token_capacity(layout, many + 1, 4, None)
    need, tokens = PagedKVCache.blocks_needed(visual, text), layout.tokens_per_clip
    sizes = {
        "blocks_per_slot": need,
        "text_capacity": text,
        "clip_tokens": tokens,
        "chunk_size": width or tokens + layout.tail,
    }
    runner = StepRunner(model, batch_slots, batch_slots * need, **sizes)
    with open_session(model, VARIANTS["group"], template, layout, runner=runner, **room) as session:
        assert not [*session.tokens()]  # the prompt, if it has not entered yet
        for _ in range(many):
            session.feed(torch.randn(tokens, runner.clip_features.shape[2]))
        made = []
        monkeypatch.setattr(
            StepInputs, "pack", lambda *args, pack=StepInputs.pack: made.append(pack(*args)) or made[-1]
        )
        assert not [*session.tokens()]
        assert len(made) == many * -(-tokens // runner.chunk_size)
        for numbers in made:
            both = MixedAttention(runner.cache, batch_slots, (1, runner.chunk_size), runner.groups, True, {}, False)
            table, slots, _ = runner.inputs[batch_slots, 1].split(numbers)
            both.update(table[3], table[4:8], slots)
            asked, whole = both.parts[-1].num_kv_blocks
            before = int(table[4, table[3] > 0].min())
            assert whole.min() >= before // BLOCK_SIZE and asked.max() <= 3


@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_tokens_may_be_read_late(model, variant):
    """If the host reads tokens some forward steps after requesting them, the same tokens are written in the same slots,
    even if the answer has ended in the meantime."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    for number in range(12):
        case = random_case(draw, variant, draw.choice(["wait-1", "wait-3", "random-2"]))
        with open_case(model, case, "serial", ahead=0) as session:
            plain = play(session, case).caption()
        if number % 2 and len(plain.tokens) > 2:  # now it ends where it had gone on
            case.template = replace(case.template, end=plain.tokens[draw.randrange(1, len(plain.tokens))])
            with open_case(model, case, "serial", ahead=0) as session:
                plain = play(session, case).caption()
        for mode in MODES:
            for ahead in (1, 2, 5):
                with open_case(model, case, mode, ahead=ahead) as session:
                    assert play(session, case).caption() == plain
                    assert len(session.log.visible) == len(session.counts)


@pytest.mark.parametrize("mode", MODES)
def test_it_can_be_cancelled_at_any_stage(model, mode, tmp_path):
    """Before the first clip, with a clip partly processed, within a slot, after the last clip, and at the end."""
    case = random_case(random.Random(1), VARIANTS["gap"], "wait-3")
    case.layout = case.template.layout((2, 3), 2.0)
    pixels, options = torch.randn(3, 24, 1176), {"chunk": 2, "max_clips": 3, "max_new_tokens": 12}

    def cancelled(clips: int, rounds: int, last: bool = False):
        path = tmp_path / f"{mode} {clips} {rounds} {last}.json"
        session = open_case(model, case, mode, record=path, **options)
        for number, clip in enumerate(pixels[:clips], 1):
            session.feed(clip, last=last and number == clips)
        for _ in range(rounds):
            session.step()
        session.close()
        session.close()  # a second call has no effect
        record = read_record(path)
        assert record.end == ("max_new_tokens" if session.done else "cancelled")
        assert len(record.arrived) == len(record.hashes) == clips
        assert len(record.visible) == len(record.counts)
        assert record.tokens == session.caption().tokens
        with pytest.raises(InputError, match="closed"):
            session.step()
        with pytest.raises(InputError, match="closed"):
            session.feed(pixels[0])
        return record

    assert cancelled(0, 0).counts == []
    assert cancelled(1, 1).tokens == []
    assert len(cancelled(2, 5).tokens) in (1, 2, 3)
    assert cancelled(3, 10, last=True).tokens
    assert len(cancelled(3, 60, last=True).tokens) == 12


def test_an_error_ends_it_with_its_record(model, tmp_path, monkeypatch):
    case = random_case(random.Random(1), VARIANTS["group"], "wait-3")
    session = open_case(model, case, "fused", record=tmp_path / "r.json")
    session.feed(case.pixels[0])
    monkeypatch.setattr(session.runner, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step()
    assert read_record(tmp_path / "r.json").end == "failed: division by zero"
    assert session.closed
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_invalid_clips_are_refused_and_the_session_continues(model):
    case = random_case(random.Random(2), VARIANTS["overlap"], "wait-1")
    case.layout = case.template.layout((2, 3), 2.0)
    case.pixels, case.steps = torch.randn(3, 24, 1176), [0, 3, 2]
    with open_case(model, case, "fused", max_clips=3) as session:
        plain = play(session, case).caption()
    session = open_case(model, case, "fused", max_clips=3)
    session.feed(case.pixels[0])
    session.step()
    for wrong in (torch.randn(28, 1176), torch.randn(24, 1177), torch.randn(1, 24, 1176), torch.randn(6, 31)):
        with pytest.raises(InputError, match=r"clip 2 has shape .*2 x 3 visual tokens.*\(24, 1176\)"):
            session.feed(wrong)
    session.feed(case.pixels[1])
    session.feed(case.pixels[2], last=True)
    with pytest.raises(InputError, match="clip 4 came after the last one, clip 3"):
        session.feed(case.pixels[0])
    list(session.tokens())
    assert session.caption() == plain


def test_invalid_arguments_are_refused(model):
    case = random_case(random.Random(2), VARIANTS["overlap"], "wait-1")
    for name in ("origin", "batch", "interleave"):
        for mode in ("fused", "pipelined"):
            with pytest.raises(InputError, match=f"variant {name} cannot run {mode}: .*serial"):
                case.variant = VARIANTS[name]
                open_case(model, case, mode, **({"perception_client": object()} if mode == "pipelined" else {}))
    case.variant = VARIANTS["group"]
    for wrong, match in (
        ({"mode": "sideways"}, "sideways"),
        ({"mode": "serial", "schedule": "wait-0"}, "wait-0"),
        ({"mode": "serial", "chunk": 0}, "chunk 0"),
        ({"mode": "serial", "max_clips": 0}, "max_clips 0"),
        ({"mode": "pipelined"}, "perception_client"),
    ):
        with pytest.raises(InputError, match=match):
            open_case(model, case, **wrong)
    session = open_case(model, case, "serial", schedule=Schedule((1, 2)), max_clips=3)
    with pytest.raises(InputError, match="clip 1 as the last one"):
        session.feed(case.pixels[0], last=True)
    session = open_case(model, case, "serial", max_clips=1)
    session.feed(case.pixels[0])
    with pytest.raises(InputError, match="max_clips 1"):
        session.feed(case.pixels[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_source_may_end_without_a_warning(model, mode, tmp_path):
    """The tail is then fed alone, after the tokens of the last clip's slot. If the end is known in time, it is fed with
    the clip."""
    case = random_case(random.Random(8), VARIANTS["overlap"], "wait-2")
    case.pixels, case.layout = torch.randn(2, 24, 1176), case.template.layout((2, 3), 2.0)
    path = tmp_path / "r.json"
    for taken_in in (True, False):
        session = open_case(model, case, mode, record=path, max_clips=2, max_new_tokens=9)
        with pytest.raises(InputError, match="ended after 0 clips"):
            session.end()
        session.feed(case.pixels[0])
        list(session.tokens())
        session.feed(case.pixels[1])
        if taken_in:
            list(session.tokens())
            assert session.counts == [2, 2] and session.idle
        session.end()
        session.end()  # has no effect
        with pytest.raises(InputError, match="clip 3 came after the last one"):
            session.feed(case.pixels[1])
        list(session.tokens())
        assert session.counts == ([2, 2, 5] if taken_in else [2, 7])
        session.close()
        record = read_record(path)
        assert record.bare == taken_in and record.complete
        assert all(difference.tie for difference in replay(record, model, list(case.pixels)))
    session = open_case(model, case, mode, schedule=Schedule((1, 1)), max_clips=3)
    session.feed(case.pixels[0])
    with pytest.raises(InputError, match="ended after 1 clips, but 3 were expected"):
        session.end()


def test_a_clip_that_was_only_encoded_may_still_be_the_last(model):
    """In a burst the vision encoder is ahead; the tail is still fed with the last clip."""
    case = random_case(random.Random(9), VARIANTS["group"], "wait-2")
    case.pixels, case.layout, case.most = torch.randn(4, 24, 1176), case.template.layout((2, 3), 2.0), 20
    with open_case(model, case, "fused") as session:
        for pixels in case.pixels:
            session.feed(pixels)
        while session.rounds.waiting:
            session.step()
        assert len(session.counts) < 4 and session.rounds.encoded
        session.end()
        list(session.tokens())
        assert session.scheduler.complete and not session.scheduler.bare
        assert len(session.counts) == 4
        check(model, case, session)
