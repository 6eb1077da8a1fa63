"""Progress: a live bar on a terminal and an occasional line in a log, with the same class in every program."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from qwen_vl_streaming.common import progress
from qwen_vl_streaming.common.progress import Progress
from tqdm import std

CODE = Path(__file__).parents[1] / "code"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time in seconds, which moves only when a test says so."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(std, "time", lambda: clock.seconds)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


def count(file: io.StringIO) -> str:
    for _ in Progress(range(8), "watching", unit="video", file=file):
        pass
    return file.getvalue()


def test_a_terminal_has_a_bar():
    shown = count(Terminal())
    assert "\r" in shown and "100%|" in shown and "8/8" in shown


def test_a_log_has_a_line_at_the_end():
    assert re.fullmatch(r"watching: 8/8 videos in 00:00\n", count(io.StringIO()))


def test_a_log_has_an_occasional_line(clock):
    log = io.StringIO()
    for _ in Progress(range(8), "watching", unit="video", file=log):
        clock.seconds += 12
    assert log.getvalue().splitlines() == [
        "watching: 3/8 videos in 00:36, 01:00 left",
        "watching: 6/8 videos in 01:12, 00:24 left",
        "watching: 8/8 videos in 01:36",
    ]


def test_refresh_does_not_add_lines_to_a_log():
    log = io.StringIO()
    with Progress(total=4, initial=1, unit="shards", file=log) as bar:
        for number in range(3):
            bar.set_postfix_str(f"{number} samples")
            bar.update()
            bar.clear()
    assert log.getvalue() == "4/4 shards in 00:00, 2 samples\n"


@pytest.mark.parametrize("options", [{"total": 0}, {"total": 5, "disable": True}])
def test_empty_work_is_not_reported(options):
    log = io.StringIO()
    Progress(file=log, **options).close()
    assert log.getvalue() == ""


def test_an_unknown_total_is_counted_and_an_error_keeps_the_count():
    log = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        for number in Progress(iter((1, 1, 0)), "read", file=log):
            1 // number
    assert log.getvalue() == "read: 2 in 00:00\n"


def test_every_program_uses_this_class():
    own = {path.name for path in CODE.rglob("*.py") if re.search(r"from tqdm(\.auto)? import", path.read_text())}
    assert own == {"progress.py"}
