"""Training and evaluation read a data set's rows by one reader, with the same faults in the same lines."""

import json

import pytest
import tasks
from planning import read_data
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError
from qwenvl.rows import read_rows

ROWS = [{"video_id": name, "video_path": f"{name}.mp4", "human_caption": "A red square."} for name in "ab"]
LINES = [json.dumps(row).encode() for row in ROWS]
DESCRIPTION = tasks.TASKS["description"]


def evaluated(data):
    return read_data(data, limit=None, task=DESCRIPTION)


@pytest.mark.parametrize(
    "text",
    [
        b"\n".join(LINES),
        b"\n".join(LINES) + b"\n\n",
        b"\n \t\n" + b"\n\n".join(LINES) + b"\n  ",
        b"\r\n".join(LINES) + b"\r\n\r\n",
        b"\xef\xbb\xbf" + b"\n".join(LINES) + b"\n",
        b"\xef\xbb\xbf" + b"\n\xef\xbb\xbf".join(LINES) + b"\n\xef\xbb\xbf\n",  # files put one after the other
    ],
    ids=["no end", "blank end", "blank lines", "CRLF", "BOM", "BOMs"],
)
def test_what_both_accept(tmp_path, text):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(text)
    trained = [{name: row[name] for name in ROWS[0]} for row in read_rows(data)]
    assert trained == ROWS and [row["video_path"] for row in evaluated(data)] == ["a.mp4", "b.mp4"]


def test_lines_are_counted_with_the_blank_ones(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b"\n" + LINES[0] + b"\n\n" + LINES[1])
    assert [number for number, _ in read_data_rows(data)] == [2, 4]


@pytest.mark.parametrize("read", [read_rows, evaluated])
@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "line 3: is not JSON (Expecting property name"),
        (b"[]", "line 3: is not a row"),
        (b"\xff", "line 3: cannot be read as UTF-8 (byte 1)"),
        ('{"video_id": "ü"}'.encode("utf-16"), "line 3: cannot be read as UTF-8"),
        (LINES[0], "lines 1 and 3 both have the video_id a"),
        (rb'{"video_id": "c", "video_path": "\udc80", "human_caption": "b"}', "line 3: video_path holds half"),
        (b'{"video_id": "c", "video_path": 1, "human_caption": "b"}', "line 3: has no text as its video_path, but 1"),
        (b'{"video_id": [], "video_path": "a", "human_caption": "b"}', "line 3: has [] as its video_id"),
    ],
)
def test_what_both_refuse_in_the_same_words(tmp_path, read, line, reason):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b"\n".join([*LINES, line]) + b"\n")
    with pytest.raises(InputError) as raised:
        read(data)
    said = str(raised.value)
    assert reason in said and "\n" not in said and "Error" not in said, said


@pytest.mark.parametrize("read", [read_rows, evaluated])
def test_a_file_of_blank_lines_has_no_rows(tmp_path, read):
    (tmp_path / "rows.jsonl").write_text("\n\r\n \n")
    with pytest.raises(InputError, match="has no rows"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("seconds", ["1" + "0" * 400, "NaN", "Infinity", "-1", '"long"', "[1]"])
def test_durations_that_are_none(tmp_path, seconds):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(LINES[0][:-1] + b', "video_duration_in_s": ' + seconds.encode() + b"}\n")
    with pytest.raises(InputError, match="line 1: video_duration_in_s is '"):
        evaluated(data)
