"""How the server ends and what it survives: signals, lost processes, out of memory, bad commands, random clients."""

import asyncio
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.frame_patches import split_frames
from qwen_vl_streaming.model.loading import load_model
from qwen_vl_streaming.model.prompts import clip_pixels, load_processor
from qwen_vl_streaming.replay import replay
from qwen_vl_streaming.serve import cli, process_handle, workers
from qwen_vl_streaming.serve.admission import Admission, Ticket
from qwen_vl_streaming.serve.catalog import load_catalog
from qwen_vl_streaming.serve.frames import decode_picture
from qwen_vl_streaming.serve.options import TOKEN_VARIABLE, bind, parse
from qwen_vl_streaming.serve.pixel_buffers import PixelBuffers
from qwen_vl_streaming.serve.process_handle import ProcessHandle
from qwen_vl_streaming.serve.workers import Device, Worker
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.session_pool import SessionPool
from served import (
    SECONDS,
    drive,
    gather,
    running,
    settled,
    trained,
    without_weights,
)
from serving_clients import Talk, picture_bytes, random_client
from waiting import until
from websockets.asyncio.client import connect


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    return trained(made[0], tmp_path_factory.mktemp("model") / "group", "group")


@pytest.fixture
def flags(checkpoint, tmp_path):
    return ["--model", str(checkpoint), "--records", str(tmp_path / "records"), "--sessions-per-client", "99"]


async def begun(viewer: Talk, model: str = "group", frames: int = 3) -> str:
    """Begin a session that goes on; returns the id of its response."""
    await viewer.begin(models=[model])
    return await spoken(viewer, frames)


async def spoken(viewer: Talk, frames: int = 3) -> str:
    """Wait for the session and show it something, until it has written tokens; returns the id of its response."""
    key = (await viewer.until("response.created"))["response"]["id"]
    for number in range(frames):
        await viewer.frame(number / 2)
    await viewer.until("response.output_text.delta", 2)
    return key


# The real command


@pytest.fixture
def command(flags, checkpoint, tmp_path):
    """A server as users start it, with two models: processes, and the address that it prints."""
    flags = [*flags, "--model", f"second={checkpoint}", "--port", "0", "--device", "cpu"]
    program = [sys.executable, "-m", "qwen_vl_streaming.serve", *flags]
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"open http://(\S+)/", line):
                break
        assert found, (tmp_path / "stderr").read_text()
        yield process, f"ws://{found[1]}/v1/realtime", tmp_path
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_model_starts_again_and_then_sigterm(command, checkpoint):
    """The sessions of the killed model end with their records, those that wait go on when it runs again, and others are
    not disturbed; SIGTERM ends each session with its record."""
    process, address, folder = command
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    _, second = map(int, children.stdout.split())
    health = address.replace("ws://", "http://").replace("v1/realtime", "health")

    def condition() -> str:
        try:
            return json.loads(urllib.request.urlopen(health).read())["status"]
        except urllib.error.HTTPError as error:
            return f"{error.code} {json.loads(error.read())['status']}"

    async def run():
        async with Talk(connect(address)) as one, Talk(connect(address)) as other:
            keys = {name: await begun(viewer, name) for viewer, name in ((one, "group"), (other, "second"))}
            os.kill(second, signal.SIGKILL)
            assert "second was lost: this session has ended" in (await other.until("error"))["error"]["message"]
            done = (await other.until("response.done"))["response"]
            assert (done["id"], done["status"], done["record_id"]) == (keys["second"], "failed", keys["second"])
            assert condition() == "503 a model is starting again"
            await other.begin(models=["second"])
            assert (await other.until("session.queued"))["place"] == 1
            for number in itertools.count(3):  # the other model's session goes on
                await one.frame(number / 2)
                await one.until("input_video_frame.acknowledged")
                await asyncio.sleep(0.5)
                if condition() == "ok":
                    break
            keys["again"] = await spoken(other)
            idle = await Talk(connect(address)).__aenter__()
            process.send_signal(signal.SIGTERM)
            for viewer in (one, other, idle):
                assert await viewer.closed() == 1001
                assert gather(viewer.events)["error"][-1]["error"]["code"] == "server_stopping"
            assert gather(one.events)["response.done"][0]["response"]["status"] == "cancelled"
            status = await asyncio.to_thread(process.wait, SECONDS)
            return keys, other.events, status

    keys, other, status = drive(run, 5 * SECONDS)
    said = ["model second is lost", "model second is started again", "model second runs again"]
    assert (status, (folder / "stderr").read_text().splitlines()) == (0, said)
    ends = {"group": "cancelled", "again": "cancelled", "second": "failed: the process of model second was lost"}
    for name, key in keys.items():
        (path,) = (folder / "records").glob(f"*-{key}.json")
        record = read_record(path)
        assert record.end == ends[name] and len(record.tokens) >= 2 and len(record.hashes) >= 1
        if name == "second":
            frame = gather(other)["session.updated"][0]["session"]["frame"]
            picture = decode_picture(picture_bytes(), "jpeg", 10**6, (frame["height"], frame["width"]))
            clip = clip_pixels(load_processor(checkpoint), torch.from_numpy(np.stack([picture] * 2)))[0][0]
            model = load_model(str(checkpoint), "sdpa", torch.float32).eval()
            assert all(each.tie for each in replay(record, model, [clip] * len(record.hashes)))


