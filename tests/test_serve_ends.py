"""How the server ends and what it survives: signals, lost processes, out of memory, bad commands, random clients."""

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.serve import cli
from qwen_vl_streaming.serve.catalog import load_catalog
from qwen_vl_streaming.serve.options import TOKEN_VARIABLE, bind, parse
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


def test_a_killed_model_and_then_sigterm(command):
    """The viewers of the killed model learn it, others go on; SIGTERM ends each session with its record."""
    process, address, folder = command
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    _, second = map(int, children.stdout.split())
    health = address.replace("ws://", "http://").replace("v1/realtime", "health")

    async def run():
        async with Talk(connect(address)) as one, Talk(connect(address)) as other, Talk(connect(address)) as idle:
            keys = {name: await begun(viewer, name) for viewer, name in ((one, "group"), (other, "second"))}
            os.kill(second, signal.SIGKILL)
            done = (await other.until("response.done"))["response"]
            assert (done["id"], done["status"], done["record_id"]) == (keys["second"], "failed", None)
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(health)
            await other.begin(models=["second"])
            assert (await other.until("error"))["error"]["code"] == "failed"
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            for viewer in (one, other, idle):
                assert await viewer.closed() == 1001
                assert gather(viewer.events)["error"][-1]["error"]["code"] == "server_stopping"
            assert gather(one.events)["response.done"][0]["response"]["status"] == "cancelled"
            status = await asyncio.to_thread(process.wait, SECONDS)
            return keys["group"], status, time.monotonic() - began

    key, status, seconds = drive(run)
    assert (status, (folder / "stderr").read_text()) == (0, "model second is lost\n") and seconds < 8
    (path,) = (folder / "records").glob(f"*-{key}.json")
    record = read_record(path)
    assert record.end == "cancelled" and len(record.tokens) >= 2


def test_a_server_without_models_ends(flags, caplog):
    with running(flags) as server:
        server.server.workers[0].lost = True
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
