"""The machines of one run: when one of them fails or is gone, the launchers of the others learn of it within seconds.

torchrun leaves that to the processes, which may wait for each other in NCCL for ten minutes and more. Launchers meet
in the store that torchrun has on machine 0. Each counts there every second; machine 0 looks at all the counts, and the
others at what it has seen. Knows nothing of processes.
"""

import json
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError, PrefixStore, TCPStore

from .signals import RESUMES

BEAT = 1.0
"""Seconds between two counts."""
LOST = 15.0
"""A machine that has not counted for so many seconds is lost."""
UNHEARD = f"did not answer for {LOST:.0f} s{RESUMES}"
LEAVING = 15.0
"""Seconds that machine 0, with its store, waits for the others to end in good order."""


class Nodes:
    """This machine, `node` of `nodes`, among the others. `failed` is called once, in a thread, where another one has
    failed or is lost, with the exit status of the run and a line that says so."""

    def __init__(self, node: int, nodes: int, address: str, port: int, failed: Callable[[int, str], object]):
        self.node, self.nodes, self.address, self.port, self.failed = node, nodes, address, port, failed
        self.fault: tuple[int, str] | None = None
        """What has failed here."""
        self.ending, self.ended = threading.Event(), threading.Event()
        """It is to be said that this machine ends; it is said."""
        self.heard: float | None = None
        """When the store last answered; None until it does."""
        self.over = False
        """Whether machine 0 has ended in good order."""
        for loop in (self._count, self._listen) if nodes > 1 else ():
            threading.Thread(target=loop, daemon=True).start()

    def fail(self, status: int, line: str) -> None:
        """Tell the other machines what has failed here."""
        if not self.fault:
            self.fault = status, line
            self.end()

    def end(self) -> None:
        """Tell them that this machine ends: if nothing has failed, in good order. Machine 0 waits until they do too."""
        self.ending.set()
        if self.heard is not None:
            self.ended.wait(4 * BEAT if self.fault or self.node else LEAVING)

    def wait_for_news(self) -> None:
        """Wait as long as it can take until `failed` is called, where another machine has failed or is lost."""
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
                    time.sleep(2 * BEAT)  # until all the others have seen it, too
                self._failed(status, line)
        self.over = self.over or store.check(["ended 0"])

    def _listen(self) -> None:
        """A store whose machine is gone may not answer at all."""
        while not self.ended.wait(BEAT):
            if self.heard is not None and time.monotonic() - self.heard > LOST and not self.over:
                self._failed(1, f"machine 0 {UNHEARD}")
                return

    def _failed(self, status: int, line: str) -> None:
        if not (self.ending.is_set() or self.ended.is_set()):
            self.ended.set()
            self.failed(status, line)
