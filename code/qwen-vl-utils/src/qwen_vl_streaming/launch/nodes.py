"""The nodes of one run: when one fails or stops responding, the launchers of the others detect it within seconds.

torchrun leaves this to the processes, which may wait for each other in NCCL for ten minutes or longer. The launchers
share the store that torchrun runs on node 0. Each increments a counter there every second. Node 0 checks all
counters and stores a fault, which the others read. Knows nothing about processes.
"""

import json
import threading
import time
from collections.abc import Callable

# torch.distributed documents the stores, but does not list them in `__all__`.
from torch.distributed import DistError, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .signals import RESUMES

HEARTBEAT = 1.0
"""Seconds between two increments of a counter."""
TIMEOUT = 15.0
"""Seconds without an increment after which a node is considered lost."""
NO_RESPONSE = f"did not answer for {TIMEOUT:.0f} s{RESUMES}"
EXIT_TIMEOUT = 15.0
"""Seconds that node 0, which hosts the store, waits for the others to end normally."""


class Nodes:
    """Connects this node, `node` of `nodes`, with the others.

    If another node fails or is lost, `failed` is called once, from a thread, with the exit status of the run and an
    error line.
    """

    def __init__(self, node: int, nodes: int, address: str, port: int, failed: Callable[[int, str], object]):
        self.node, self.nodes, self.address, self.port, self.failed = node, nodes, address, port, failed
        self.fault: tuple[int, str] | None = None
        """Exit status and error line of a failure on this node."""
        self.ending, self.ended = threading.Event(), threading.Event()
        """`ending`: the end of this node is to be announced. `ended`: it is announced, or another has failed."""
        self.last_response: float | None = None
        """When the store last responded; None until its first response."""
        self.node_0_ended = False
        """Whether node 0 has announced its end."""
        for loop in (self._count, self._listen) if nodes > 1 else ():
            threading.Thread(target=loop, daemon=True).start()

    def fail(self, status: int, line: str, started: bool = False) -> None:
        """Report a failure on this node to the others. Only the first call has an effect. `started`: it is of a
        process, so all nodes have met, although the store may not have responded here yet. Node 0 would then wait for a
        node that it has not seen."""
        if not self.fault:
            self.fault = status, line
            self.end()
            if started and self.nodes > 1 and self.last_response is None:
                self.ended.wait(TIMEOUT)

    def end(self) -> None:
        """Announce the end of this node to the others. Without a failure, node 0 waits for the others to end."""
        self.ending.set()
        if self.last_response is not None:
            self.ended.wait(4 * HEARTBEAT if self.fault or self.node else EXIT_TIMEOUT)

    def wait_for_failure(self) -> None:
        """Wait until `failed` is called, at most as long as it takes to detect that another node is lost."""
        if self.last_response is not None:
            self.ended.wait(TIMEOUT + 2 * HEARTBEAT)

    def _count(self) -> None:
        try:
            store = PrefixStore("launchers", TCPStore(self.address, self.port, is_master=False, wait_for_workers=False))
            counts = {node: (0, time.monotonic()) for node in range(1, self.nodes)} if self.node == 0 else {}
            while not self.ended.is_set():
                self.last_response, ending = time.monotonic(), self.ending.is_set()
                if ending:
                    self._announce_end(store)
                else:
                    store.add(f"count {self.node}", 1)
                self._check(store, counts)
                if ending and not any(count for count, _ in counts.values()):
                    self.ended.set()
                if ending:
                    time.sleep(HEARTBEAT / 4)
                else:
                    self.ending.wait(HEARTBEAT)
        except DistError:
            if self.last_response is not None and not self.node_0_ended:
                self._failed(1, f"node 0 has ended{RESUMES}")

    def _announce_end(self, store: PrefixStore) -> None:
        if self.fault:
            store.compare_set("fault", "", json.dumps([self.node, *self.fault]))
        store.set(f"ended {self.node}", "yes")

    def _check(self, store: PrefixStore, counts: dict[int, tuple[int, float]]) -> None:
        now = time.monotonic()
        for node, (count, when) in list(counts.items()):
            if store.check([f"ended {node}"]):
                del counts[node]
            elif (newest := store.add(f"count {node}", 0)) != count:
                counts[node] = newest, now
            elif count and now - when > TIMEOUT:
                store.compare_set("fault", "", json.dumps([node, 1, f"node {node} {NO_RESPONSE}"]))
        if store.check(["fault"]):
            node, status, line = json.loads(store.get("fault"))
            if node != self.node and not self.ending.is_set():
                store.set(f"ended {self.node}", "yes")
                if self.node == 0:
                    time.sleep(2 * HEARTBEAT)  # until all other nodes have read it
                self._failed(status, line)
        self.node_0_ended = self.node_0_ended or store.check(["ended 0"])

    def _listen(self) -> None:
        """Detect the loss of node 0: a call to its store may then block instead of raising an error."""
        while not self.ended.wait(HEARTBEAT):
            if self.last_response is None or self.node_0_ended:
                continue
            if time.monotonic() - self.last_response > TIMEOUT:
                self._failed(1, f"node 0 {NO_RESPONSE}")
                return

    def _failed(self, status: int, line: str) -> None:
        if not (self.ending.is_set() or self.ended.is_set()):
            self.ended.set()
            self.failed(status, line)
