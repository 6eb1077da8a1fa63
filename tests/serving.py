"""HTTP servers on the loopback interface."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer


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
