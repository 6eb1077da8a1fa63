"""The machines of one run: when one fails or stops responding, the launchers of the others detect it within seconds.

torchrun leaves this to the processes, which may wait for each other in NCCL for ten minutes or longer. The launchers
share the store that torchrun runs on machine 0. Each increments a counter there every second. Machine 0 checks all
counters and stores a fault, which the others read. Knows nothing about processes.
"""

import json
import threading
import time
from collections.abc import Callable

# torch.distributed documents the stores, but does not list them in `__all__`.
from torch.distributed import DistError, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .signals import RESUMES

BEAT = 1.0
"""Seconds between two increments of a counter."""
LOST = 15.0
"""Seconds without an increment after which a machine is considered lost."""
UNHEARD = f"did not answer for {LOST:.0f} s{RESUMES}"
LEAVING = 15.0
"""Seconds that machine 0, which hosts the store, waits for the others to end normally."""


class Nodes:
    """Connects this machine, `node` of `nodes`, with the others.

    If another machine fails or is lost, `failed` is called once, from a thread, with the exit status of the run and an
    error line.
    """

    def __init__(self, node: int, nodes: int, address: str, port: int, failed: Callable[[int, str], object]):
        self.node, self.nodes, self.address, self.port, self.failed = node, nodes, address, port, failed
        self.fault: tuple[int, str] | None = None
        """Exit status and error line of a failure on this machine."""
        self.ending, self.ended = threading.Event(), threading.Event()
        """`ending`: the end of this machine is to be announced. `ended`: it is announced, or another has failed."""
        self.heard: float | None = None
        """When the store last responded; None until its first response."""
        self.over = False
        """Whether machine 0 has announced its end."""
        for loop in (self._count, self._listen) if nodes > 1 else ():
            threading.Thread(target=loop, daemon=True).start()

    def fail(self, status: int, line: str) -> None:
        """Report a failure on this machine to the others. Only the first call has an effect."""
        if not self.fault:
            self.fault = status, line
            self.end()

    def end(self) -> None:
        """Announce the end of this machine to the others. Without a failure, machine 0 waits for the others to end."""
        self.ending.set()
        if self.heard is not None:
            self.ended.wait(4 * BEAT if self.fault or self.node else LEAVING)

    def wait_for_news(self) -> None:
        """Wait until `failed` is called, at most as long as it takes to detect that another machine is lost."""
        if self.heard is not None:
            self.ended.wait(LOST + 2 * BEAT)

    def _count(self) -> None:
        try:
            store = PrefixStore("launchers", TCPStore(self.address, self.port, is_master=False, wait_for_workers=False))
            counts = {node: (0, time.monotonic()) for node in range(1, self.nodes)} if self.node == 0 else {}
            while not self.ended.is_set():
                self.heard, ending = time.monotonic(), self.ending.is_set()
                if ending:
                    self._say_so(store)
                else:
                    store.add(f"count {self.node}", 1)
                self._look(store, counts)
                if ending and not any(count for count, _ in counts.values()):
                    self.ended.set()
                if ending:
                    time.sleep(BEAT / 4)
                else:
                    self.ending.wait(BEAT)
        except DistError:
            if self.heard is not None and not self.over:
                self._failed(1, f"machine 0 has ended{RESUMES}")

    def _say_so(self, store: PrefixStore) -> None:
        if self.fault:
            store.compare_set("fault", "", json.dumps([self.node, *self.fault]))
        store.set(f"ended {self.node}", "yes")

    def _look(self, store: PrefixStore, counts: dict[int, tuple[int, float]]) -> None:
        now = time.monotonic()
        for node, (count, when) in list(counts.items()):
            if store.check([f"ended {node}"]):
                del counts[node]
            elif (heard := store.add(f"count {node}", 0)) != count:
                counts[node] = heard, now
            elif count and now - when > LOST:
                store.compare_set("fault", "", json.dumps([node, 1, f"machine {node} {UNHEARD}"]))
        if store.check(["fault"]):
            node, status, line = json.loads(store.get("fault"))
            if node != self.node and not self.ending.is_set():
                store.set(f"ended {self.node}", "yes")
                if self.node == 0:
                    time.sleep(2 * BEAT)  # until all other machines have read it
                self._failed(status, line)
        self.over = self.over or store.check(["ended 0"])

    def _listen(self) -> None:
        """Detect the loss of machine 0: a call to its store may then block instead of raising an error."""
        while not self.ended.wait(BEAT):
            if self.heard is not None and time.monotonic() - self.heard > LOST and not self.over:
                self._failed(1, f"machine 0 {UNHEARD}")
                return

    def _failed(self, status: int, line: str) -> None:
        if not (self.ending.is_set() or self.ended.is_set()):
            self.ended.set()
            self.failed(status, line)
