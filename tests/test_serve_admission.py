"""Who gets a session where: first come, first served, on the device with the most room. Without models."""

from types import SimpleNamespace

from qwen_vl_streaming.serve import catalog
from qwen_vl_streaming.serve.admission import Admission, Ticket
from qwen_vl_streaming.serve.workers import Worker


def worker(name: str, batch_slots: int, blocks: int) -> Worker:
    """A worker without a process."""
    made = Worker.__new__(Worker)
    made.spec, made.lost, made.given_up = SimpleNamespace(name=name), False, False
    made.batch_slots, made.blocks, made.listeners = batch_slots, blocks, {}
    return made


class Visitor:
    def __init__(self, admission: Admission, **blocks: int):
        self.places, self.workers = [], "waits"
        self.ticket = Ticket(blocks, self.granted, self.places.append)
        self.accepted = admission.request(self.ticket)

    def granted(self, workers) -> None:
        self.workers = workers


def test_sessions_go_where_there_is_the_most_room():
    one, other = worker("group", 3, 30), worker("group", 2, 30)
    admission = Admission([one, other], 9)
    went = [Visitor(admission, group=5).workers["group"] for _ in range(5)]
    assert (went.count(one), went.count(other)) == (3, 2) and went[0] is one
    assert Visitor(admission, group=5).places == [1]


def test_memory_counts_and_not_only_batch_slots():
    small, large = worker("group", 9, 4), worker("group", 2, 40)
    admission = Admission([small, large], 9)
    assert Visitor(admission, group=10).workers == {"group": large}
    waits = Visitor(admission, group=41)
    assert waits.workers == "waits"
    # It is not overtaken by one that would fit.
    behind = Visitor(admission, group=1)
    assert (waits.places, behind.places) == ([1], [2])
    admission.leave(waits.ticket)
    assert behind.workers == {"group": small}


def test_all_models_of_a_session_at_once():
    group, batch = worker("group", 2, 9), worker("batch", 1, 9)
    admission = Admission([group, batch], 9)
    first, second = (Visitor(admission, group=1, batch=1) for _ in "12")
    assert first.workers == {"group": group, "batch": batch} and second.workers == "waits"
    assert group.batch_slots == 1  # the second one holds nothing while it waits
    batch.free(1)
    assert second.workers == {"group": group, "batch": batch}


def test_a_queue_has_an_end_and_a_lost_model_empties_it():
    group, batch = worker("group", 0, 9), worker("batch", 1, 9)
    admission = Admission([group, batch], 2)
    first, second, third = (Visitor(admission, group=1) for _ in "123")
    assert [each.accepted for each in (first, second, third)] == [True, True, False]
    group.lost = group.given_up = True
    group.on_change()
    assert first.workers is second.workers is None and third.workers == "waits" and not admission.queue
    assert Visitor(admission, batch=1).workers == {"batch": batch}


def test_models_and_devices_are_paired_in_turn(monkeypatch):
    def pairs(names: str, devices: str) -> list[str]:
        models = {name: SimpleNamespace(spec=lambda _, device, name=name: name + device) for name in names}
        return catalog.place(models, SimpleNamespace(devices=tuple(devices)))

    assert pairs("a", "0") == ["a0"] and pairs("a", "012") == ["a0", "a1", "a2"]
    assert pairs("abc", "0") == ["a0", "b0", "c0"] and pairs("ab", "01") == ["a0", "b1"]
    assert pairs("ab", "0123") == ["a0", "b1", "a2", "b3"] and pairs("abc", "01") == ["a0", "b1", "c0"]
