"""An endpoint for the judge: a real HTTP server on the loopback interface that can fail in specified ways."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from qwen_vl_streaming.common import redact
from serving import Quiet
from waiting import SECONDS

CUT, STALL, DRIP, FLOOD = "cut", "stall", "drip", "flood"
GOOD = '{"score": 4, "why": "one slip"}'


class Endpoint(ThreadingHTTPServer):
    """Answers according to `plan`, which has a list of (status, body, headers) for each caption, and for all others
    under "". The last entry of a list repeats.

    A dict is sent as JSON, bytes as they are; any other body is the content of a chat completion. Status 0 closes the
    connection and -1 sends no answer. CUT closes the connection and STALL stops sending in the middle of an answer.
    DRIP sends one byte at a time and FLOOD large blocks, both without end, in the body of an answer with the status
    `body`, or in its header if that is 0. `before_answer` is called before each answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: dict[str, list] = {}
        self.asked: list[dict] = []
        self.at_once = self.most_at_once = 0
        self.before_answer = lambda: None
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Ignore the error: tests kill clients."""

    def counts(self) -> Counter:
        return Counter(each["caption"] for each in self.asked)


class Handler(Quiet, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        caption = text.split("-----\n")[1].removesuffix("\n")
        server: Endpoint = self.server
        with server.lock:
            server.asked.append(
                {**request, "caption": caption, "path": self.path, "key": self.headers["Authorization"]}
            )
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            plan = server.plan.get(caption, server.plan.get("", [(200, GOOD)]))
            status, body, *headers = plan.pop(0) if len(plan) > 1 else plan[0]
        server.before_answer()
        if status == -1:
            server.closing.wait(SECONDS)
        with server.lock:
            server.at_once -= 1
        if status in (DRIP, FLOOD):
            self.close_connection = True
            return self.endless(status, body)
        broken = status if status in (CUT, STALL) else None
        status = 200 if broken else status
        if status <= 0:
            self.close_connection = True
            return
        if not isinstance(body, dict | bytes):
            body = {"choices": [{"message": {"role": "assistant", "content": body}}]}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(*headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) + (broken is not None)))
        self.end_headers()
        self.wfile.write(data)
        if broken == STALL:
            server.closing.wait(SECONDS)
        self.close_connection |= broken is not None

    def endless(self, how: str, status: int) -> None:
        head = f"HTTP/1.1 {status or 200} OK\r\nContent-Type: application/json\r\nLocation: /v1/more\r\n"
        pieces = head.encode() + (b"\r\n" if status else b"X-Long: ")
        try:
            while not self.server.closing.wait(0.02 if how == DRIP else 0):
                self.wfile.write(pieces)
                pieces = b" " if how == DRIP else b" " * 2**18
        except OSError:
            pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(redact, "_known", {})  # keys such as "again" would be hidden in the messages of later tests
    server = Endpoint()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
