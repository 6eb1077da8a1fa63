"""The server's side of a model process: errors in its threads, the end during a restart, shares of memory. Without
models."""

import asyncio
import gc
import multiprocessing
import os
import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from qwen_vl_streaming.common.clock import now
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.serve import model_loop, process_handle, workers
from qwen_vl_streaming.serve.model_loop import ModelLoop
from qwen_vl_streaming.serve.process_handle import ProcessHandle
from qwen_vl_streaming.serve.record_copy import RecordCopy
from qwen_vl_streaming.serve.workers import Device, Worker
from qwen_vl_streaming.sessions.session_log import SessionLog
from served import drive
from waiting import SECONDS, until


class Process:
    """A process that only holds its end of the pipe. Two threads may kill it at once; `close` may not run in two."""

    def __init__(self, pipe):
        self.pipe, self.lock = pipe, threading.Lock()

    def kill(self):
        with self.lock:
            self.pipe.close()

    def join(self, *_):
        pass


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    found = []

    def start(spec):
        connection, theirs = multiprocessing.Pipe()
        found.append(Process(theirs))
        return ProcessHandle(spec.name, connection, None, found[-1])

    monkeypatch.setattr(ProcessHandle, "start", start)
    monkeypatch.setattr(workers, "PAUSE", 0)
    return found


def make(device: Device | None = None) -> Worker:
    return Worker(SimpleNamespace(name="group"), device or Device())


def until_lost(worker: Worker, seconds: float = SECONDS) -> None:
    """Run `worker`, which is not started again, until the event loop has learned that it is lost."""

    async def run():
        worker.listen(asyncio.get_running_loop())
        while not (worker.lost and worker.given_up):
            await asyncio.sleep(0.01)

    drive(run, seconds)


@pytest.fixture
def no_restart(monkeypatch):
    """A lost model is given up at once. Set before anything is sent: threads read it."""
    monkeypatch.setattr(workers, "RESTARTS", 0)


@pytest.mark.usefixtures("no_restart")
def test_a_message_that_cannot_be_sent_loses_the_model(started, caplog):
    worker = make()

    def fail(_):
        raise RuntimeError("CUDA error")

    worker.process.pixels = SimpleNamespace(write=fail)
    worker.send("clip", "key", SimpleNamespace(halves=[]), 0.0, False)
    until_lost(worker)
    assert "a message could not be sent" in caplog.text and "CUDA error" in caplog.text


@pytest.mark.usefixtures("no_restart")
def test_a_message_that_cannot_be_handled_loses_the_model(started, caplog):
    worker = make()
    started[0].pipe.send(("step", [("nobody", None)]))
    until_lost(worker)
    assert "what it says could not be handled" in caplog.text


@pytest.mark.parametrize("path", ["x" * 300, "fine"])
def test_a_copy_that_cannot_be_written_is_logged(path, tmp_path, caplog):
    """The first path is too long, and there is nothing to write."""
    assert not RecordCopy(tmp_path / path, None).write("failed")
    assert path in caplog.text


@pytest.mark.usefixtures("no_restart")
def test_a_copy_that_cannot_be_written_harms_no_other(started, tmp_path):
    worker, ended = make(), []
    for key in ("one", "other"):
        worker.copies[key] = RecordCopy(tmp_path / ("x" * 300), None)
        worker.listeners[key] = SimpleNamespace(done=lambda *how: ended.append(how)), 1
    started[0].kill()
    until_lost(worker)
    assert ended == [("lost", None, False)] * 2


def test_a_connection_that_is_closed_while_it_sends_is_no_error(caplog):
    killed = []

    def send(_):
        raise TypeError("'NoneType' object cannot be interpreted as an integer")

    process = SimpleNamespace(kill=lambda: killed.append(True))
    handle = ProcessHandle("group", SimpleNamespace(closed=True, send=send), None, process)
    handle.end()
    handle.hashing.start()
    handle._sender(handle._send_all)
    assert not killed and not caplog.records


def test_a_clip_is_sent_at_once_unless_it_would_wait_or_overtake():
    ours, theirs = multiprocessing.Pipe()
    pixels = SimpleNamespace(any_free=True, write=lambda halves: (halves[0], (1, 1)))
    handle = ProcessHandle("group", ours, pixels, None)
    clips = [SimpleNamespace(halves=[number], hash=f"{number}") for number in range(5)]
    handle.hashing.start()

    def send(number: int) -> bool:
        """Whether it is sent at once: no other thread sends clips yet."""
        waiting = handle.outbox.qsize()
        handle.send_clip("key", clips[number], number)
        return handle.outbox.qsize() == waiting

    assert send(0)
    with handle.sending_clip:
        assert not send(1)
    assert not send(2)  # one waits
    sender = threading.Thread(target=handle._sender, args=(handle._send_all,), daemon=True)
    sender.start()
    handle.outbox.join()
    pixels.any_free = False
    handle.send_clip("key", clips[3], 3)
    handle.outbox.join()
    pixels.any_free = True
    handle.send_clip("key", clips[4], 4)
    handle.end()
    sender.join(SECONDS)
    said = [*iter(theirs.recv, None)]
    assert [each[2] for each in said if each[0] == "clip"] == [*range(5)]
    assert [each[1] for each in said if each[0] == "hash"] == [f"{number}" for number in range(5)]


