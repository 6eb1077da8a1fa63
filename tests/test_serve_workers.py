"""The server's side of a model process: errors in its threads, the end during a restart, shares of memory. Without
models."""

import asyncio
import gc
import multiprocessing
import os
import queue
import threading
from types import SimpleNamespace

import pytest
from qwen_vl_streaming.serve import workers
from qwen_vl_streaming.serve.model_process import ModelLoop
from qwen_vl_streaming.serve.record_copy import RecordCopy
from qwen_vl_streaming.serve.workers import Device, Worker
from served import drive
from waiting import SECONDS, until


class Process:
    """A process that only holds its end of the pipe."""

    def __init__(self, pipe):
        self.pipe = pipe

    def kill(self):
        self.pipe.close()

    def join(self, *_):
        pass


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    found = []

    def start(worker):
        worker.connection, theirs = multiprocessing.Pipe()
        worker.process, worker.pixels = Process(theirs), None
        found.append(worker.process)

    monkeypatch.setattr(Worker, "_start", start)
    monkeypatch.setattr(workers, "PAUSE", 0)
    return found


def make(device: Device | None = None) -> Worker:
    return Worker(SimpleNamespace(name="group"), device=device)


def until_lost(worker: Worker) -> None:
    """Run `worker`, which is not started again, until the event loop has learned that it is lost."""
    worker.threads = True

    async def run():
        worker.listen(asyncio.get_running_loop())
        while not (worker.lost and worker.given_up):
            await asyncio.sleep(0.01)

    drive(run)


def test_a_message_that_cannot_be_sent_loses_the_model(started, caplog):
    worker = make()

    def fail(_):
        raise RuntimeError("CUDA error")

    worker.pixels = SimpleNamespace(write=fail)
    worker.send("clip", "key", SimpleNamespace(pixels=None), 0.0, False)
    until_lost(worker)
    assert "a message could not be sent" in caplog.text and "CUDA error" in caplog.text


def test_a_message_that_cannot_be_handled_loses_the_model(started, caplog):
    worker = make()
    started[0].pipe.send(("step", [("nobody", 1, 1, 0.0)], []))
    until_lost(worker)
    assert "what it says could not be handled" in caplog.text


@pytest.mark.parametrize("path", ["x" * 300, "fine"])
def test_a_copy_that_cannot_be_written_is_logged(path, tmp_path, caplog):
    """The first path is too long, and there is nothing to write."""
    assert not RecordCopy(tmp_path / path, None).write("failed")
    assert path in caplog.text


def test_a_copy_that_cannot_be_written_harms_no_other(started, tmp_path):
    worker, ended = make(), []
    for key in ("one", "other"):
        worker.copies[key] = RecordCopy(tmp_path / ("x" * 300), None)
        worker.listeners[key] = SimpleNamespace(done=lambda *how: ended.append(how)), 1
    started[0].pipe.close()
    until_lost(worker)
    assert ended == [("lost", None, False)] * 2


def test_a_connection_that_is_closed_while_it_sends_is_no_error(started, caplog):
    worker, killed = make(), []

    def send(_):
        raise TypeError("'NoneType' object cannot be interpreted as an integer")

    connection = SimpleNamespace(closed=True, send=send)
    worker.outbox.put(None)
    worker._send_all(connection, None, SimpleNamespace(kill=lambda: killed.append(True)), worker.outbox)
    assert not killed and not caplog.records


def test_a_model_reads_nothing_after_the_end():
    """When its pipe is closed, another may be given the number of its file."""
    ours, theirs = multiprocessing.Pipe()
    for message in (None, "unread"):
        ours.send(message)
    ours.close()
    loop = ModelLoop(theirs, None, SimpleNamespace(name="group", device="cpu"), None)
    loop._read()
    assert loop.inbox.get_nowait() is None and theirs.recv() == "unread"


def test_no_process_starts_when_the_server_ends_in_the_pause(started, monkeypatch):
    worker = make()
    monkeypatch.setattr(workers.time, "sleep", lambda _: worker.close())
    restart = threading.Thread(target=worker._restart, daemon=True)
    restart.start()
    restart.join(SECONDS)
    assert not restart.is_alive() and len(started) == 1 and not worker.device.without_pool


def test_a_process_that_starts_when_the_server_ends_is_killed(started, monkeypatch):
    worker, start = make(), Worker._start

    def start_and_end(worker):
        worker.close()
        start(worker)

    monkeypatch.setattr(Worker, "_start", start_and_end)
    threading.Thread(target=worker._restart, daemon=True).start()
    until(lambda: len(started) == 2 and started[1].pipe.closed)


def test_a_restart_that_fails_in_an_unexpected_way_is_given_up(started, monkeypatch, caplog):
    worker = make()

    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Worker, "_start", fail)
    assert worker._restart() is None
    assert caplog.text.count("can't start new thread") >= workers.RESTARTS and not worker.device.without_pool


def test_a_process_that_cannot_start_leaves_no_file_open(monkeypatch):
    def fail():
        raise OSError("Cannot allocate memory")

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=lambda **_: SimpleNamespace(start=fail))
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: context)
    gc.collect()
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(OSError, match="allocate"):
            Worker(SimpleNamespace(clip_bytes=4096))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_models_that_restart_together_share_the_memory(monkeypatch):
    """Each is told how many of its device are still to make their pools."""
    told, both = queue.SimpleQueue(), threading.Barrier(2)

    def serve(pipe):
        pipe.send(("loaded",))
        told.put(pipe.recv())
        pipe.send(("ready", 1, 1))

    def start(worker):
        worker.connection, theirs = multiprocessing.Pipe()
        if worker.device.without_pool == {*together}:
            both.wait(SECONDS)
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()

    monkeypatch.setattr(Worker, "_start", start)
    monkeypatch.setattr(workers, "PAUSE", 0.05)
    together, device = [], Device()
    one, other = make(device), make(device)
    for worker in (one, other):
        worker.expect("loaded")
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
