"""HTTP servers on the loopback interface, and the clock of those who read streams from them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from waiting import until


@contextlib.contextmanager
def serving(handler: Callable) -> Iterator[ThreadingHTTPServer]:
    """Serves in a thread on a free port; its address is `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Quiet:
    """For request handlers: nothing is logged."""

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Serves each connection the next of some streams, a list of (bytes, what happens before they are sent): a number
    of seconds to wait, or a function to call. Then it refuses."""
    servers = contextlib.ExitStack()

    def start(connections, kind="video/mp2t"):
        left = list(connections)

        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_GET(self):
                if not left:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                for data, before in left.pop(0):
                    before() if callable(before) else time.sleep(before)
                    with contextlib.suppress(ConnectionError):  # the consumer may leave
                        self.wfile.write(data)

        return servers.enter_context(serving(Handler)).url + "/live.ts"

    with servers:
        yield start


class Clock:
    """The wall clock of those who read streams: it stands still until a source moves it, which first lets them read
    what it has sent. However slow or busy the machine is, they see the same times."""

    def __init__(self):
        self.time, self.packets = 1000.0, 0
        """`packets`: how many were read."""
        self.waits: list[float] = []
        """Seconds before each attempt to reconnect."""

    def arrival(self) -> float:
        self.packets += 1
        return self.time

    def move(self, seconds: float, packets: int = 0) -> None:
        """Move on, as soon as this many packets are read in total."""
        until(lambda: self.packets >= packets)
        self.time += seconds

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds


@pytest.fixture
def wall(monkeypatch):
    """The clock of all readers of streams."""
    from qwen_vl_streaming.video import stream_frames, streams

    clock = Clock()

    class Stop(threading.Event):
        def wait(self, timeout=None):
            clock.wait(timeout)
            return self.is_set()

    monkeypatch.setattr(streams, "now", lambda: clock.time)
    monkeypatch.setattr(stream_frames, "now", clock.arrival)
    monkeypatch.setattr(streams, "threading", SimpleNamespace(Thread=threading.Thread, Event=Stop))
    return clock