def test_the_end_waits_for_the_hash_of_a_clip_that_another_thread_is_sending():
    """Without it, the record of its session would have no hashes."""
    ours, theirs = multiprocessing.Pipe()
    writing, go_on = threading.Event(), threading.Event()

    def write(halves):
        writing.set()
        assert go_on.wait(SECONDS)
        return 0, (1, 1)

    handle = ProcessHandle("group", ours, SimpleNamespace(any_free=True, write=write), None)
    clip = SimpleNamespace(halves=[0], hash="0")
    sends = threading.Thread(target=handle.send_clip, args=("key", clip), daemon=True)
    sends.start()
    assert writing.wait(SECONDS)
    handle.hashing.start()
    ends = threading.Thread(target=handle._sender, args=(handle._send_all,), daemon=True)
    handle.end()
    ends.start()
    ends.join(0.2)
    assert ends.is_alive()
    go_on.set()
    ends.join(SECONDS)
    assert [each[0] for each in iter(theirs.recv, None)] == ["clip", "hash"]
    handle.send_clip("key", clip)
    assert handle.outbox.qsize() == 1  # no longer sent


def test_a_model_reads_nothing_after_the_end():
    """When its pipe is closed, another may be given the number of its file."""
    ours, theirs = multiprocessing.Pipe()
    for message in (None, "unread"):
        ours.send(message)
    ours.close()
    loop = ModelLoop(theirs, None, SimpleNamespace(name="group", device="cpu"), None)
    loop._read()
    assert loop.inbox.get_nowait() is None and theirs.recv() == "unread"


def test_the_hash_of_a_clip_comes_after_it_and_the_record_waits_for_it(tmp_path):
    """The model need not wait for it. If the server is killed in between, nothing waits for ever."""
    ours, theirs = multiprocessing.Pipe()
    pixels = SimpleNamespace(read=lambda *_: torch.zeros(1, 1), release=lambda _: None)
    loop = ModelLoop(theirs, pixels, SimpleNamespace(name="group", device="cpu"), None)
    reading = threading.Thread(target=loop._read, daemon=True)
    reading.start()
    log = SessionLog(tmp_path / "r.json", None, time.monotonic)
    for number in range(3):
        ours.send(("clip", "key", 0, (1, 1), 0.0, False))
        kind, key, clip, known_hash, received, *rest = loop.inbox.get(timeout=SECONDS)
        assert (kind, key, rest) == ("clip", "key", [0.0, False]) and abs(received - now()) < SECONDS
        log.arrive(clip, known_hash)
        assert not known_hash.done() and log.known_hashes == [f"{each}" for each in range(number)]
        if number < 2:
            threading.Timer(0.05, ours.send, [("hash", f"{number}")]).start()
            assert log.hashes == [f"{each}" for each in range(number + 1)]
    ours.close()
    assert loop.inbox.get(timeout=SECONDS) is None
    assert log.hashes == [] and len(log.arrived) == 3
    reading.join(SECONDS)
    theirs.close()


def test_no_process_starts_when_the_server_ends_in_the_pause(started, monkeypatch):
    worker = make()
    monkeypatch.setattr(workers.time, "sleep", lambda _: worker.close())
    restart = threading.Thread(target=worker._restart, daemon=True)
    restart.start()
    restart.join(SECONDS)
    assert not restart.is_alive() and len(started) == 1 and not worker.device.without_pool


def test_a_process_that_starts_when_the_server_ends_is_killed(started, monkeypatch):
    worker, start = make(), ProcessHandle.start

    def start_and_end(spec):
        worker.close()
        return start(spec)

    monkeypatch.setattr(ProcessHandle, "start", start_and_end)
    threading.Thread(target=worker._restart, daemon=True).start()
    until(lambda: len(started) == 2 and started[1].pipe.closed)


def test_a_restart_that_fails_in_an_unexpected_way_is_given_up(started, monkeypatch, caplog):
    worker = make()

    def fail(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ProcessHandle, "start", fail)
    assert worker._restart() is None
    assert caplog.text.count("can't start new thread") >= workers.RESTARTS and not worker.device.without_pool