def test_a_model_that_hangs_starts_again(flags, monkeypatch):
    """Alive, but stopped: its session ends with its record, and another process is started."""
    monkeypatch.setattr(process_handle, "SILENT_SECONDS", 5)
    with running(flags, threads=False) as server:
        (worker,) = server.server.workers
        stopped = worker.process.process

        async def run():
            async with Talk(server.connect()) as viewer:
                key = await begun(viewer)
                os.kill(stopped.pid, signal.SIGSTOP)
                assert "group was lost: this session has ended" in (await viewer.until("error"))["error"]["message"]
                done = (await viewer.until("response.done"))["response"]
                assert (done["status"], done["record_id"]) == ("failed", key)
                while worker.newest.process is stopped:
                    await asyncio.sleep(0.1)
                return key

        record = read_record(server.record(drive(run)))
        assert record.end == "failed: the process of model group was lost" and len(record.tokens) >= 2
        assert stopped.exitcode == -signal.SIGKILL
    worker.join()


def test_a_model_that_is_lost_too_often_is_not_started_again(monkeypatch, caplog):
    """Its sessions end, and those that wait are refused."""
    starts, ended = [], []

    class Process:
        kill = join = is_alive = lambda self, *_: None

    def start(spec):
        starts.append(spec)
        connection, theirs = multiprocessing.Pipe()
        if len(starts) in (2, 3):  # it is lost once more, and then does not load
            for message in (("loaded",), ("ready", 1, 1)):
                theirs.send(message)
        theirs.close()
        return ProcessHandle(spec.name, connection, None, Process())

    monkeypatch.setattr(ProcessHandle, "start", start)
    monkeypatch.setattr(workers, "PAUSE", 0)
    worker = Worker(SimpleNamespace(name="group"), Device())
    admission = Admission([worker], 9)
    admission.queue.append(Ticket({"group": 5}, ended.append, lambda _: None))

    async def run():
        worker.listen(asyncio.get_running_loop())
        while not worker.given_up:
            await asyncio.sleep(0.01)

    drive(run)
    assert len(starts) == 1 + workers.RESTARTS and ended == [None]
    assert "model group was lost 4 times within 10 minutes, and is not started again" in caplog.text


def test_clips_cross_in_a_few_buffers_of_memory_that_has_no_name():
    """When none is free the writer waits; when the reader has ended it learns that, and the memory is freed."""
    gc.collect()
    before = Path("/proc/self/maps").read_text().count("memfd:clips")  # of other tests
    writer = PixelBuffers(24, torch.bfloat16, count=2)
    assert Path("/proc/self/maps").read_text().count("memfd:clips") > before
    reader = pickle.loads(ForkingPickler.dumps(writer))
    writer.handed_over()
    clips = [torch.rand(2, 6) + number for number in range(3)]
    numbers = [writer.write(split_frames(clip, torch.bfloat16))[0] for clip in clips[:2]]
    late = threading.Thread(
        target=lambda write=writer.write: numbers.append(write(split_frames(clips[2], torch.bfloat16))[0])
    )
    late.start()
    late.join(0.1)
    assert late.is_alive()
    found = [reader.read(numbers[0], (2, 6), pinned=False)]
    late.join(0.1)
    assert late.is_alive()
    reader.release(numbers[0])
    late.join(SECONDS)
    found += [reader.read(number, (2, 6), pinned=False) for number in numbers[1:]]
    for number in numbers[1:]:
        reader.release(number)
    assert [*map(torch.equal, found, (clip.to(torch.bfloat16) for clip in clips))] == [True] * 3
    reader.free.close()
    with pytest.raises(EOFError):
        for _ in range(3):
            writer.write(split_frames(clips[0], torch.bfloat16))
    del reader, writer, late
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("memfd:clips") <= before


