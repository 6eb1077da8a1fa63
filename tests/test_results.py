"""Result files: a killed run loses no finished row, and invalid rows are reported."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import write_file
from results import (
    CAPTION_FIELDS,
    FIELDS,
    SKIPPED_FIELDS,
    appender,
    exclusive_writer,
    hash_rows,
    load_all,
    load_finished,
    load_skipped,
    merge_parts,
    rows_part,
    scores_of,
    sibling,
    skipped_part,
)


def row(video_id: str, **changes) -> dict:
    return {
        "video_id": video_id,
        "annotation": "The video shows a red square.",
        "task": "caption",
        "result": "a été\u2028\ud83d red\nsquare",  # U+2028 and a lone surrogate: both break careless JSON Lines
        "variant": "group",
        "schedule": [3, 2],
        "tokens": [5, 6, 7, 8, 9],
        "slots": [1, 1, 1, 2, 2],
        "clips": 2,
        "seconds": 0.1,
        **changes,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "output" / "group_infer.json"


def fill(path: Path, *ids: str) -> None:
    with appender(path) as append:
        for video_id in ids:
            append(row(video_id))


def test_rows_are_read_as_written(path: Path) -> None:
    assert load_finished(path) == {}
    fill(path, "b", "a")
    fill(path, "c")
    assert load_finished(path) == {video_id: row(video_id) for video_id in "bac"}
    assert list(load_finished(path)) == ["b", "a", "c"]
    assert len(path.read_bytes().splitlines()) == len(path.read_text().splitlines()) == 3
    assert set(row("a")) == set(FIELDS)


def test_a_row_is_on_the_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(path.read_bytes()), fsync(number)))
    with appender(path) as append:
        for count, video_id in enumerate("ab", start=1):
            append(row(video_id))
            assert len(synced) == count and synced[-1].count(b"\n") == count
            assert video_id in load_finished(path)


def test_every_incomplete_last_line_is_repaired(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(path, "a", "b")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole) - 1):  # the second row, short by at least its closing brace
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert list(load_finished(path)) == ["a"]
        assert str(path) in caplog.text and "line 2" in caplog.text
    assert path.read_bytes() == whole[:cut], "reading must not write"
    fill(path, "b")
    assert path.read_bytes() == whole

    caplog.clear()
    path.write_bytes(whole[:-1])  # a whole row that lacks only its newline is a whole row
    assert list(load_finished(path)) == ["a", "b"] and not caplog.text
    fill(path, "c")
    assert list(load_finished(path)) == ["a", "b", "c"]

    path.write_bytes(whole[: first // 2])  # the only row, cut
    fill(path, "a", "b")
    assert path.read_bytes() == whole


def test_a_killed_writer_leaves_complete_rows(path: Path) -> None:
    writer = (
        "from pathlib import Path; from itertools import count; from test_results import appender, row\n"
        f"with appender(Path({str(path)!r})) as append:\n"
        "    for number in count():\n"
        "        append(row(str(number)))\n"
        "        print(number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, env=environment)
    last = 0
    while last < 20:
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].split()
    last = int(said[-1]) if said else last
    found = list(load_finished(path))
    assert found[: last + 1] == [str(number) for number in range(last + 1)]
    assert len(found) - (last + 1) in (0, 1)  # the row that was written but not reported yet


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"video_id": "b"', "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[1]", "found list"),
        (b'{"video_id": "b"}', "no 'annotation'"),
        (json.dumps(row("b", tokens="5 6")).encode(), "'tokens' is '5 6', a str"),
        (json.dumps(row("a")).encode(), "'a' is already in line 1"),
    ],
)
def test_an_invalid_line_is_named(path: Path, line: bytes, says: str) -> None:
    fill(path, "a", "c")
    first, third = path.read_bytes().splitlines(keepends=True)
    before = first + line + b"\n" + third
    path.write_bytes(before)
    for read in (load_finished, lambda path: fill(path, "d"), lambda path: load_all(path, "abcd")):
        with pytest.raises(InputError) as error:
            read(path)
        message = str(error.value)
        assert f"{path}, line 2: " in message and says in message and "\n" not in message
        assert path.read_bytes() == before


def test_a_file_of_another_program(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('\ufeff{"video_id": "a", "annotation": ["x", "y"], "result": "x", "mine": 1}\r\n\r\n')
    assert load_finished(path, CAPTION_FIELDS) == {
        "a": {"video_id": "a", "annotation": ["x", "y"], "result": "x", "mine": 1}
    }
    with pytest.raises(InputError, match="no 'task'"):
        load_finished(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_finished(path.parent)


def test_append_refuses_invalid_rows(path: Path) -> None:
    fill(path, "a")
    whole = path.read_bytes()
    with appender(path) as append:
        with pytest.raises(ValueError, match="already has a row"):
            append(row("a"))
        with pytest.raises(ValueError, match="no 'slots'"):
            append({name: value for name, value in row("b").items() if name != "slots"})
        with pytest.raises(ValueError, match="'clips'"):
            append(row("b", clips="2"))
    assert path.read_bytes() == whole


def test_parts_are_merged_in_the_order_of_the_data(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For any number of processes: rows in the file stay, and an incomplete row is ignored."""
    fill(path, "d")
    for process, ids in {"0-0": "ca", "0-1": "ad", "1-0": "f"}.items():
        fill(rows_part(path, process), *ids)
    with rows_part(path, "1-0").open("ab") as file:
        file.write(json.dumps(row("e")).encode()[:-9])
    with appender(skipped_part(path, "0-1"), SKIPPED_FIELDS) as append:
        append({"video_id": "b", "reason": "gone"})
    rows = load_all(path, "abcdef")
    assert rows == [row("a"), row("c"), row("d"), row("f")] and caplog.text.count("dropped") == 1
    assert load_skipped(path) == {"b": {"video_id": "b", "reason": "gone"}}
    merge_parts(path, rows)
    assert list(load_finished(path)) == ["a", "c", "d", "f"] == [each["video_id"] for each in load_all(path, "abcdef")]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_rows_that_are_not_in_the_data_are_refused(path: Path) -> None:
    fill(path, "c", "a")
    fill(rows_part(path, "0-0"), "d")
    whole = path.read_bytes()
    with pytest.raises(InputError, match="'d', which is not in the data"):
        load_all(path, ["a", "c"])
    assert path.read_bytes() == whole and list(load_finished(rows_part(path, "0-0"))) == ["d"]


