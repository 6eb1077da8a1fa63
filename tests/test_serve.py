"""The server as its clients see it: the protocol, the same tokens as eval.sh, many viewers, ends."""

import asyncio
import contextlib
import json
import struct
import threading
import urllib.error
import urllib.request
import zlib
from dataclasses import replace

import pytest
import torch
from media import make_video
from qwen_vl_streaming.engine.batch import Job, caption_all
from qwen_vl_streaming.model.loading import load_config, load_model
from qwen_vl_streaming.model.prompts import QUESTIONS, clip_pixels, load_processor, make_template
from qwen_vl_streaming.replay import replay, video_clips
from qwen_vl_streaming.serve import connection, own_source
from qwen_vl_streaming.serve.frames import ClipBuilder, Picture
from qwen_vl_streaming.serve.options import TOKEN_VARIABLE
from qwen_vl_streaming.serve.viewer import Viewer
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.timeline.timeline import make_schedule
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.clip_recorder import read_clips
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from served import SECONDS, drive, gather, play, running, settled, token_ids, trained
from serving_clients import Talk, picture_bytes
from websockets.exceptions import ConnectionClosed, InvalidStatus

NAMES = ("group", "interleave", "origin")


@pytest.fixture(scope="module")
def checkpoints(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: trained(made[0], folder / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    models = [flag for name in NAMES for flag in ("--model", f"{name}={checkpoints[name]}")]
    film = make_video(tmp_path_factory.mktemp("own") / "own.mp4", seconds=3, size=(84, 56))
    records = tmp_path_factory.mktemp("records")
    flags = [*models, "--records", str(records), "--source", f"film={film}", "--max-new-tokens", "30"]
    with running([*flags, "--sessions", "3", "--sessions-per-client", "50"]) as server:
        yield server


@pytest.fixture(scope="module")
def strict(checkpoints, tmp_path_factory):
    """A server with narrow limits, for clients that misbehave."""
    flags = ["--model", str(checkpoints["group"]), "--records", str(tmp_path_factory.mktemp("strict"))]
    limits = {"frame_bytes": 20_000, "pixels": 100_000, "mistakes": 10}
    with running([*flags, "--sessions-per-client", "5"], **limits) as server:
        yield server


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", seconds=4.5, size=(168, 112))


def evaluated(checkpoint, film, name: str, schedule: str) -> list[int]:
    """The tokens of the evaluation, in float32."""
    config, processor = load_config(str(checkpoint)), load_processor(checkpoint)
    video = read_video(film, budget=PixelBudget.trained(config))
    pixels, grid = clip_pixels(processor, video.frames)
    template = make_template(processor, QUESTIONS[-1])
    layout = template.layout(grid, config.vision_config.tokens_per_second * video.seconds_per_clip)
    job = Job("film", pixels, layout, template, make_schedule(schedule, VARIANTS[name], video.clips))
    model = load_model(str(checkpoint), "sdpa", torch.float32).eval()
    ((_, caption),) = caption_all(model, VARIANTS[name], iter([job]), batch_size=1, max_new_tokens=30)
    return caption.tokens


def test_png_frames_give_the_tokens_of_the_evaluation_for_three_models_side_by_side(server, checkpoints, film):
    events = play(server.address, film, models=[*NAMES], pace=4)
    (created,) = events["session.created"]
    assert [model["mode"] for model in created["session"]["models"]] == ["fused", "serial", "offline"]
    assert created["session"]["questions"] == [*QUESTIONS] and created["session"]["sources"] == ["film"]
    for name in NAMES:
        assert token_ids(events, name) == evaluated(checkpoints[name], film, name, "wait-3"), name
    done = {event["response"]["model"]: event["response"] for event in events["response.done"]}
    assert {response["status"] for response in done.values()} == {"completed"}
    slots = [event["slot"] for event in events["response.output_text.delta"] if event["model"] == "origin"]
    assert {*slots} == {5}
    for name in NAMES:
        record = read_record(server.record(done[name]["record_id"]))
        assert record.tokens == token_ids(events, name) and record.variant == name
        assert done[name]["figures"]["tokens"] == len(record.tokens) and done[name]["figures"]["clips"] == 5
        text = "".join(e["delta"] for e in events["response.output_text.delta"] if e["model"] == name)
        assert done[name]["text"] == text
        processor = load_processor(checkpoints[name])
        model = load_model(str(checkpoints[name]), "sdpa", torch.float32).eval()
        assert all(each.tie for each in replay(record, model, video_clips(record, processor, film)))


async def whole_session(server, clips=3, **asked) -> Talk:
    """A viewer with a camera that shows `clips` clips of noise."""
    async with Talk(server.connect()) as viewer:
        await viewer.begin(**asked)
        await viewer.until("session.updated")
        for number in range(2 * clips):
            await viewer.frame(number / 2, picture_bytes(seed=number))
        await viewer.say("input_video.end")
        await viewer.until("response.done", len(asked.get("models", "1")))
    return viewer


def test_a_camera_of_unknown_length(server, checkpoints):
    """Its record has the clips that were kept, and replays as the same."""
    viewer = drive(lambda: whole_session(server, models=["group"], question="What moves?", keep=True))
    events = gather(viewer.events)
    done = events["response.done"][0]["response"]
    assert done["status"] == "completed" and done["figures"]["tokens"] == len(token_ids(events, "group")) > 6
    key = done["record_id"]
    data = read_json(f"{server.http}/v1/records/{key}")
    assert data["about"]["question"] == "What moves?" and data["model"]["path"] == "group"
    assert str(server.server.settings.records) not in json.dumps(data)
    kept = urllib.request.urlopen(f"{server.http}/v1/records/{key}/clips").read()
    path = server.server.settings.records / "downloaded"
    path.write_bytes(kept)
    record, processor = read_record(server.record(key)), load_processor(checkpoints["group"])
    clips = video_clips(record, processor, kept=path)
    model = load_model(str(checkpoints["group"]), "sdpa", torch.float32).eval()
    assert len(clips) == 3 and all(each.tie for each in replay(record, model, clips))


@pytest.mark.parametrize("frames", [3, 4])
def test_a_model_that_does_not_end_its_answer_is_ended(server, frames):
    """After the end of a stream, whether its last clip was known as such or not."""

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(models=["group"], schedule="greedy")
            await viewer.until("session.updated")
            for number in range(frames):
                await viewer.frame(number / 2)
            await viewer.say("input_video.end")
            done = await viewer.until("response.done")
            return done["response"]["status"], gather(viewer.events)["response.output_text.delta"][-1]["capture_time"]

    assert drive(run) == ("completed", (frames - 1) / 2)  # that of the last frame, in a clip that it fills alone, too


def test_nothing_is_kept_unasked(server):
    viewer = drive(lambda: whole_session(server, clips=1, models=["group"]))
    key = gather(viewer.events)["response.done"][0]["response"]["record_id"]
    for path in (f"/v1/records/{key}/clips", "/v1/records/..%2f..%2fx", f"/v1/records/{'a' * 16}", "/static/../app.py"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.http + path)
        assert refused.value.code == 404


def test_a_source_of_the_servers_own(server):
    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "server", "name": "film"}, models=["group", "origin"], keep=True)
            await viewer.until("response.done", 2)
            return viewer

    events = gather(drive(run).events)
    assert [event["time"] for event in events["output_video_frame"]] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert [event.get("last") for event in events["output_video_frame"]] == [None] * 5 + [True]
    assert {event["response"]["status"] for event in events["response.done"]} == {"completed"}
    assert "own.mp4" not in json.dumps(events)
    key = events["response.done"][0]["response"]["record_id"]
    assert read_json(f"{server.http}/v1/records/{key}")["about"]["video"]["path"] == "own.mp4"
    kept = read_clips(server.record(key).parent / read_json(f"{server.http}/v1/records/{key}")["about"]["kept"])
    assert len(kept) == 6


