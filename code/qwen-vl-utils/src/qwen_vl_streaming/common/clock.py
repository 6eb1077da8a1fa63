"""The time of day, by a clock that is never set back while a program runs."""

import time

_OFFSET = time.time() - time.monotonic()


def now() -> float:
    """Seconds since the epoch."""
    return _OFFSET + time.monotonic()
