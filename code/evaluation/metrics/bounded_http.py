"""HTTP responses with a limit on their total size and time, for endpoints that never stop sending.

The timeout of requests applies to each read, and the size is not limited: an endpoint that sends a byte a minute blocks
a program forever, and one that does not stop fills its memory. Here the limits cover the whole response, with headers,
redirects and discarded bodies. Knows nothing about the requests.
"""

import functools
import http.client
import io
import time

from requests.adapters import HTTPAdapter


class _Bounded(io.RawIOBase):
    """Reads from a socket until a limit is reached."""

    def __init__(self, sock, raw: io.RawIOBase, max_bytes: int, seconds: float):
        self.sock, self.raw, self.left, self.seconds = sock, raw, max_bytes, seconds
        self.end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        if (seconds := self.end - time.monotonic()) <= 0:
            raise TimeoutError(f"no complete response within {self.seconds:g} s")
        self.sock.settimeout(min(seconds, self.sock.gettimeout() or seconds))
        count = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise OSError("the response is too long")
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, max_bytes: int, seconds: float, **more):
        super().__init__(sock, *args, **more)
        self.fp = io.BufferedReader(_Bounded(sock, self.fp.detach(), max_bytes, seconds))

    def begin(self) -> None:
        super().begin()
        if self.headers.get("Content-Encoding", "identity") != "identity":
            # It could expand to any size.
            raise http.client.HTTPException("the response is compressed, which was not requested")


class BoundedAdapter(HTTPAdapter):
    """For `requests.Session.mount`: limits each response to `max_bytes` and `seconds`. One that exceeds them is treated
    like a broken connection."""

    def __init__(self, max_bytes: int, seconds: float, **more):
        self.response = functools.partial(_Response, max_bytes=max_bytes, seconds=seconds)
        super().__init__(**more)

    def get_connection_with_tls_context(self, *args, **more):
        pool = super().get_connection_with_tls_context(*args, **more)
        if not hasattr(pool.ConnectionCls, "bounded"):
            own = {"response_class": staticmethod(self.response), "bounded": True}
            pool.ConnectionCls = type("BoundedConnection", (pool.ConnectionCls,), own)
        return pool