def test_a_server_without_models_ends(flags, caplog):
    with running(flags) as server:
        server.server.workers[0].given_up = True
        assert asyncio.run(cli.serve(server.server, bind("127.0.0.1", 0))) == 1
    assert "all models are lost: the server ends" in caplog.text


# What goes wrong inside


def test_out_of_memory_ends_only_the_session_that_does_not_fit(flags, monkeypatch):
    with running(flags) as server:
        encode = server.pools[0].runner.vision_encoder.encode

        def no_room(clips, layouts):
            if any(float(clip.max()) > 2 for clip in clips):  # white pictures
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return encode(clips, layouts)

        monkeypatch.setattr(server.pools[0].runner.vision_encoder, "encode", no_room)

        async def run():
            async with Talk(server.connect()) as good, Talk(server.connect()) as bad:
                await begun(good)
                await bad.begin()
                for number in range(2):
                    await bad.frame(number / 2, picture_bytes(white=True))
                assert (await bad.until("error"))["error"]["code"] == "out_of_memory"
                done = (await bad.until("response.done"))["response"]
                assert done["status"] == "failed"
                await good.frame(1.5)
                await good.say("input_video.end")
                assert (await good.until("response.done"))["response"]["status"] == "completed"

        drive(run)
        settled(server)


def test_a_failed_step_ends_the_sessions_and_the_next_ones_run(flags, monkeypatch):
    with running(flags) as server:
        step, failed = SessionPool.step, []

        def fails_once(pool):
            if pool.sessions and not failed:
                failed.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(pool)

        async def run():
            async with Talk(server.connect()) as viewer:
                await viewer.begin()
                await viewer.until("session.updated")
                monkeypatch.setattr(SessionPool, "step", fails_once)
                await viewer.frame(0)
                await viewer.frame(0.5)
                assert (await viewer.until("error"))["error"]["code"] == "out_of_memory"
                await viewer.until("response.done")
                await begun(viewer)
                await viewer.say("response.cancel")
                assert (await viewer.until("response.done"))["response"]["status"] == "cancelled"

        drive(run)
        settled(server)


