"""HTTP answers that are bounded as a whole, for endpoints that never stop sending.

A timeout of requests is for each piece of an answer, and nothing bounds how many there are: an endpoint that sends a
byte a minute holds a program for ever, and one that does not stop fills its memory. Here each answer has bounds for all
its bytes and all its time, head, redirects and what is thrown away among them. Knows nothing of what is asked.
"""

import functools
import http.client
import io
import time

from requests.adapters import HTTPAdapter


class _Bounded(io.RawIOBase):
    """What comes from a socket, until it is too much or takes too long."""

    def __init__(self, sock, raw: io.RawIOBase, most_bytes: int, seconds: float):
        self.sock, self.raw, self.left, self.seconds = sock, raw, most_bytes, seconds
        self.end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        if (seconds := self.end - time.monotonic()) <= 0:
            raise TimeoutError(f"no whole answer within {self.seconds:g} s")
        self.sock.settimeout(min(seconds, self.sock.gettimeout() or seconds))
        count = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise OSError("the answer is too long")
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, most_bytes: int, seconds: float, **more):
        super().__init__(sock, *args, **more)
        self.fp = io.BufferedReader(_Bounded(sock, self.fp.detach(), most_bytes, seconds))

    def begin(self) -> None:
        super().begin()
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise http.client.HTTPException("the answer is compressed, which was not asked for")  # to any size


class BoundedAdapter(HTTPAdapter):
    """For `requests.Session.mount`: each answer has at most `most_bytes` and takes at most `seconds`. One that is
    longer is one that breaks off."""

    def __init__(self, most_bytes: int, seconds: float, **more):
        self.response = functools.partial(_Response, most_bytes=most_bytes, seconds=seconds)
        super().__init__(**more)

    def get_connection_with_tls_context(self, *args, **more):
        pool = super().get_connection_with_tls_context(*args, **more)
        if not hasattr(pool.ConnectionCls, "bounded"):
            own = {"response_class": staticmethod(self.response), "bounded": True}
            pool.ConnectionCls = type("BoundedConnection", (pool.ConnectionCls,), own)
        return pool
