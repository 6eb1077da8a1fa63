"""How long a run takes from its command to the end of the first optimizer step, divided into parts. Imports only light
modules."""

import os
import time
from itertools import pairwise

TIMES = "QWENVL_TIMES"
"""Environment variable: when sft.sh started, and when it started the launcher, in seconds since 1970."""


class Startup:
    """The seconds of each part: planning and the launcher, if sft.sh started them, then those that `end` names."""

    def __init__(self):
        """Call it before heavy imports, when the process starts."""
        self.last = time.time()
        moments = [*map(float, os.environ.get(TIMES, "").split()), self.last]
        spans = (after - before for before, after in pairwise(moments))
        self.seconds = dict(zip(("planning", "launcher"), spans, strict=False))

    def end(self, part: str) -> None:
        """`part` has ended, and the next one begins. Only the first call for a part has an effect."""
        if part not in self.seconds:
            now = time.time()
            self.seconds[part], self.last = now - self.last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"
