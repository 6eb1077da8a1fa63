"""A stand-in for the hub, on the loopback interface."""

import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from serving import Quiet, serving


class Hub:
    """Usage: `with Hub() as hub: … hub.endpoint …`. A subclass has an `answer` to each GET or HEAD request."""

    def __init__(self, commit: str = "0" * 40):
        self.commit = commit
        hub = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, unquote(self.path.partition("?")[0]))

            do_HEAD = do_GET

        self.serving = serving(Handler)

    def __enter__(self):
        self.server = self.serving.__enter__()
        self.endpoint = self.server.url
        return self

    def __exit__(self, *error):
        self.serving.__exit__(*error)

    def close(self) -> None:
        """Be gone before the end of the `with`."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        raise NotImplementedError

    def send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes | dict | list, error: str = "", tag: str = "tag"
    ) -> None:
        """`data` is sent as JSON unless it is bytes. `error` is the hub's own code for a status."""
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", "ETag": f'"{tag}"'}
        headers |= {"X-Repo-Commit": self.commit, **({"X-Error-Code": error} if error else {})}
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
