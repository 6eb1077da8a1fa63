"""Live sessions on a GPU, captured as CUDA graphs, write the same tokens as the reference on the CPU, in float32."""

import contextlib
import functools
import random
import time
from dataclasses import replace

import pytest
import torch
from qwen_vl_streaming.engine.step_runner import StepRunner
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions import open_session
from qwen_vl_streaming.sessions.perception_client import PerceptionClient
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.session_pool import SessionPool
from qwen_vl_streaming.timeline.plan import Window
from qwen_vl_streaming.timeline.timeline import Layout
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import PARALLEL, check, check_deciding, decided, play, random_case
from test_gpu import FLEX, no_waiting
from tiny import tiny_model
from waiting import SECONDS

pytestmark = pytest.mark.gpu
SEED = time.time_ns() % 100_000
GRID, CLIPS, WORDS = (2, 3), 5, 14
MODES = [(variant, "serial") for variant in VARIANTS.values()] + [(variant, "fused") for variant in PARALLEL]


def on_gpu(device: int = 0):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    return tiny_model(**FLEX).to(f"cuda:{device}")


@pytest.fixture(scope="module")
def models():
    """The same weights on the CPU and on the GPU."""
    torch.manual_seed(0)
    return tiny_model(**FLEX), on_gpu()


@pytest.fixture(scope="module", params=[1, 3], ids=lambda chunks: f"{chunks} chunks")
def runner(models, request):
    """Compiled and captured once for all tests of one session, with clips in one chunk and in three."""
    made = StepRunner.single(models[1], Layout(9, 4, 3, GRID), CLIPS + 1, WORDS, None, 1.15, None, request.param)
    made.warm_up()
    made.vision_encoder.capture(GRID)
    return made