def test_a_process_that_cannot_start_leaves_no_file_open(monkeypatch):
    def fail():
        raise OSError("Cannot allocate memory")

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=lambda **_: SimpleNamespace(start=fail))
    monkeypatch.setattr(process_handle.multiprocessing, "get_context", lambda _: context)
    gc.collect()
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(OSError, match="allocate"):
            ProcessHandle.start(SimpleNamespace(clip_bytes=4096, dtype=torch.float32))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_models_that_restart_together_share_the_memory(monkeypatch):
    """Each is told how many of its device are still to make their pools."""
    told, both = queue.SimpleQueue(), threading.Barrier(2)

    def serve(pipe):
        pipe.send(("loaded",))
        told.put(pipe.recv())
        pipe.send(("ready", 1, 1))

    def start(spec):
        connection, theirs = multiprocessing.Pipe()
        if device.without_pool == {*together}:
            both.wait(SECONDS)
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()
        return ProcessHandle(spec.name, connection, None, None)

    monkeypatch.setattr(ProcessHandle, "start", start)
    monkeypatch.setattr(workers, "PAUSE", 0.05)
    together, device = [], Device()
    one, other = make(device), make(device)
    for worker in (one, other):
        worker.newest.expect("loaded")
        worker.make_pool()
    assert [told.get(), told.get()] == [2, 1]
    together += one, other
    restarts = [threading.Thread(target=worker._restart) for worker in together]
    for restart in restarts:
        restart.start()
    for restart in restarts:
        restart.join(SECONDS)
    assert [told.get(), told.get()] == [2, 1]
    one._restart()
    assert told.get() == 1 and not device.without_pool


@pytest.mark.usefixtures("no_restart")
def test_a_process_that_says_nothing_for_too_long_is_killed(started, monkeypatch, caplog, tmp_path):
    """One that only says that it is alive is not."""
    monkeypatch.setattr(process_handle, "SILENT_SECONDS", 2)
    worker, ended = make(), []
    worker.listeners["key"] = SimpleNamespace(done=lambda *how: ended.append(how)), 1
    (process,), begun = started, time.monotonic()

    def beat():
        for _ in range(6):
            process.pipe.send(model_loop.ALIVE)
            time.sleep(0.5)

    threading.Thread(target=beat, daemon=True).start()
    until_lost(worker)
    assert ended == [("lost", None, False)] and process.pipe.closed and time.monotonic() - begun > 4
    assert "model group has said nothing for 2 s: its process hangs and is killed" in caplog.text


def test_a_process_that_does_not_start_in_time_is_not_waited_for():
    connection, _theirs = multiprocessing.Pipe()
    with pytest.raises(InputError, match=r"group has not started within 0\.1 s"):
        ProcessHandle("group", connection, None, None).expect("loaded", 0.1)


@pytest.mark.parametrize("hanging", [None, "step", "read"])
def test_a_process_says_that_it_is_alive_while_its_threads_get_on(hanging, monkeypatch):
    """Steps that are slow are not steps that hang."""
    monkeypatch.setattr(model_loop, "BEAT", 0.01)
    monkeypatch.setattr(model_loop, "STEP_SECONDS", 0.3)
    ours, theirs = multiprocessing.Pipe()
    released = threading.Event()

    def step():
        released.wait(SECONDS if hanging == "step" else 0.1)
        return []

    def read(*_):
        released.wait(SECONDS if hanging == "read" else 0.1)

    spec = SimpleNamespace(name="group", device="cpu", dtype=None)
    pool = SimpleNamespace(idle=False, step=step)
    loop = ModelLoop(theirs, SimpleNamespace(read=read, release=lambda _: None), spec, pool)
    running = threading.Thread(target=loop.run, daemon=True)
    running.start()
    ours.send(("clip", "gone", 0, (1, 1), 0.0, False))
    silent, end = False, time.monotonic() + (5 if hanging else 1)
    while not silent and time.monotonic() < end:
        # In short waits: the one in which this process is paused counts once.
        if not (silent := not any(ours.poll(0.1) for _ in range(10))):
            assert ours.recv() == model_loop.ALIVE
    assert silent == bool(hanging)
    released.set()
    assert ours.poll(5)  # it gets on, and says so
    ours.send(None)
    running.join(5)
    assert not running.is_alive()


def test_the_records_of_a_process_that_hangs_are_written_before_the_server_ends(started):
    worker, kills, written = make(), [], []

    def kill():  # by two threads, of which the first ends the process
        kills.append(True)
        if len(kills) == 1:
            started[0].pipe.close()

    worker.copies["key"] = SimpleNamespace(write=lambda reason: time.sleep(0.2) or written.append(reason))
    worker.process.process = SimpleNamespace(is_alive=lambda: True, join=lambda *_: None, kill=kill)

    async def run():
        worker.listen(asyncio.get_running_loop())
        worker.close()

    drive(run)
    worker.join()
    assert written == ["failed: the process of model group was lost"]