def test_with_a_window_a_source_of_the_servers_own_may_have_any_length(server, monkeypatch):
    asked = []

    def open_source(*_, max_clips, **__):
        asked.append(max_clips)
        raise OSError("seen")

    monkeypatch.setattr(own_source, "open_source", open_source)

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "server", "name": "film"}, models=["group"])
            await viewer.until("error")

    drive(run)
    assert asked == [None]


def test_a_viewer_cannot_open_many_sources_of_the_server(server, monkeypatch):
    """However fast it begins and cancels."""
    go = threading.Event()
    monkeypatch.setattr(own_source, "open_source", lambda *_, **__: go.wait(SECONDS))

    async def run():
        async with Talk(server.connect()) as viewer:
            for _ in range(4):
                await viewer.begin(source={"kind": "server", "name": "film"}, models=["group"])
                await viewer.say("response.cancel")
            await viewer.until("error", 2)
            open_threads = [thread for thread in threading.enumerate() if thread.name == "source film"]
            go.set()
            return len(open_threads)

    assert drive(run) == 2
    settled(server)


def read_json(address: str):
    return json.load(urllib.request.urlopen(address))


def test_one_too_many_waits_for_its_turn(server):
    async def run():
        async with contextlib.AsyncExitStack() as stack:
            viewers = [await stack.enter_async_context(Talk(server.connect())) for _ in range(5)]
            for viewer in viewers[:3]:
                await viewer.begin(models=["group"])
                await viewer.until("session.updated")
            await viewers[3].begin(models=["group"])
            assert (await viewers[3].until("session.queued"))["place"] == 1
            await viewers[4].begin(models=["group"])
            assert (await viewers[4].until("session.queued"))["place"] == 2
            await viewers[3].say("response.cancel")
            assert (await viewers[4].until("session.queued"))["place"] == 1
            await viewers[0].socket.close()
            await viewers[4].until("session.updated")
            await viewers[4].frame(0)
            await viewers[4].until("input_video_frame.acknowledged")

    drive(run)
    settled(server)


