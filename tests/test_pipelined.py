"""Two processes write the same tokens as one; if one of them ends, the other reports it."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.engine.kv_cache import PagedKVCache
from qwen_vl_streaming.engine.stream_state import StreamState
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.sessions import open_session
from qwen_vl_streaming.sessions.perception_client import PerceptionClient, PerceptionLost
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.timeline.plan import make_plan
from qwen_vl_streaming.timeline.timeline import Schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from sessions import (
    MANY,
    PARALLEL,
    Unopenable,
    check,
    double_model,
    no_memory,
    no_model,
    play,
    random_case,
    slowly_compiled_model,
)
from tiny import tiny_model
from waiting import SECONDS, until

SEED = time.time_ns() % 100_000


@pytest.fixture(scope="module")
def clients():
    started = []
    yield started
    for client in started:
        lost = client.why_lost
        client.close()
        assert lost or client.process.exitcode == 0


@pytest.fixture
def client(clients):
    """One for all tests, until it is lost."""
    if not clients or clients[-1].why_lost:
        clients.append(PerceptionClient(tiny_model, patience=SECONDS))
    return clients[-1]


def open_case(model, case, client, **options):
    options = {**case.options, **options}
    return open_session(
        model, case.variant, case.template, case.layout, mode="pipelined", perception_client=client, **options
    )


@pytest.mark.parametrize("part", range(4))
def test_tokens_equal_the_reference(model, client, part):
    """Many sessions on one client. Every fifth is cancelled at some point, without effect on the next one."""
    print("seed", SEED)
    for number in range(part, MANY, 4):
        draw = random.Random(f"{SEED} {number}")
        case = random_case(draw, draw.choice(PARALLEL), may_be_late=True)
        print(number, case.variant.name, case.schedule, case.steps)
        begin = time.monotonic()
        with open_case(model, case, client) as session:
            if number % 5:
                check(model, case, play(session, case))
            else:
                for pixels in case.pixels[: draw.randint(0, len(case.pixels) - 1)]:
                    session.feed(pixels)
                for _ in range(draw.choice([0, 1, 2, 5, 20])):
                    if not session.idle:
                        session.step()
        assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("variant", PARALLEL, ids=lambda v: v.name)
def test_a_fixed_schedule_gives_the_same_tokens_as_in_other_modes(model, client, variant, tmp_path):
    print("seed", SEED)
    case = random_case(random.Random(f"{SEED} {variant.name}"), variant, "wait-2")
    path = tmp_path / "record.json"
    with open_case(model, case, client, record=path) as session:
        two = play(session, case).caption()
    for mode in ("serial", "fused"):
        with open_session(model, variant, case.template, case.layout, mode=mode, **case.options) as session:
            assert play(session, case).caption() == two
    record = read_record(path)
    assert (record.way, record.tokens, record.counts) == ("pipelined", two.tokens, two.schedule)
    assert all(difference.tie for difference in replay(record, model, list(case.pixels)))


def test_a_clip_is_sent_in_one_transfer_and_is_visible_as_a_whole(model, client, monkeypatch):
    case = random_case(random.Random(4), PARALLEL[1], "wait-2")
    case.layout, case.pixels, case.steps = case.template.layout((3, 3), 2.0), torch.randn(4, 36, 1176), [0, 9, 0, 2]
    came, copy_in = [], PagedKVCache.copy_in
    monkeypatch.setattr(PagedKVCache, "copy_in", lambda self, *what: (came.append(1), copy_in(self, *what)))
    with open_case(model, case, client, chunk=2, max_clips=4, max_new_tokens=20) as session:
        play(session, case)
        while len(came) < 4:  # the answer may be over before the last clips have come
            session.rounds._receive(SECONDS)
    assert len(came) == 4


@pytest.mark.parametrize("schedule", ["greedy", Schedule((4, 0, 3, 1))], ids=["greedy", "fixed"])
def test_perception_computes_positions_from_the_written_tokens(model, client, schedule, monkeypatch):
    """In overlap the positions of a clip depend on the tokens of the slots before it; they are sent with the clip."""
    print("seed", SEED)
    draw, orders, order = random.Random(SEED), [], PerceptionClient.send

    def kept(client, *message, **options):
        orders.append(message)
        order(client, *message, **options)

    monkeypatch.setattr(PerceptionClient, "send", kept)
    case = random_case(draw, VARIANTS["overlap"], schedule)
    case.layout = case.template.layout((1, 2), 2.0)
    case.pixels, case.steps = torch.randn(5, 8, 1176), [draw.randint(0, 7) for _ in range(5)]
    with open_case(model, case, client, max_clips=5, max_new_tokens=30) as session:
        play(session, case)
    counts = session.counts + [0] * (5 - len(session.counts))
    plan = make_plan(case.variant, case.layout, Schedule(tuple(counts[:-1])), sum(counts))
    state = StreamState(case.variant, case.template, case.layout)
    for *_, last, known in (order for order in orders if order[0] == "clip" and len(order[-1]) < len(session.counts)):
        state.stream.counts[:] = known
        due = state.feed_clip(last)
        due = due[due.visual]
        assert due.positions.tolist() == plan.visual.positions[:, due.run_index].tolist()
    assert state.visual_fed > len(case.template.prompt)


def test_a_client_serves_one_session_at_a_time(model, client):
    case = random_case(random.Random(2), PARALLEL[0])
    with open_case(model, case, client) as session:
        runner = session.runner
    with open_case(model, case, client), pytest.raises(InputError, match="another session"):
        open_case(model, case, client, runner=runner)
    assert runner.free_slots == [0]  # its batch slot is free again
    with open_case(model, case, client) as session:
        check(model, case, play(session, case))


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_process_ends_the_session_with_its_record(model, client, fate, tmp_path, monkeypatch):
    """It is killed, or stops responding, while clips are in transfer."""
    case = random_case(random.Random(7), PARALLEL[0], "wait-2")
    case.layout, case.pixels = case.template.layout((3, 3), 2.0), torch.randn(5, 36, 1176)
    path = tmp_path / "record.json"
    session = open_case(model, case, client, max_clips=5, max_new_tokens=10, record=path)
    session.feed(case.pixels[0])
    while not session.written:
        session.step()
    monkeypatch.setattr(client, "patience", 2)
    os.kill(client.process.pid, fate)
    begin = time.monotonic()
    with pytest.raises(PerceptionLost) as lost:
        for pixels in case.pixels[1:]:  # 840 kB: more than fits into a pipe that is not read
            session.feed(pixels)
        list(session.tokens())
    assert time.monotonic() - begin < SECONDS
    line = str(lost.value)
    assert "\n" not in line
    assert ("killed by SIGKILL" if fate == signal.SIGKILL else "sent nothing for 2 s") in line
    record = read_record(path)
    assert record.end == f"failed: {line}"
    assert record.tokens == session.caption().tokens
    assert len(record.tokens) in (1, 2)
    assert all(difference.tie for difference in replay(record, model, list(case.pixels)))
    session.close()
    with pytest.raises(InputError, match="start a new PerceptionClient"):
        open_case(model, case, client)


def test_compilation_in_the_other_process_may_take_longer_than_a_clip(model):
    """Also where the session that waits for it is interrupted, and the next one opens meanwhile."""
    case = random_case(random.Random(9), PARALLEL[0], "wait-2")

    def interrupt(*_):
        raise KeyboardInterrupt

    with PerceptionClient(slowly_compiled_model, patience=3) as own:
        with open_case(model, case, own) as session:
            check(model, case, play(session, case))
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            open_case(model, case, own, max_clips=300)
        signal.signal(signal.SIGALRM, before)
        begin = time.monotonic()
        with open_case(model, case, own, max_clips=300) as session:
            assert time.monotonic() - begin > own.patience
            check(model, case, play(session, case))


def test_a_session_closes_at_once_even_if_perception_hangs(model, client, tmp_path):
    """Stopping it does not wait for anything."""
    case = random_case(random.Random(7), PARALLEL[0], "wait-2")
    case.layout, case.pixels, case.steps = case.template.layout((3, 3), 2.0), torch.randn(2, 36, 1176), [0, 0]
    session = open_case(model, case, client, max_clips=5, max_new_tokens=10, record=tmp_path / "r.json")
    os.kill(client.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    session.feed(case.pixels[0])
    assert session.step() is None
    with pytest.raises(KeyboardInterrupt), session.fails_on_error():
        raise KeyboardInterrupt
    assert time.monotonic() - begin < client.patience / 2
    assert read_record(tmp_path / "r.json").end == "cancelled"
    os.kill(client.process.pid, signal.SIGCONT)
    with open_case(model, case, client) as session:
        check(model, case, play(session, case))


def test_a_model_that_cannot_be_loaded_is_refused():
    """The attempt leaves nothing behind."""
    for load, error, match in (
        (no_model, InputError, "could be loaded from 'nowhere'"),
        (no_memory, PerceptionLost, r"could not load its model \(no memory left\)"),
    ):
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        with pytest.raises(error, match=match):
            PerceptionClient(load)
        gc.collect()
        # Fewer, if that of another test has been closed in the meantime.
        until(lambda before=before: threading.active_count() <= before[0])
        until(lambda before=before: len(os.listdir("/proc/self/fd")) <= before[1])


def test_perception_ignores_signals_to_the_process_group(model, client):
    case = random_case(random.Random(5), PARALLEL[0])
    with open_case(model, case, client) as session:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.process.pid, number)
        check(model, case, play(session, case))


def test_a_program_that_does_not_close_its_client_still_ends():
    lines = (
        "from qwen_vl_streaming.sessions.perception_client import PerceptionClient",
        "from tiny import tiny_model",
        "kept = PerceptionClient(tiny_model)",
        "print(kept.process.pid)",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_insufficient_shared_memory_is_one_line(model, monkeypatch):
    """Later sessions are not affected."""
    case = random_case(random.Random(6), PARALLEL[0])

    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    with PerceptionClient(tiny_model, patience=SECONDS) as own:
        with (
            monkeypatch.context() as patch,
            pytest.raises(InputError, match=r"/dev/shm has less than [\d.]+ MiB"),
        ):
            patch.setattr(torch.Tensor, "share_memory_", full)
            open_case(model, case, own)
        with open_case(model, case, own) as session:
            check(model, case, play(session, case))


def test_a_message_that_perception_cannot_read_is_reported_at_once(model, client):
    case = random_case(random.Random(6), PARALLEL[0])
    client.send(Unopenable())
    with pytest.raises(PerceptionLost, match=r"failed \(no memory left\)"), open_case(model, case, client) as session:
        play(session, case)


def test_clips_in_the_data_type_of_the_model(clients):
    wide = tiny_model().double()
    case = random_case(random.Random(8), PARALLEL[0], "wait-1")
    case.pixels = case.pixels.double()
    with PerceptionClient(double_model, patience=SECONDS) as own, open_case(wide, case, own) as session:
        check(wide, case, play(session, case))
