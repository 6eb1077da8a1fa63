"""The server under attack: floods below the protocol, malformed values and headers, pictures that are slow to read."""

import asyncio
import io
import json
import logging
import signal
import socket
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from media import make_video
from PIL import Image, ImageOps
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.redact import Redacting
from qwen_vl_streaming.serve import guards, process_handle
from qwen_vl_streaming.serve.frames import MOST_PIXEL_CHUNKS, BadFrame, decode_picture
from qwen_vl_streaming.serve.metrics import Metrics
from qwen_vl_streaming.serve.options import parse
from qwen_vl_streaming.serve.response import Response
from qwen_vl_streaming.sessions.record import read_record
from qwen_vl_streaming.sessions.slot_scheduler import SlotScheduler
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import resize_frame
from served import SECONDS, Running, drive, gather, running, settled, token_ids, trained
from serving_clients import Talk, picture_bytes
from websockets.exceptions import InvalidStatus


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    return trained(made[0], tmp_path_factory.mktemp("model") / "group", "group")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    film = make_video(folder / "own.mp4", seconds=30, size=(84, 56))
    flags = ["--model", str(checkpoint), "--records", str(folder / "records"), "--max-new-tokens", "20"]
    flags += ["--source", f"film={film}", "--source", "cam=rtsp://user:hunter2secret@127.0.0.1:1/x"]
    with running([*flags, "--sessions", "3", "--sessions-per-client", "6"]) as server:
        yield server


# Below the protocol


def handshake(server: Running) -> socket.socket:
    """A connection that has sent its handshake, and has not read the answer."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(SECONDS)
    lines = ["GET /v1/realtime HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""]
    connection.sendall("\r\n".join(lines).encode())
    connection.recv(100)
    return connection


def ended(connection: socket.socket) -> bool:
    """The server closes the connection."""
    try:
        while connection.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def frame(opcode: int, data: bytes = b"", last: bool = True) -> bytes:
    return bytes([0x80 * last | opcode, 0x80 | len(data)]) + bytes(4) + data


@pytest.mark.parametrize(
    "first, flood",
    [(b"", frame(9)), (b"", frame(9, b"x" * 125)), (b"", frame(10)), (frame(1, last=False), frame(0, last=False))],
    ids=["pings", "long pings", "pongs", "empty fragments"],
)
def test_a_flood_below_the_protocol_is_disconnected(server, first, flood):
    with handshake(server) as connection:
        try:
            connection.sendall(first + flood * 3000)
        except (ConnectionResetError, BrokenPipeError):
            return settled(server)
        assert ended(connection)
    settled(server)


def test_few_pings_and_fragments_are_served(server):
    picture = picture_bytes(size=(640, 480))

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin()
            await viewer.until("session.updated")
            for _ in range(100):
                await (await viewer.socket.ping())
            for number in range(6):
                event = {"type": "input_video_frame.append", "time": number / 2, "format": "jpeg"}
                await viewer.socket.send(json.dumps({**event, "bytes": len(picture)}))
                await viewer.socket.send([picture[at : at + 1024] for at in range(0, len(picture), 1024)])
            await viewer.until("input_video_frame.acknowledged", 6)

    drive(run)
    settled(server)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"]
)
def test_a_connection_that_asks_for_nothing_is_closed(server, monkeypatch, sent):
    monkeypatch.setattr(guards, "REQUEST_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(SECONDS)
        connection.sendall(sent)
        assert ended(connection)


def test_a_silent_viewer_is_no_silent_connection(server, monkeypatch):
    made, connect = [], guards.GuardedHTTP.connection_made
    monkeypatch.setattr(
        guards.GuardedHTTP, "connection_made", lambda http, *how: made.append(http) or connect(http, *how)
    )

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.until("session.created")
            for _ in range(3):  # it is checked every 20 seconds
                server.loop.call_soon_threadsafe(made[-1]._check)
            await viewer.begin()
            await viewer.until("session.updated")

    drive(run)


def request(server: Running, head: str) -> tuple[int, str]:
    """Status and text of an answer; `head` is the request without the empty line at its end."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(SECONDS)
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        data = b""
        while piece := connection.recv(2**16):
            data += piece
    return int(data.split()[1]), data.decode("latin-1").lower()


