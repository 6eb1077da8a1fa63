"""Who gets room in which model process, and who waits for it: first come, first served. Knows nothing else."""

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .workers import Worker


@dataclass(eq=False)
class Ticket:
    """A request for one session in each of some models."""

    blocks: Mapping[str, int]
    """By model: blocks of keys and values that it takes."""
    granted: Callable[[dict[str, Worker] | None], None]
    """Called once, with the worker of each model, where room is reserved; or with None if a model is
    lost for good."""
    moved: Callable[[int], None]
    """Called with the place in the queue, from 1, whenever it changes."""
    place: int = 0


class Admission:
    """Grants tickets while there is room, and queues the others."""

    def __init__(self, workers: Sequence[Worker], most_waiting: int):
        self.workers, self.most_waiting = workers, most_waiting
        self.queue: collections.deque[Ticket] = collections.deque()
        for worker in workers:
            worker.on_change = self.advance

    def request(self, ticket: Ticket) -> bool:
        """Grant `ticket` now or queue it. Returns False, changing nothing, if too many wait already."""
        if len(self.queue) >= self.most_waiting and (self.queue or self._find(ticket.blocks) is None):
            return False
        self.queue.append(ticket)
        self.advance()
        return True

    def leave(self, ticket: Ticket) -> None:
        """Give up waiting."""
        if ticket in self.queue:
            self.queue.remove(ticket)
            self.advance()

    def advance(self) -> None:
        """Grant what there is room for, in order, and report new places."""
        for ticket in [*self.queue]:
            if ticket in self.queue and not all(self._alive(name) for name in ticket.blocks):
                self.queue.remove(ticket)
                ticket.granted(None)
        while self.queue and (found := self._find(self.queue[0].blocks)) is not None:
            ticket = self.queue.popleft()
            for name, worker in found.items():
                worker.reserve(ticket.blocks[name])
            ticket.granted(found)
        for place, ticket in enumerate([*self.queue], 1):
            if ticket.place != place:
                ticket.place = place
                ticket.moved(place)

    def _alive(self, name: str) -> bool:
        return any(worker.spec.name == name and not worker.given_up for worker in self.workers)

    def _find(self, blocks: Mapping[str, int]) -> dict[str, Worker] | None:
        """For each model the worker with the most room, if all have some."""
        found = {}
        for name, count in blocks.items():
            able = [worker for worker in self.workers if worker.spec.name == name and worker.has_room(count)]
            if not able:
                return None
            found[name] = max(able, key=lambda worker: (worker.batch_slots, worker.blocks))
        return found
