"""The seconds from the command to the first optimizer step, and the benchmark that shows them."""

import os

import pytest
from qwenvl import startup as module
from qwenvl.startup import TIMES, Startup
from sft_runs import Run, empty_cache, show_startup


@pytest.fixture
def clock(monkeypatch):
    """Sets the time."""

    def at(seconds: float) -> None:
        monkeypatch.setattr(module.time, "time", lambda: seconds)

    return at


@pytest.mark.parametrize("times, before", [("", {}), ("90.5 97.0", {"planning": 6.5, "launcher": 3.0})])
def test_the_parts_add_up_to_the_time_since_the_command(monkeypatch, clock, times, before):
    monkeypatch.setenv(TIMES, times)
    clock(100.0)
    startup = Startup()
    for now, part in (104.0, "imports"), (104.5, "model"), (110.0, "first step"), (120.0, "model"):
        clock(now)
        startup.end(part)  # the last is of the second step, and does not count
    assert startup.seconds == {**before, "imports": 4.0, "model": 0.5, "first step": 5.5}
    assert str(startup).startswith(f"first step after {110 - (90.5 if times else 100):.1f} s: ")


def test_the_same_run_twice(monkeypatch, tmp_path, capsys):
    """It starts with what the first has compiled, and has an output of its own."""
    runs = Run.parse_all(["2:zero3.json", "2x2:zero2.json", "2:zero3.json", "2:zero3.json"])
    assert [chosen.name for chosen in runs] == ["2-zero3", "2x2-zero2", "2-zero3-2", "2-zero3-3"]
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "compiled/inductor").mkdir(parents=True)
    (tmp_path / "compiled/inductor/old").touch()
    empty_cache(tmp_path)
    assert not (tmp_path / "compiled").exists()
    assert all(value.startswith(f"{tmp_path}/compiled/") for value in os.environ.values()) and len(os.environ) == 2
    show_startup({"1-none": {"imports": 2.0, "model": 1.0}, "2-zero3": {"planning": 3.0, "model": 1.5}})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["1-none", "3.0", "2.0", "1.0", "0.0"], ["2-zero3", "4.5", "0.0", "1.5", "3.0"]]