def fixed_case(draw, variant, clips=CLIPS):
    case = random_case(draw, variant, may_be_late=True)
    case.layout = case.template.layout(GRID, 2.0)
    case.pixels = torch.randn(clips, 24, 1176, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    case.steps = [draw.choice([0, 0, 1, 2, 5, 20]) for _ in range(clips)]
    if not isinstance(case.schedule, str):
        case.schedule = "wait-2"
    return case


@pytest.mark.parametrize(("variant", "mode"), MODES, ids=[f"{variant.name} {mode}" for variant, mode in MODES])
def test_captured_sessions_equal_the_reference(models, runner, variant, mode):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {variant.name} {mode}")
    for _ in range(8):
        case = fixed_case(draw, variant)
        options = {**case.options, "max_clips": CLIPS + 1, "runner": runner, "ahead": draw.choice([0, 1, 3])}
        with open_session(models[1], variant, case.template, case.layout, mode=mode, **options) as session:
            check(models[0], case, play(session, case))


@pytest.mark.parametrize(("variant", "mode"), [pair for pair in MODES if pair[0].streams], ids=str)
def test_captured_sessions_decide_when_to_speak(models, runner, variant, mode):
    """The token that the model writes most often ends its slots."""
    print("seed", SEED)
    draw, silent = random.Random(f"{SEED} decides {variant.name} {mode}"), 0
    for _ in range(6):
        case = fixed_case(draw, variant)
        case.template, case.schedule, case.most = replace(case.template, end=-1), f"model-{draw.randint(2, 4)}", WORDS
        written = decided(models[0], case).tokens
        case.template = replace(case.template, end_of_slot=max(written, key=written.count))
        options = {**case.options, "max_clips": CLIPS + 1, "runner": runner, "ahead": draw.choice([0, 1, 3])}
        with open_session(models[1], variant, case.template, case.layout, mode=mode, **options) as session:
            check_deciding(models[0], case, play(session, case))
        silent += sum(count == 1 for count in session.counts[:-1])
    assert silent


def test_a_captured_session_pool(models, monkeypatch):
    """Steps of few sessions have few rows. None is captured while a session runs."""
    print("seed", SEED)
    draw = random.Random(SEED)
    options = {"max_clips": CLIPS + 1, "max_new_tokens": WORDS, "decode_counts": (2,)}
    with SessionPool(models[1], 4, Layout(9, 4, 3, GRID), **options) as pool:
        used, kind_of = set(), pool.runner.kind_of
        monkeypatch.setattr(pool.runner, "kind_of", lambda requests: used.add(kind_of(requests)) or kind_of(requests))
        waiting = [fixed_case(draw, draw.choice([*VARIANTS.values(), *PARALLEL])) for _ in range(16)]
        running = []
        while waiting or running:
            if waiting and len(running) < 4 and draw.random() < 0.4:
                case = waiting.pop()
                mode = "fused" if case.variant.parallel else "serial"
                options = {**case.options, "max_clips": CLIPS + 1, "chunk": None}
                running.append((case, pool.open(case.variant, case.template, case.layout, mode=mode, **options), []))
            for case, session, fed in running:
                if len(fed) < CLIPS and draw.random() < 0.5:
                    fed.append(1)
                    session.feed(case.pixels[len(fed) - 1], last=len(fed) == CLIPS)
            pool.step()
            for case, session, fed in [*running]:
                if session.done:
                    running.remove((case, session, fed))
                    session.close()
                    check(models[0], case, session)
        assert used <= {*pool.runner.graphs} and {rows for (rows, _), _ in used} == {2, 4}


@pytest.mark.parametrize("mode", ["serial", "fused"])
def test_a_captured_window_that_reuses_blocks(models, mode, tmp_path):
    print("seed", SEED)
    draw = random.Random(f"{SEED} {mode}")
    made = StepRunner.single(models[1], Layout(9, 4, 3, GRID), 1, 1, None, 1.15, Window(20, 40))
    made.warm_up()
    for number in range(3):
        case = fixed_case(draw, draw.choice(PARALLEL), clips=120)
        case.template = replace(case.template, end=10_000)
        path = tmp_path / f"{number}.json"
        options = {"schedule": "wait-3", "max_new_tokens": 400, "window": (20, 40), "runner": made, "record": path}
        with open_session(models[1], case.variant, case.template, case.layout, mode=mode, **options) as session:
            play(session, case)
        assert session.rounds.batch_slot.visual.last_block >= len(session.rounds.batch_slot.visual.blocks)
        assert all(difference.tie for difference in replay(read_record(path), models[0], list(case.pixels)))


@pytest.mark.parametrize("mode", ["serial", "fused"])
def test_the_host_waits_only_for_tokens(models, mode):
    """With a window that reuses blocks."""
    print("seed", SEED)
    made = StepRunner.single(models[1], Layout(9, 4, 3, GRID), 1, 1, None, 1.15, Window(20, 40))
    made.warm_up()
    case = fixed_case(random.Random(SEED), PARALLEL[0], clips=120)
    case.template = replace(case.template, end=10_000)
    options = {"schedule": "wait-3", "max_new_tokens": 400, "window": (20, 40), "runner": made}
    with open_session(models[1], case.variant, case.template, case.layout, mode=mode, **options) as session:
        for number, clip in enumerate(case.pixels):
            with no_waiting() if number > 2 else contextlib.nullcontext():
                session.feed(clip)
                while not session.idle:
                    session.step()
        assert session.rounds.batch_slot.visual.last_block >= len(session.rounds.batch_slot.visual.blocks)


@pytest.mark.parametrize("other", [0, 1], ids=["one GPU", "two GPUs"])
def test_two_processes_write_the_same_tokens_as_one(models, runner, other):
    if other >= torch.cuda.device_count():
        pytest.skip("takes two GPUs")
    print("seed", SEED)
    draw = random.Random(f"{SEED} {other}")
    template = fixed_case(draw, PARALLEL[0]).template  # other lengths would be compiled again
    with PerceptionClient(functools.partial(on_gpu, other), patience=4 * SECONDS) as client:
        for variant in PARALLEL * 8:
            case = fixed_case(draw, variant)
            case.template, case.layout = template, template.layout(GRID, 2.0)
            options = {
                **case.options,
                "max_clips": CLIPS + 1,
                "runner": runner,
                "perception_client": client,
                "chunk": None,
            }
            with open_session(models[1], variant, case.template, case.layout, mode="pipelined", **options) as session:
                check(models[0], case, play(session, case))
