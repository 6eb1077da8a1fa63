"""Endless streams: tokens outside the window are not visible, exactly as in the reference."""

import dataclasses
import random
import time

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine import step_runner
from qwen_vl_streaming.engine.kv_cache import BLOCK_SIZE
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions import open_session
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.session_pool import SessionPool
from qwen_vl_streaming.timeline.plan import Window
from qwen_vl_streaming.timeline.timeline import ANSWER, CLIP, HEADER, PROMPT, TAIL, make_timeline
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import PARALLEL, random_case
from tiny import random_counts, random_template

SEED = time.time_ns() % 100_000
ALL = [
    (variant, mode)
    for variant in VARIANTS.values()
    for mode in (("serial", "fused") if variant.parallel else ("serial",))
]


def long_case(draw, variant, clips, grid=(3, 3)):
    case = random_case(draw, variant, draw.choice(["wait-1", "wait-3", "random-2"]))
    case.layout = case.template.layout(grid, 2.0)
    case.pixels = torch.randn(clips, 4 * grid[0] * grid[1], 1176, generator=torch.Generator().manual_seed(clips))
    case.template = case.template.__class__(**{**case.template.__dict__, "end": 10_000})  # it goes on
    return case


def watch(session, pixels, draw):
    for number, clip in enumerate(pixels, 1):
        session.feed(clip, last=number == len(pixels))
        for _ in range(draw.choice([0, 1, 3, 9])):
            if not session.idle:
                session.step()
    list(session.tokens())
    return session


@pytest.mark.parametrize(("variant", "mode"), ALL, ids=[f"{variant.name} {mode}" for variant, mode in ALL])
def test_a_window_that_reuses_blocks_equals_the_reference(model, variant, mode, tmp_path):
    """More clips and tokens than blocks; replayed in serial mode without blocks, and in one full pass."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name} {mode}")
    case = long_case(draw, variant, 70)
    window = draw.choice([(1, 1), (3, 5), (20, 40)])
    most = 30 if not variant.streams else 250
    path = tmp_path / "record.json"
    session = open_session(
        model,
        variant,
        case.template,
        case.layout,
        mode=mode,
        schedule=case.schedule,
        window=window,
        max_clips=5,
        max_new_tokens=most,
        **draw.choice([{}, {"chunk": 4}, {"chunks": 3}] if mode == "fused" else [{}, {"chunk": 4}]),
        ahead=draw.choice([0, 2]),
        record=path,
    )
    with session:
        watch(session, case.pixels, draw)
    assert len(session.counts) == 70 or len(session.written) == most
    visual = session.rounds.batch_slot.visual
    assert visual.last_block >= len(visual.blocks)  # blocks were reused
    assert len(visual.blocks) * BLOCK_SIZE < 70 * 9
    record = read_record(path)
    assert record.window == list(window)
    assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


def test_the_rule_of_the_window():
    """Token by token: prompt and header always; the newest clips, of which the tail is part; the newest tokens."""
    print("seed", SEED)
    draw = random.Random(SEED)
    for variant in VARIANTS.values():
        layout = random_template(draw).layout((2, 2), 2.0)
        counts = random_counts(draw, variant)
        timeline = make_timeline(variant, layout, counts)
        window = Window(draw.randint(1, 3), draw.randint(1, 4))
        rows = timeline.rows
        mask = window.mask(layout, rows.text, timeline.clips)
        for q in range(len(rows)):
            clip = max((int(rows.clip[k]) for k in range(q + 1)), default=0)
            tokens = [k for k in range(q + 1) if rows.text[k]]
            for k in range(q + 1):
                part = int(rows.part[k])
                if part in (PROMPT, HEADER):
                    expected = True
                elif part in (CLIP, TAIL):
                    expected = int(rows.clip[k]) > clip - window.clips
                else:
                    assert part == ANSWER
                    expected = k in tokens[-window.tokens :]
                assert bool(mask[q, k]) == expected, (variant.name, q, k)


@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_a_window_that_holds_everything_changes_nothing(model, variant, tmp_path):
    """A session with a large enough window writes what a full pass without a window gives, except for ties."""
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name}")
    case = long_case(draw, variant, 5)
    written = []
    for window in (None, (5, 60)):
        with open_session(
            model,
            variant,
            case.template,
            case.layout,
            mode="fused",
            schedule=case.schedule,
            window=window,
            max_new_tokens=40,
            record=tmp_path / "record.json",
        ) as session:
            written.append(watch(session, case.pixels, random.Random(1)).caption())
    if written[0] != written[1]:
        record = dataclasses.replace(read_record(tmp_path / "record.json"), window=None)
        assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


def test_without_a_window_everything_stays_visible(model):
    case = long_case(random.Random(1), VARIANTS["group"], 3)
    with open_session(model, case.variant, case.template, case.layout, max_clips=2) as session:
        session.feed(case.pixels[0])
        session.feed(case.pixels[1])
        with pytest.raises(InputError, match=r"exceeds max_clips 2: .*with a window"):
            session.feed(case.pixels[2])
    for window in ((0, 3), (3, 0)):
        with pytest.raises(InputError, match="at least 1 clip and 1 token"):
            open_session(model, case.variant, case.template, case.layout, window=window)


def test_a_pool_of_endless_streams(model):
    """Each has its own window and pace; memory is that of the windows."""
    print("seed", SEED)
    draw = random.Random(SEED)
    cases = [long_case(draw, variant, 40) for variant in PARALLEL]
    alone = []
    for case in cases:
        options = {"window": (4, 9), "schedule": "wait-2", "max_new_tokens": 100}
        with open_session(model, case.variant, case.template, case.layout, mode="fused", **options) as session:
            alone.append(watch(session, case.pixels, draw).caption())
    with SessionPool(model, 3, cases[0].layout, window=(4, 40), max_new_tokens=100) as pool:
        sessions = [
            pool.open(case.variant, case.template, case.layout, schedule="wait-2", window=(4, 9)) for case in cases
        ]
        for number in range(40):
            for session, case in zip(sessions, cases, strict=True):
                session.feed(case.pixels[number], last=number == 39)
            for _ in range(draw.randint(0, 4)):
                pool.step()
        while not pool.idle:
            pool.step()
        assert [session.caption() for session in sessions] == alone


def test_blocks_suffice_for_the_window(monkeypatch):
    """For any alignment of sizes and blocks: the oldest visible token is never overwritten."""
    print("seed", SEED)
    draw = random.Random(SEED)
    for _ in range(300):
        layout = random_template(draw).layout((draw.randint(1, 12), draw.randint(1, 12)), 2.0)
        window = Window(draw.randint(1, 20), draw.randint(1, 300))
        for run, kept, step, ahead in (
            (0, layout.prompt, layout.tokens_per_clip, window.clips + step_runner.CLIPS_AHEAD),
            (1, layout.header, 1, window.tokens + 1),
        ):
            room = step_runner.StepRunner.token_capacity(layout, 1, 1, window)[run]
            blocks = -(-room // BLOCK_SIZE)
            reused = blocks - min(-(-kept // BLOCK_SIZE), blocks - 1)
            for newest in (kept + step * draw.randint(1, 5000) for _ in range(5)):
                oldest = max(newest - step * ahead - (layout.tail if run == 0 else 0), kept)
                assert newest // BLOCK_SIZE - oldest // BLOCK_SIZE < reused