def test_a_full_queue_refuses(server, monkeypatch):
    monkeypatch.setattr(server.server.admission, "most_waiting", 0)

    async def run():
        async with contextlib.AsyncExitStack() as stack:
            viewers = [await stack.enter_async_context(Talk(server.connect())) for _ in range(4)]
            for viewer in viewers[:3]:
                await viewer.begin(models=["group"])
                await viewer.until("session.updated")
            await viewers[3].begin(models=["group"])
            assert (await viewers[3].until("error"))["error"]["code"] == "queue_full"
            await viewers[3].begin(models=["origin"])
            await viewers[3].until("session.updated")

    drive(run)
    settled(server)


def bomb() -> bytes:
    """A PNG of a kilobyte that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


REFUSED = {
    "text as JPEG": ("not_an_image", {"data": b"no picture, but text"}),
    "half a JPEG": ("not_an_image", {"data": picture_bytes()[:900]}),
    "a PNG that is called a JPEG": ("not_an_image", {"data": picture_bytes(form="png")}),
    "a bomb": ("frame_too_large", {"data": bomb(), "form": "png"}),
    "too many bytes": ("frame_too_large", {"data": bytes(25_000)}),
    "another form": ("invalid_event", {"form": "gif", "data": b"GIF89a"}),
    "no time": ("invalid_event", {"moment": None}),
    "infinite": ("invalid_event", {"moment": 1e300}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_frames_are_refused_and_the_session_goes_on(strict, name):
    code, what = REFUSED[name]

    async def run():
        async with Talk(strict.connect()) as viewer:
            await viewer.begin(source={"kind": "client", "width": 84, "height": 56, "frames": 2}, models=["group"])
            await viewer.until("session.updated")
            await viewer.frame(0)
            await viewer.frame(**{"moment": 0.5, "event_id": "bad", **what})
            error = (await viewer.until("error"))["error"]
            assert (error["code"], error["event_id"]) == (code, "bad")
            await viewer.frame(0.5)
            assert (await viewer.until("response.done"))["response"]["status"] == "completed"

    drive(run)


def test_a_client_that_keeps_sending_rubbish_is_disconnected(strict):
    rubbish = ["no JSON", "[]", "{}", '{"type": "unknown"}', '{"type": "session.update"}', "[" * 5000, b"unasked"]
    more = [{"source": {"kind": "server", "name": "/etc/passwd"}}, {"models": ["x"]}, {"question": "?" * 501}]
    more += [{"schedule": "wait-x"}, {"source": {"kind": "client", "width": 1, "height": 99_999}}]
    rubbish += [json.dumps({"type": "session.update", "session": session}) for session in more]

    async def run():
        async with Talk(strict.connect()) as viewer:
            for message in rubbish[:10]:
                await viewer.socket.send(message)
            assert await viewer.closed() == 1008
            return viewer.events

    events = gather(drive(run))
    assert {event["error"]["code"] for event in events["error"]} == {"invalid_event"} and len(events["error"]) == 10
    settled(strict)


@pytest.mark.parametrize(
    "session, message",
    [
        ({"question": "?" * 501}, "at most 500 characters"),
        ({"schedule": "wait-x"}, "wait-x"),
        ({"models": ["x"]}, "unknown model 'x'"),
        ({"models": [["group"]]}, "list of names"),
        ({"source": {"kind": "server", "name": "/etc/passwd"}}, "one of the server's own"),
        ({"source": {"kind": "client", "width": 1, "height": 99_999}}, "times as long as wide"),
        ({"source": {"kind": "client", "width": 0, "height": 9}}, "width must be an integer from 1"),
        ({"source": {"kind": "client", "width": 84, "height": 56, "frames": 1}}, "frames must be an integer from 2"),
    ],
)
def test_sessions_that_cannot_be(strict, session, message):
    async def run():
        async with Talk(strict.connect()) as viewer:
            await viewer.begin(**session)
            assert message in (await viewer.until("error"))["error"]["message"]

    drive(run)


def test_a_flood_is_disconnected_and_others_go_on(strict):
    async def run():
        async with Talk(strict.connect()) as good, Talk(strict.connect()) as flood:
            for viewer in (good, flood):
                await viewer.begin(models=["group"])
                await viewer.until("session.updated")
            code = asyncio.create_task(flood.closed())
            with contextlib.suppress(ConnectionClosed):
                for number in range(1000):
                    await flood.frame(number / 100)
            assert await code == 1008
            assert gather(flood.events)["error"][-1]["error"]["code"] == "rate_limited"
            for number in range(4):
                await good.frame(number / 2)
            await good.say("input_video.end")
            assert (await good.until("response.done"))["response"]["status"] == "completed"

    drive(run)
    settled(strict)


def test_ten_times_too_many_frames_are_dropped(strict):
    async def run():
        async with Talk(strict.connect()) as viewer:
            await viewer.begin(models=["group"])
            await viewer.until("session.updated")
            for number in range(38):
                await viewer.frame(number / 20)
            newest = await viewer.until("input_video_frame.acknowledged", 38)
            await viewer.say("input_video.end")
            return newest["dropped"], (await viewer.until("response.done"))["response"]["figures"]["clips"]

    assert drive(run) == (34, 2)
    settled(strict)


def test_dropped_frames_are_counted_for_each_session(strict):
    """Those of an earlier session on the same connection are not added."""

    async def run():
        async with Talk(strict.connect()) as viewer:
            dropped = []
            for _ in range(2):
                await viewer.begin(models=["group"])
                await viewer.until("session.updated")
                for moment in (0, 0.1, 0.5):
                    await viewer.frame(moment)
                await viewer.say("input_video.end")
                dropped.append((await viewer.until("response.done"))["response"]["figures"]["dropped"])
            return dropped

    assert drive(run) == [1, 1]
    settled(strict)


def test_a_client_that_vanishes_leaves_a_record(strict):
    async def run():
        viewer = await Talk(strict.connect()).__aenter__()
        await viewer.begin(models=["group"])
        key = (await viewer.until("response.created"))["response"]["id"]
        for number in range(3):
            await viewer.frame(number / 2)
        await viewer.until("response.output_text.delta", 3)
        await viewer.say("input_video_frame.append", time=2, format="jpeg", bytes=1000)
        viewer.socket.transport.abort()
        return key

    key = drive(run)
    settled(strict)
    record = read_record(strict.record(key))
    assert record.end == "cancelled" and record.about["end"] == "lost" and len(record.tokens) == 3


def impatient(server, monkeypatch) -> None:
    """From its next message on, the only viewer may be idle for half a second."""
    (viewer,) = server.app.viewers
    limits = replace(viewer.connection.limits, seconds_idle=0.5)
    monkeypatch.setattr(viewer.connection, "limits", limits)
    monkeypatch.setattr(server.server, "settings", replace(server.server.settings, limits=limits))


def test_a_client_that_stalls_is_disconnected(strict, monkeypatch):
    async def run():
        async with Talk(strict.connect()) as viewer:
            await viewer.begin(models=["group"])
            await viewer.until("session.updated")
            impatient(strict, monkeypatch)
            await viewer.frame(0)
            assert (await viewer.until("error"))["error"]["code"] == "idle"
            assert (await viewer.until("response.done"))["response"]["status"] == "cancelled"
            assert await viewer.closed() == 1008

    drive(run)
    settled(strict)


def test_a_client_that_only_seems_to_be_alive_is_disconnected(strict, monkeypatch):
    async def run():
        async with Talk(strict.connect()) as viewer:
            await viewer.begin(models=["group"])
            await viewer.until("session.updated")
            impatient(strict, monkeypatch)
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await asyncio.sleep(0.1)
                    await viewer.frame(0)
            assert await viewer.closed() == 1008
            return [event["error"]["code"] for event in gather(viewer.events)["error"]]

    assert drive(run) == ["idle"]
    settled(strict)


def test_a_client_that_does_not_read_is_disconnected(strict, monkeypatch):
    """What waits for it is bounded."""
    limits = replace(strict.server.settings.limits, messages_waiting=4)
    monkeypatch.setattr(strict.server, "settings", replace(strict.server.settings, limits=limits))
    socket = SilentSocket()

    async def run():
        viewer = Viewer(socket, strict.server)
        task = asyncio.create_task(viewer.run())
        await asyncio.sleep(0)
        for _ in range(20):
            viewer.connection.send("response.output_text.delta")
        assert viewer.connection.outbox.qsize() <= 2 * limits.messages_waiting
        monkeypatch.setattr(connection, "SEND_SECONDS", 0.1)
        await task

    asyncio.run_coroutine_threadsafe(run(), strict.loop).result(SECONDS)


class SilentSocket:
    """A client that sends nothing and reads nothing."""

    application_state = None

    async def receive(self):
        await asyncio.sleep(SECONDS)

    async def send_text(self, _):
        await asyncio.sleep(SECONDS)

    async def close(self, code):
        pass


def picture(number: int, moment: float) -> Picture:
    return Picture(torch.full((3, 2, 2), number, dtype=torch.uint8), moment, torch.empty(0))


@pytest.mark.parametrize(
    "times, clips",
    [
        ([0, 0.5, 1e6, 1e6 + 0.5], 2),  # jumps ahead: goes on as if nothing was
        ([100, 100.5, 3, 3.5], 2),  # and back
        ([0, 0.53, 0.98, 1.52], 2),  # jitters
        ([0, 0.5, 2.0, 2.5], 3),  # a gap of a second: the picture stays on screen
        ([0, 0.5, 0.5, 0.4, 1, 1.5], 2),  # the same moment again
        ([0, 0.5, 1], 2),  # an odd number: the last one fills its clip
    ],
)
def test_clocks_that_jump(times, clips):
    builder = ClipBuilder(2.0)
    built = []
    for number, moment in enumerate(times):
        if (missed := builder.place(moment)) is not None:
            built += builder.add(picture(number, moment), missed)
    built += builder.finish()
    assert len(built) == clips and builder.clips == clips
    if times[2] == 2.0:
        assert [int(frame[0, 0, 0]) for clip in built for frame in clip.frames] == [0, 1, 1, 1, 2, 3]
        assert [clip.time for clip in built] == [0.5, 0.5, 2.5]  # a picture that is repeated keeps its time


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_the_last_clip_of_a_recording_is_known(frames):
    builder = ClipBuilder(2.0, frames)
    built = []
    for number in range(8):
        if (missed := builder.place(number / 2)) is not None:
            built += builder.add(picture(number, number / 2), missed)
    assert [clip.last for clip in built] == [False] * (len(built) - 1) + [True] and len(built) == -(-frames // 2)
    assert builder.finish() == []


def test_without_a_window_a_session_ends_after_max_clips(checkpoints, tmp_path):
    flags = ["--model", str(checkpoints["group"]), "--records", str(tmp_path), "--window", "0", "0"]
    with running([*flags, "--max-clips", "2", "--max-new-tokens", "9"]) as server:
        viewer = drive(lambda: whole_session(server, clips=4))
        done = gather(viewer.events)["response.done"][0]["response"]
        assert (done["status"], done["figures"]["clips"]) == ("completed", 2)
        record = read_record(server.record(done["record_id"]))
        assert record.window is None and record.complete and len(record.arrived) == 2


# Who may connect


TOKEN = "0123456789abcdef-XYZ"


@pytest.fixture(scope="module")
def secret(checkpoints, tmp_path_factory):
    flags = ["--model", str(checkpoints["group"]), "--records", str(tmp_path_factory.mktemp("secret"))]
    flags += ["--sessions-per-client", "2", "--origin", "https://demo.example.org"]
    with running(flags, {TOKEN_VARIABLE: TOKEN}) as server:
        yield server


async def status(server, **options) -> int:
    """The HTTP status of a handshake."""
    try:
        async with server.connect(**options):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 401),
        ({"additional_headers": {"Authorization": f"Bearer {TOKEN}x"}}, 401),
        ({"additional_headers": {"Authorization": f"Bearer {TOKEN}"}}, 101),
        ({"additional_headers": {"Authorization": "Bearer é".encode().decode("latin-1")}}, 401),
        ({"subprotocols": ["qwen-vl-streaming", f"token.{TOKEN}"]}, 101),
        ({"subprotocols": ["qwen-vl-streaming", "token."]}, 401),
        ({"subprotocols": [f"token.{TOKEN}"], "origin": "https://evil.example"}, 403),
        ({"subprotocols": [f"token.{TOKEN}"], "origin": "https://demo.example.org"}, 101),
        ({"subprotocols": [f"token.{TOKEN}"], "origin": "null"}, 403),
    ],
)
def test_who_may_connect(secret, options, expected):
    assert drive(lambda: status(secret, **options)) == expected
    settled(secret)


def test_another_host_name_may_not_connect(secret):
    """A page elsewhere whose name leads to the loopback address."""
    for path in ("/", "/v1/models"):
        request = urllib.request.Request(secret.http + path, headers={"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 403


def test_too_many_connections_of_one_address(secret):
    async def run():
        options = {"subprotocols": ["qwen-vl-streaming", f"token.{TOKEN}"]}
        async with secret.connect(**options) as first, secret.connect(**options):
            assert first.subprotocol == "qwen-vl-streaming"
            return await status(secret, **options)

    assert drive(run) == 429
    settled(secret)


def test_what_needs_a_token(secret):
    for path, needed in (("/", False), ("/health", False), ("/metrics", True), ("/v1/models", True)):
        for given in ("", f"Bearer {TOKEN}"):
            request = urllib.request.Request(secret.http + path, headers={"Authorization": given} if given else {})
            if needed and not given:
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request)
                headers, code = refused.value.headers, refused.value.code
                assert code == 401
            else:
                headers = urllib.request.urlopen(request).headers
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"


def test_metrics_have_the_fields_names(server):
    drive(lambda: whole_session(server, clips=2, models=["group"]))
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['qwen_vl_ttft_seconds_count{model="group"}']) >= 1
    for name in ("tpot_seconds_count", "jitter_seconds_count", "age_seconds_count", "server_share_seconds_count"):
        assert float(values[f'qwen_vl_{name}{{model="group"}}']) >= 1
    assert values["qwen_vl_queue"] == "0.0" and values['qwen_vl_sessions{model="group"}'] == "0.0"
    assert 'qwen_vl_deadline_misses_total{model="group"}' in values
    assert urllib.request.urlopen(f"{server.http}/health").read() == b'{"status":"ok"}'
