"""The time of day, from a clock that never goes backward while a program runs."""

import time

_OFFSET = time.time() - time.monotonic()


def now() -> float:
    """Returns the seconds since the epoch."""
    return _OFFSET + time.monotonic()
