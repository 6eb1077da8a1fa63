"""The processes of one run, as torchrun starts them, and the queue of videos that they share.

A rank claims the next video by adding 1 to a counter in torchrun's key-value store. Ranks never wait for each other,
except for rank 0, which waits for all of them before it merges their rows. When a process fails, the launcher ends the
run and the same command resumes it. Knows nothing about models, videos and result files.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

POLL = 0.5
"""Seconds between two reads of the store."""


@dataclass(frozen=True)
class Rank:
    """This process among those of the run."""

    rank: int = 0
    """Rank 0 leads the run: it plans, merges and scores."""
    world_size: int = 1
    local_rank: int = 0
    """On this node, which is also the number of its GPU."""
    local_world_size: int = 1
    node: int = 0

    @classmethod
    def from_environment(cls) -> "Rank":
        """What torchrun has set; a run of one process without torchrun."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "01010", strict=True)))

    @property
    def several_nodes(self) -> bool:
        return self.world_size != self.local_world_size


class VideoQueue:
    """Hands out the numbers of the videos that have no caption yet, each to one rank, and counts those done."""

    def __init__(self, rank: Rank):
        self.world_size = rank.world_size
        self.store: Store = PrefixStore("evaluation", _connect(rank)) if rank.world_size > 1 else HashStore()

    def publish(self, plan: dict) -> None:
        """Rank 0: tell the other ranks what to do."""
        self.store.set("plan", json.dumps(plan))

    def receive(self) -> dict:
        """The other ranks: wait until rank 0 has published the plan."""
        while not self.store.check(["plan"]):  # unlike `get`, this can be interrupted
            time.sleep(POLL)
        return json.loads(self.store.get("plan"))

    def claims(self) -> Iterator[int]:
        """0, 1, 2 … without end; each number goes to one rank of the run."""
        while True:
            yield self.store.add("claimed", 1) - 1

    def finish_one(self) -> int:
        """Count one video of this rank as done; returns how many all ranks have done."""
        return self.store.add("done", 1)

    def leave(self) -> None:
        """The other ranks: this one has written all of its rows."""
        self.store.add("left", 1)

    def wait_for_others(self, on_progress: Callable[[int], object]) -> None:
        """Rank 0: wait until all other ranks have left. `on_progress` is called with the number of videos done."""
        while self.store.add("left", 0) < self.world_size - 1:
            on_progress(self.store.add("done", 0))
            time.sleep(POLL)
        on_progress(self.store.add("done", 0))


def _connect(rank: Rank) -> TCPStore:
    """The store that torchrun runs on node 0, or rank 0's own where torchrun offers none."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=rank.rank == 0 and not agent, wait_for_workers=False)
