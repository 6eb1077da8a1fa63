"""Progress: a live bar on a terminal and an occasional line in a log, with the same class in every program."""

import io
import re
import time
from pathlib import Path

import pytest
from qwen_vl_streaming.common import progress
from qwen_vl_streaming.common.progress import Progress

CODE = Path(__file__).parents[1] / "code"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(file: io.StringIO, seconds: float = 0.0) -> str:
    for _ in Progress(range(8), "watching", unit="video", file=file):
        time.sleep(seconds)
    return file.getvalue()


def test_a_terminal_has_a_bar():
    shown = count(Terminal())
    assert "\r" in shown and "100%|" in shown and "8/8" in shown


def test_a_log_has_a_line_at_the_end():
    assert re.fullmatch(r"watching: 8/8 videos in 00:00\n", count(io.StringIO()))


def test_a_log_has_an_occasional_line(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    *some, last = count(io.StringIO(), 0.03).splitlines()
    assert 1 <= len(some) <= 3 and last == "watching: 8/8 videos in 00:00"
    assert all(re.fullmatch(r"watching: [3-7]/8 videos in 00:00, 00:00 left", line) for line in some)


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
