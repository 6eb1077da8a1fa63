"""Waits for something to happen, for as long as a busy machine needs."""

import time
from collections.abc import Callable

SECONDS = 120
"""What has not happened by then never will."""


def until(happened: Callable[[], object], seconds: float = SECONDS):
    """Wait until `happened` returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(0.005)
    return found