def test_no_rows_no_file(path: Path) -> None:
    merge_parts(path, load_all(path, "ab"))
    assert not path.exists()


def test_one_writer_at_a_time(path: Path) -> None:
    """The lock is released when its process ends, in any way."""
    holder = (
        "import sys; from pathlib import Path; from results import exclusive_writer\n"
        f"with exclusive_writer(Path({str(path)!r})):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1, env=environment)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another run is writing"), exclusive_writer(path):
        pass
    process.kill()
    process.wait()
    with exclusive_writer(path):
        assert [each.suffix for each in path.parent.iterdir()] == [".lock"]
    assert not list(path.parent.iterdir())


def test_a_lock_file_removed_by_its_owner_is_not_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner ends between the opening of the file and its locking here: the next run is not admitted either."""
    ends, lock = [path.with_suffix(".lock")], fcntl.lockf

    def late(file, how: int) -> None:
        if ends:
            ends.pop().unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    other = "import sys; from pathlib import Path; from results import exclusive_writer\n"
    other += f"with exclusive_writer(Path({str(path)!r})): print('held too')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with exclusive_writer(path):
        ended = subprocess.run([sys.executable, "-c", other], capture_output=True, env=environment)
        assert b"another run is writing" in ended.stderr and not ended.stdout
    assert not list(path.parent.iterdir())


def test_siblings(tmp_path: Path) -> None:
    assert sibling(tmp_path / "group_infer.json", "scores.json") == tmp_path / "group_scores.json"
    assert sibling(tmp_path / "mine.json", "scores.json") == tmp_path / "mine.scores.json"


def test_a_file_is_written_completely_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(path, b"old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\): free some space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    rows = path.with_name("rows.jsonl")
    with pytest.raises(InputError, match="No space left"), appender(rows, {"video_id": str}) as append:
        append({"video_id": "1"})
    monkeypatch.undo()
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and sorted(path.parent.iterdir()) == sorted([path, rows])


def test_scores_are_those_of_the_captions(path: Path) -> None:
    fill(path, "a", "b")
    rows, scores = list(load_finished(path).values()), sibling(path, "scores.json")
    assert scores_of(path, rows) == ({}, "group_scores.json does not exist")
    other = [{**row, "result": "another caption"} for row in rows]
    for made, of_these, of_others in (
        ({"captions": hash_rows(rows), "count": 2}, True, False),
        ({"captions": hash_rows(other), "count": 2}, False, True),
        ({"count": 2}, True, True),  # of an earlier version
        ({"count": 3}, False, False),
    ):
        scores.write_text(json.dumps(made))
        for captions, same in ((rows, of_these), (other, of_others)):
            found, reason = scores_of(path, captions)
            assert found == (made if same else {}) and ("group_scores.json is of other captions" in reason) != same


def test_new_captions_remove_what_was_computed_from_earlier_ones(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(path, "a", "b")
    computed = [sibling(path, what) for what in ("scores.json", "per_video.jsonl", "timeliness.jsonl")]
    for file in (*computed, sibling(path, "judge.jsonl")):  # the judge's answers are found by the captions
        file.write_text("{}")
    merge_parts(path, load_all(path, "ab"))  # nothing new
    assert all(file.exists() for file in computed) and not caplog.text
    with appender(rows_part(path, "0")) as append:
        append(row("c"))
    merge_parts(path, load_all(path, "abc"))
    assert not any(file.exists() for file in computed) and sibling(path, "judge.jsonl").exists()
    assert "group_scores.json removed, as it is of other captions than group_infer.json has now" in caplog.text
    computed[0].write_text("{}")
    path.unlink()
    merge_parts(path, [row("a")])  # made anew under the same name
    assert not computed[0].exists()