@pytest.mark.parametrize(
    "head, status",
    [
        ("GET / HTTP/1.1\r\nHost: [", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[", 400),
        ("POST / HTTP/1.1\r\nHost: localhost", 405),
        ("POST /static/page.js HTTP/1.1\r\nHost: localhost", 405),
        ("GET /static/page.js HTTP/1.1\r\nHost: localhost\r\nRange: bytes=9999999-", 416),
        ("GET /nothing HTTP/1.1\r\nHost: localhost", 404),
        ("GET /static/page.js HTTP/1.1\r\nHost: localhost", 200),
    ],
)
def test_every_answer_has_the_security_headers(server, head, status, caplog):
    found, text = request(server, head)
    assert found == status and text.count("content-security-policy: default-src 'none'") == 1
    assert text.count("x-content-type-options: nosniff") == 1 and "traceback" not in caplog.text.lower()


def test_a_refused_handshake_is_not_logged_as_an_error(server, caplog):
    async def run():
        with pytest.raises(InvalidStatus):
            await server.connect(origin="https://evil.example")
        with pytest.raises(InvalidStatus):
            await server.connect(origin="http://[")

    drive(run)
    settled(server)
    assert caplog.text == ""


def test_a_client_cannot_choose_its_address(server):
    """By which connections are counted."""

    async def run():
        refused, opened = 0, []
        for number in range(9):
            try:
                opened.append(await server.connect(additional_headers={"X-Forwarded-For": f"10.0.0.{number}"}))
            except InvalidStatus as error:
                refused += error.response.status_code == 429
        for each in opened:
            await each.close()
        return refused

    assert drive(run) == 3
    settled(server)


# Malformed values

HUGE = 10**400


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"question": "half a character: \ud800"}, "question must be a text"),
        ({"question": 0}, "question must be a text"),
        ({"question": []}, "question must be a text"),
        ({"models": {}}, "list of names"),
        ({"models": 0}, "list of names"),
        ({"keep": "true"}, "keep must be true or false"),
        ({"keep": 1}, "keep must be true or false"),
        ({"source": {"kind": "client", "width": 84, "height": 56, "frames_per_second": HUGE}}, "frames_per_second"),
        ({"source": {"kind": "client", "width": HUGE, "height": 56}}, "width must be"),
        ({"source": ["client"]}, "source must have the kind"),
    ],
    ids=str,
)
def test_values_of_a_wrong_type_are_refused(server, asked, message):
    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(**asked)
            assert message in (await viewer.until("error"))["error"]["message"]
            await viewer.begin(question="", models=[], keep=None)  # what may be left out
            await viewer.until("session.updated")
            await viewer.frame(HUGE, event_id="huge")
            error = (await viewer.until("error"))["error"]
            assert (error["code"], error["event_id"]) == ("invalid_event", "huge")
            await viewer.frame(0, event_id="none", bytes=0)
            await viewer.frame(0)  # nothing of the refused frames is left in between
            await viewer.until("input_video_frame.acknowledged")
            return [event["error"]["event_id"] for event in gather(viewer.events)["error"]]

    assert drive(run) == [None, "huge", "none"]
    settled(server)


# Pictures


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
JPEG, PNG = encoded(IMAGE, "jpeg"), encoded(IMAGE, "png")
SLOW = {
    "segments": ("jpeg", JPEG[:2] + b"\xff\xe9\x00\x02" * 10**6 + JPEG[2:]),
    "padding": ("jpeg", JPEG[:2] + b"\xff" * 4 * 10**6 + JPEG[2:]),
    "rubbish between segments": ("jpeg", JPEG[:20] + b"x" * 4 * 10**6 + JPEG[20:]),
    "chunks": ("png", PNG[:33] + chunk(b"prVt") * 300_000 + PNG[33:]),
    "profiles": ("png", PNG[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6))) * 3500 + PNG[33:]),
    "empty pixels": ("png", PNG[:33] + chunk(b"IDAT") * 300_000 + PNG[33:]),
}


@pytest.mark.parametrize("name", SLOW)
def test_pictures_of_too_many_parts_are_refused_at_once(name, monkeypatch):
    """Without Pillow, which takes 0.3 to 8 s, and after a look at few of the parts."""
    monkeypatch.setattr(Image, "open", None)
    form, data = SLOW[name]
    with pytest.raises(BadFrame, match="too many parts"):
        decode_picture(Counted(data), form, 2560 * 1600, (56, 84))