def test_a_clip_that_cannot_be_read_loses_the_model(flags, monkeypatch, caplog):
    """Its sessions end with their records; before, it stood still for good."""

    def fails(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    with running(flags) as server:

        async def run():
            async with Talk(server.connect()) as viewer:
                key = await begun(viewer)
                monkeypatch.setattr(PixelBuffers, "read", fails)
                for number in range(3, 5):
                    await viewer.frame(number / 2)
                assert (await viewer.until("error"))["error"]["code"] == "failed"
                done = (await viewer.until("response.done"))["response"]
                return key, done["status"], done["record_id"]

        key, status, recorded = drive(run)
        assert (status, recorded) == ("failed", key) and "unspecified" in read_record(server.record(key)).end
        until(lambda: server.server.workers[0].given_up)
        assert server.server.condition == "a model is lost" and "a message could not be read" in caplog.text


def test_a_record_that_cannot_be_written_harms_nobody(flags, tmp_path):
    with running(flags) as server:

        async def run():
            async with Talk(server.connect()) as viewer:
                await begun(viewer)
                server.server.settings.records.rename(tmp_path / "moved")
                server.server.settings.records.touch()
                await viewer.say("response.cancel")
                error = (await viewer.until("error"))["error"]
                assert str(tmp_path) not in error["message"]
                done = (await viewer.until("response.done"))["response"]
                assert (done["status"], done["record_id"]) == ("failed", None)

        if not server.server.settings.records.exists():
            server.server.settings.records.mkdir(parents=True)
        drive(run)
        settled(server)


def test_a_model_that_cannot_keep_up_ends_too_slow(flags, monkeypatch):
    with running(flags, clips_waiting=2, messages_per_second=500) as server:
        monkeypatch.setattr(SessionPool, "step", lambda pool: time.sleep(0.01) or [])

        async def run():
            async with Talk(server.connect()) as viewer:
                await viewer.begin()
                await viewer.until("session.updated")
                for number in range(8):
                    await viewer.frame(number / 2)
                return (await viewer.until("response.done"))["response"]["status"]

        assert drive(run) == "too_slow"


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: --model"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--model", "MODEL", "--host", "0.0.0.0"], f"set {TOKEN_VARIABLE}"),
        (["--model", "MODEL", "--port", "70000"], "--port 70000 must be from 0 to 65535"),
        (["--model", "MODEL", "--model", "MODEL"], "two models are called group"),
        (["--model", "MODEL", "--model", "other=OTHER"], "models group and other take frames of different sizes"),
        (["--model", "a=MODEL", "--model", "a=MODEL"], "--model a=… is given twice"),
        (["--model", "MODEL", "--source", "cam"], "--source cam has no name"),
        (["--model", "MODEL", "--source", "cam=no.mp4"], "no.mp4 does not exist"),
        (["--model", "MODEL", "--source", "cam=foo://me:pa55-w0rd@x"], "foo://me:***@x is not a stream"),
        (["--model", "MODEL", "--window", "0", "5"], "--window 0 5 must be"),
        (["--model", "MODEL", "--origin", "https://x/y"], "is not an origin"),
        (["--model", "MODEL", "--device", "cpu,cpu"], "names a device twice"),
        (["--model", "MODEL", "--sessions", "0"], "--sessions 0 must be from 1"),
    ],
)
def test_mistakes_in_the_command(checkpoint, made, arguments, message, capsys):
    words = {"MODEL": str(checkpoint), "other=OTHER": f"other={made[0]}", "a=MODEL": f"a={checkpoint}"}
    arguments = [words.get(word, word) for word in arguments]
    with pytest.raises((InputError, SystemExit)) as ended:
        load_catalog(parse("", {}, arguments))
    said = str(ended.value) if isinstance(ended.value, InputError) else capsys.readouterr().err
    assert message in said and "pa55" not in said and said.strip().count("\n") == 0


def test_without_the_servers_packages_it_says_which(tmp_path):
    blocked = "import sys, runpy; sys.modules['uvicorn'] = None\nimport importlib.util as u; find = u.find_spec\n"
    blocked += "u.find_spec = lambda name, *more: None if name == 'uvicorn' else find(name, *more)\n"
    blocked += "runpy.run_module('qwen_vl_streaming.serve', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "needs uvicorn: pip install 'qwen-vl-streaming[serve]'" in done.stderr


@pytest.mark.parametrize("token", ["short", "with a space in it", "ümlaut-ümlaut-ümlaut"])
def test_tokens_that_browsers_cannot_send(checkpoint, token):
    with pytest.raises(InputError, match="16 to 200 letters") as refused:
        parse("", {TOKEN_VARIABLE: token}, ["--model", str(checkpoint)])
    assert token not in str(refused.value)


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} cannot be opened .*in use"):
            bind("127.0.0.1", port)
        with pytest.raises(InputError, match=r"--host no\.such"):
            bind("no.such.host.invalid", 0)


def test_a_model_that_does_not_load(checkpoint, tmp_path):
    """Its config is fine, but its weights are not there."""
    with (
        pytest.raises(InputError, match="safetensors"),
        running(["--model", str(without_weights(checkpoint, tmp_path / "empty")), "--records", str(tmp_path)]),
    ):
        pass


# Many at once


def test_random_clients_leave_nothing_behind(flags):
    seed = time.time_ns() % 100_000
    print("seed", seed)
    with running([*flags, "--sessions", "4"], messages_per_second=500) as server:

        async def run():
            clients = [random_client(server.connect(), random.Random(f"{seed} {number}")) for number in range(12)]
            return await asyncio.gather(*clients)

        ends = drive(run)
        settled(server)
        assert "completed" in ends
        for path in server.server.settings.records.glob("*.json"):
            read_record(path)
        running_files = {path.suffix for path in server.server.settings.records.iterdir()}
        assert running_files == {".json"}