class Counted(bytes):
    """A picture that may be looked at in few places. The header of a PNG's chunk is two of them."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        assert self.looks <= 2 * MOST_PIXEL_CHUNKS + 200
        return super().__getitem__(place)


@pytest.mark.parametrize("width, height", [(100_000, 100_000), (9000, 10_000), (2**31 - 1, 1)])
def test_bombs_are_refused_without_a_warning(width, height, recwarn):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    with pytest.raises(BadFrame, match=f"{width} x {height} pixels") as refused:
        decode_picture(PNG[:8] + header + chunk(b"IDAT", b"x"), "png", 2560 * 1600, (56, 84))
    assert refused.value.code == "frame_too_large" and not recwarn.list


def test_grey_pictures_of_16_bits_are_not_shown_as_white():
    grey = Image.fromarray(np.full((56, 84), 1000, np.uint16))  # nearly black
    with pytest.raises(BadFrame, match="send 8 bits"):
        decode_picture(encoded(grey, "png"), "png", 2560 * 1600, (56, 84))


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_upright_as_their_exif_says(orientation):
    exif = Image.Exif()
    exif[0x10F], exif[0x112] = "a camera", orientation
    pale = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, np.ones((28, 28, 3), np.uint8)))
    data = encoded(pale, "jpeg", exif=exif, quality=100)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    found = decode_picture(data, "jpeg", 10**6, (upright.height, upright.width))
    assert np.array_equal(found.transpose(1, 2, 0), np.array(upright))


def test_hostile_metadata_costs_nothing_and_logs_nothing(recwarn):
    """Pillow parses them with warnings for each tag."""
    tags = b"".join(struct.pack("<HHII", 0x9000 + number, 5, 2000, 8) for number in range(5400))
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 5400) + tags
    for kind, start in ((b"\xe1", b"Exif\0\0"), (b"\xe2", b"MPF\0"), (b"\xe1", b"Exif\0\0II*\0\xff\xff\xff\xff")):
        part = start + tiff
        data = JPEG[:2] + b"\xff" + kind + struct.pack(">H", len(part) + 2) + part + JPEG[2:]
        assert np.array_equal(*(decode_picture(each, "jpeg", 10**6, (56, 84)) for each in (data, JPEG)))
    assert not recwarn.list


def test_pictures_of_all_common_kinds_are_decoded():
    exif = Image.Exif()
    exif[0x10F] = "a camera"
    kinds = {
        "progressive": encoded(IMAGE, "jpeg", progressive=True, exif=exif, icc_profile=bytes(100_000), comment="x"),
        "cmyk": encoded(IMAGE.convert("CMYK"), "jpeg"),
        "grey": encoded(IMAGE.convert("L"), "jpeg"),
        "padded": JPEG[:2] + b"\xff" + JPEG[2:],
        "palette": encoded(IMAGE.convert("P"), "png"),
        "alpha": encoded(IMAGE.convert("RGBA"), "png"),
        "animated": encoded(IMAGE, "png", save_all=True, append_images=[IMAGE.rotate(90)] * 3),
        "without an end": PNG[:-12],
    }
    for name, data in kinds.items():
        form = "png" if data.startswith(b"\x89PNG") else "jpeg"
        picture = decode_picture(data, form, 2560 * 1600, (56, 84))
        assert picture.shape == (3, 56, 84) and picture.dtype == np.uint8, name
    exact = np.array(IMAGE).transpose(2, 0, 1)
    for name in ("alpha", "animated", "without an end"):
        assert np.array_equal(decode_picture(kinds[name], "png", 2560 * 1600, (56, 84)), exact), name


def shown(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """As `decode_picture`, by `Image.open` alone; None if that refuses it."""
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except Exception:
        return None
    return resize_frame(np.array(picture), size).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "1"])
def test_pictures_are_decoded_as_pillow_shows_them(mode):
    draw = np.random.default_rng(0)
    for width, height in ((84, 56), (28, 28), (91, 33), (300, 7), (1, 1)):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        options = ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"restart_marker_rows": 1})
        kinds = [("png", encoded(image, "png"))] if mode != "CMYK" else []
        if mode in ("RGB", "L", "CMYK"):
            kinds += [("jpeg", encoded(image, "jpeg", **each)) for each in options]
        for form, data in kinds:
            for size in ((height, width), (56, 84)):
                assert np.array_equal(decode_picture(data, form, 10**6, size), shown(data, size)), (form, width)


def test_damaged_pictures_are_refused_or_decoded_as_pillow_shows_them():
    """Above all, libjpeg and the server agree on the size: libjpeg writes rows of its own size."""
    draw, refused = np.random.default_rng(0), 0
    whole = [encoded(IMAGE, "jpeg"), encoded(IMAGE, "jpeg", progressive=True), encoded(IMAGE.convert("CMYK"), "jpeg")]
    for number in range(3000):
        data = bytearray(whole[number % len(whole)])
        start = data.index(b"\xff\xda")
        for place in draw.integers(2, (start, len(data))[number % 2], draw.integers(1, 4)):
            data[place] = draw.choice([0, 1, 2, 8, 0xC0, 0xC2, 0xD0, 0xE1, 0xFF, draw.integers(256)])
        if number % 5 == 0:
            place = draw.integers(2, start)
            data[place:place] = data[place - 2 : place + draw.integers(40)]
        exact = shown(bytes(data), (56, 84))
        try:
            found = decode_picture(bytes(data), "jpeg", 10**6, (56, 84))
        except BadFrame:
            refused += 1
        else:
            assert exact is not None and np.array_equal(found, exact), number
    assert 1000 < refused < 2900


# The server's own sources


def test_a_viewer_can_stop_a_source_of_the_server(server):
    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "server", "name": "film"})
            await viewer.until("response.output_text.delta")
            await viewer.say("input_video.end")
            done = (await viewer.until("response.done"))["response"]
            assert "error" not in gather(viewer.events)
            return done["status"], done["figures"]["clips"]

    status, clips = drive(run)
    assert status == "completed" and 1 <= clips < 30
    settled(server)


def test_a_source_that_fails_is_reported_once_without_its_address(server, caplog):
    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "server", "name": "cam"})
            await viewer.until("error")
            await viewer.begin()
            await viewer.until("session.updated")
            return gather(viewer.events)["error"]

    (error,) = drive(run)
    assert error["error"]["code"] == "source_failed" and error["error"]["message"] == "source cam cannot be read"
    assert "hunter2secret" not in caplog.text and "rtsp://user:***@127.0.0.1" in caplog.text
    settled(server)


def test_a_lost_model_ends_the_wait_for_a_source_of_the_server(server, monkeypatch):
    monkeypatch.setattr(server.server.workers[0], "given_up", True)
    monkeypatch.setattr(server.server.workers[0], "lost", True)

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "server", "name": "film"})
            assert (await viewer.until("error"))["error"]["code"] == "failed"
            monkeypatch.undo()
            await viewer.begin()
            await viewer.until("session.updated")

    drive(run)
    settled(server)


def test_all_viewers_together_cannot_open_any_number_of_sources(server, monkeypatch):
    monkeypatch.setattr(server.server, "reading", [SimpleNamespace(thread=SimpleNamespace(is_alive=lambda: True))] * 35)

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "server", "name": "film"})
            return (await viewer.until("error"))["error"]["code"]

    assert drive(run) == "queue_full"


# What is left


def test_a_session_that_fails_names_its_record(server, monkeypatch):
    def no_room(clips, layouts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.begin()
            await viewer.until("session.updated")
            monkeypatch.setattr(server.pools[0].runner.vision_encoder, "encode", no_room)
            await viewer.frame(0)
            await viewer.frame(0.5)
            done = (await viewer.until("response.done"))["response"]
            assert done["status"] == "failed"
            return done["record_id"]

    record = read_record(server.record(drive(run)))
    assert record.end == "failed: CUDA out of memory" and len(record.arrived) == 1
    settled(server)


def test_what_is_left_of_a_text_has_the_age_of_its_token():
    """Without the capture time of its frame, the page would show it as late by the length of the video."""
    deltas: list[dict] = []
    connection = SimpleNamespace(send=lambda kind, **fields: deltas.append(fields) if "delta" in fields else None)
    # A character that is never complete.
    model = SimpleNamespace(name="group", decode=lambda ids: "\ufffd", end_of_slot_id=None)
    response = Response(model, None, None, lambda clip: (10.0 + clip, clip - 0.5), lambda: 0, connection, Metrics())
    response.sent_clips = 3
    response.token(7, 2, 12.3)
    response.done("completed", None, False)
    assert [delta["delta"] for delta in deltas] == ["", "\ufffd"]
    assert [(delta["capture_time"], delta["age_ms"]) for delta in deltas] == [(1.5, 300.0)] * 2


def test_other_sessions_change_no_token(server):
    """The same frames give the same tokens, alone and beside others."""

    async def one(seed: int) -> Talk:
        async with Talk(server.connect()) as viewer:
            await viewer.begin(source={"kind": "client", "width": 84, "height": 56, "frames": 8})
            await viewer.until("session.updated")
            for number in range(8):
                await viewer.frame(number / 2, picture_bytes(form="png", seed=100 * seed + number), form="png")
                await asyncio.sleep(0.02)
            await viewer.until("response.done")
            return viewer

    async def together() -> list[Talk]:
        return await asyncio.gather(*(one(seed) for seed in range(3)))

    alone = [token_ids(gather(drive(lambda seed=seed: one(seed)).events), "group") for seed in range(3)]
    found = [token_ids(gather(viewer.events), "group") for viewer in drive(together)]
    assert found == alone and len({tuple(tokens) for tokens in alone}) == 3 and len(alone[0]) > 9
    settled(server)


def test_a_session_that_is_behind_writes_as_much_after_the_end():
    """As one that keeps up: the tokens due in the slots before the last one do not count."""
    limits = []
    for behind in (False, True):
        scheduler = SlotScheduler(VARIANTS["group"], "wait-5", 10**6, None)
        for number in range(1, 61):
            scheduler.arrive(number == 60)
            scheduler.commit()
            if not behind and number < 60:
                scheduler.begin_slot()
                for _ in range(5):
                    scheduler.request()
                    scheduler.read(False)
        scheduler.limit(30)
        limits.append(scheduler.max_new_tokens)
    assert limits == [5 * 59 + 30] * 2


def test_nothing_begins_while_the_server_stops(server, monkeypatch):
    async def run():
        async with Talk(server.connect()) as viewer:
            await viewer.until("session.created")
            monkeypatch.setattr(server.server, "stopping", True)
            await viewer.begin()
            return (await viewer.until("error"))["error"]["code"]

    assert drive(run) == "server_stopping"


# The command


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source", "cam=FOLDER"], "is a folder"),
        (["--source", "cam="], "cam= has no source"),
        (["--origin", "https://["], "is not an origin"),
    ],
)
def test_mistakes_in_the_command(checkpoint, tmp_path, flags, message):
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    with pytest.raises(InputError, match=message):
        parse("", {}, ["--model", str(checkpoint), *flags])


def test_an_origin_is_compared_as_browsers_write_it(checkpoint):
    settings = parse("", {}, ["--model", str(checkpoint), "--origin", "HTTPS://Demo.Example.org"])
    assert settings.origins == ("https://demo.example.org",)


def test_ctrl_c_while_models_load_reaches_only_the_server(monkeypatch):
    """Python in a process that starts would print a traceback."""
    found = []
    process = SimpleNamespace(
        start=lambda: found.append([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
    )
    pipe = SimpleNamespace(close=lambda: None)
    context = SimpleNamespace(Pipe=lambda: (pipe, pipe), Process=lambda **_: process)
    monkeypatch.setattr(process_handle.multiprocessing, "get_context", lambda _: context)
    before = signal.getsignal(signal.SIGINT)
    process_handle.ProcessHandle.start(SimpleNamespace(name="group", clip_bytes=4096, dtype=torch.float32))
    assert found == [[signal.SIG_IGN] * 2] and signal.getsignal(signal.SIGINT) == before


def test_tracebacks_in_the_log_hide_passwords():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Redacting())
    try:
        raise RuntimeError("rtsp://user:hunter2secret@camera/1 failed")
    except RuntimeError:
        handler.handle(logging.LogRecord("x", logging.ERROR, "", 0, "a bug", (), sys.exc_info()))
    assert "rtsp://user:***@camera/1 failed" in stream.getvalue() and "hunter2secret" not in stream.getvalue()
