"""Training and evaluation read the rows of a data set with one reader, which reports the same errors for both."""

import json
import socket
from pathlib import Path

import datasets
import pytest
import tasks
from planning import read_data
from qwen_vl_streaming.common.data_rows import check_data_rows, hash_data, read_data_rows
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import find_data
from qwen_vl_streaming.common.tables import HUB
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
        b"\xef\xbb\xbf" + b"\n\xef\xbb\xbf".join(LINES) + b"\n\xef\xbb\xbf\n",  # concatenated files
    ],
    ids=["no end", "blank end", "blank lines", "CRLF", "BOM", "BOMs"],
)
def test_both_accept(tmp_path, text):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(text)
    trained = [{name: row[name] for name in ROWS[0]} for row in read_rows(data)]
    assert trained == ROWS and [row["video_path"] for row in evaluated(data)] == ["a.mp4", "b.mp4"]


def test_line_numbers_count_blank_lines(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b"\n" + LINES[0] + b"\n\n" + LINES[1])
    assert [number for number, _ in read_data_rows(data)] == [2, 4]


def test_values_keep_their_type(tmp_path):
    """`datasets` would convert strings that look like dates to dates, and a large integer to a float."""
    data = tmp_path / "rows.jsonl"
    rows = [{**ROWS[0], "video_id": "2026-01-01", "human_caption": "2026-01-01"}, {**ROWS[1], "video_id": 10**30}]
    data.write_text("\n".join(map(json.dumps, rows)))
    assert [row for _, row in read_data_rows(data)] == rows


@pytest.mark.parametrize("read", [read_rows, evaluated])
@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "line 3: is not JSON (Expecting property name"),
        (b"[]", "line 3: is not a JSON object: correct or delete this row"),
        (b"\xff", "line 3: cannot be read as UTF-8 (byte 1)"),
        ('{"video_id": "ü"}'.encode("utf-16"), "line 3: cannot be read as UTF-8"),
        (LINES[0], "lines 1 and 3 both have the video_id a"),
        (rb'{"video_id": "c", "video_path": "\udc80", "human_caption": "b"}', "line 3: video_path has an unpaired"),
        (b'{"video_id": "c", "video_path": 1, "human_caption": "b"}', "line 3: has the video_path 1, which is not a"),
        (b'{"video_id": [], "video_path": "a", "human_caption": "b"}', "line 3: has the video_id [], which is not a"),
    ],
)
def test_both_refuse_with_the_same_message(tmp_path, read, line, reason):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b"\n".join([*LINES, line]) + b"\n")
    with pytest.raises(InputError) as raised:
        read(data)
    message = str(raised.value)
    assert reason in message and "\n" not in message and "Error" not in message, message


@pytest.mark.parametrize("read", [read_rows, evaluated, lambda path: [*check_data_rows(path)]])
@pytest.mark.parametrize(
    "name, start, what",
    [
        ("rows.csv", b"video_id,video_path,human_caption\na,a.mp4,b\n", "a CSV file"),
        ("rows.TSV", b"video_id\tvideo_path\n", "a TSV file"),
        ("rows.json", b'\xef\xbb\xbf\n [\n{"video_id": 1}]', "a JSON array"),
        ("rows.jsonl", b"[{}]", "a JSON array"),
        ("rows", b"PAR1\x00\n", "a Parquet file whose name does not end in .parquet"),
        ("rows.xlsx", b"PK\x03\x04", "an Excel or zip file"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08", "compressed by gzip"),
    ],
)
def test_other_formats_are_named(tmp_path, read, name, start, what):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(InputError) as raised:
        read(tmp_path / name)
    how = "not JSON Lines: convert it, see 'Captions of your own' in docs/data.md"
    assert str(raised.value) == f"{tmp_path / name} is {what}, {how}"


def test_json_lines_may_have_any_name(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\n".join(LINES))
    assert len([*read_data_rows(tmp_path / "rows.csv")]) == 2


@pytest.mark.parametrize("read", [read_rows, evaluated])
def test_a_file_of_blank_lines_has_no_rows(tmp_path, read):
    (tmp_path / "rows.jsonl").write_text("\n\r\n \n")
    with pytest.raises(InputError, match="has no rows"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("seconds", ["1" + "0" * 400, "NaN", "Infinity", "-1", '"long"', "[1]"])
def test_invalid_durations(tmp_path, seconds):
    data = tmp_path / "rows.jsonl"
    data.write_bytes(LINES[0][:-1] + b', "video_duration_in_s": ' + seconds.encode() + b"}\n")
    with pytest.raises(InputError, match="line 1: video_duration_in_s is '"):
        evaluated(data)


@pytest.fixture
def offline(monkeypatch):
    """Fails if a host name is looked up."""

    def look_up(host, *_, **__):
        raise AssertionError(f"{host} was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def save(rows: list[dict], folder: Path) -> list[str]:
    """`rows` as a Parquet file, as two files that match a pattern, and as a folder of `save_to_disk`."""
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "rows.parquet")
    for number, part in enumerate((table.select([0]), table.select(range(1, len(rows))))):
        part.to_parquet(folder / f"train-{number}.parquet")
    datasets.DatasetDict({"train": table}).save_to_disk(folder / "disk")
    return [str(folder / name) for name in ("rows.parquet", "train-*.parquet", "disk/train")]


def test_tables_have_the_same_rows(tmp_path, offline, monkeypatch):
    """In the same order, with the same hash, without a network, and without writing a file next to them."""
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "references": ["A square.", "Red."], "question": None} for row in ROWS]
    sources = save(rows, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for source in sources:
        assert find_data(str(Path(source).relative_to(tmp_path)), tmp_path / "project", "the data") == source
        assert list(read_data_rows(source)) == list(enumerate(rows, 1))
        assert [row["video_id"] for row in read_rows(source)] == ["a", "b"]
        assert [row["annotation"] for row in evaluated(source)] == [["A square.", "Red."]] * 2
    assert len({hash_data(source) for source in sources}) == 1 and sorted(tmp_path.rglob("*")) == before
    (tmp_path / "other").mkdir()
    assert hash_data(save(rows[::-1], tmp_path / "other")[0]) != hash_data(sources[0])


@pytest.mark.parametrize("read", [read_rows, evaluated])
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"video_id": "a"}, ", rows 1 and 2 both have the video_id a"),
        ({"video_path": None}, ", row 2: has the video_path null, which is not a string"),
        ({"video_id": None}, ", row 2: has the video_id null"),
        ({"question": " "}, ', row 2: has the question " "'),
    ],
)
def test_rows_of_tables_are_refused_with_their_number(tmp_path, read, change, reason):
    for source in save([{**ROWS[0], "question": None}, {**ROWS[1], **change}], tmp_path):
        with pytest.raises(InputError) as raised:
            read(source)
        assert str(raised.value).startswith(f"{source}{reason}")


def test_tables_that_cannot_be_read(tmp_path, monkeypatch):
    save(ROWS, tmp_path)
    (tmp_path / "half.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    datasets.Dataset.from_list([{"video_id": "a", "text": "b"}]).to_parquet(tmp_path / "columns.parquet")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("half.parquet", "half.parquet cannot be read ("),
        ("columns.parquet", "columns.parquet has no column video_path (its columns: video_id, text): rename its"),
        ("disk", f"has several splits: give the folder of one split, {tmp_path / 'disk/train'}"),
    ):
        with pytest.raises(InputError) as raised:
            read_rows(str(tmp_path / name))
        assert reason in str(raised.value) and "\n" not in str(raised.value)
    for name, reason in (("none-*.parquet", "matches no file"), ("empty", "was not written by `Dataset.save_to_disk`")):
        with pytest.raises(InputError, match=reason):
            find_data(str(tmp_path / name), tmp_path, "the data")


def test_a_split_of_the_hub(monkeypatch, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    splits = {"train": table, "test": table.select([1])}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or splits)
    assert find_data(f"{HUB}me/videos:test", tmp_path, "the data") == f"{HUB}me/videos:test"
    assert [row["video_id"] for row in read_rows(f"{HUB}me/videos:test")] == ["b"] and asked == ["me/videos"]
    for source, reason in ((f"{HUB}me/videos", "has several splits"), (f"{HUB}me/videos:dev", "has no split 'dev'")):
        with pytest.raises(InputError, match=f"{reason}: choose one of train, test, as in {HUB}OWNER/NAME:SPLIT"):
            read_rows(source)
    splits.pop("test")
    assert read_rows(f"{HUB}me/videos") == read_rows(f"{HUB}me/videos:train")

    def configured(name):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", configured)
    with pytest.raises(InputError, match=r"me/videos has several configurations: save one with `load_dataset\("):
        read_rows(f"{HUB}me/videos")

    def unreachable(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError, match=r"me/videos cannot be read \(Couldn't reach 'me/videos' on the Hub\): check its"
    ):
        read_rows(f"{HUB}me/videos")


TIMED = {"video_id": "t", "video_path": "t.mp4", "segments": [{"start": 0, "end": 1.5, "text": "A ring."}]}


def test_rows_with_times_need_no_caption(tmp_path):
    """In JSON Lines and in tables; a caption may be null beside them."""
    rows = [TIMED, {**TIMED, "video_id": "u", "human_caption": None, "segment_time": "spread"}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read_data_rows(lines)] == rows
    datasets.Dataset.from_list([TIMED]).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list([{**ROWS[0], **TIMED}, {**ROWS[1], "segments": None}]).save_to_disk(tmp_path / "both")
    (table,) = [row for _, row in read_data_rows(tmp_path / "a.parquet")]
    both = [row for _, row in read_data_rows(tmp_path / "both")]
    assert table["segments"] == TIMED["segments"] == both[0]["segments"] and both[1]["segments"] is None
    assert [row["annotation"] for row in read_data(lines, None, DESCRIPTION)] == ["A ring.", "A ring."]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": None}, "line 1: has the human_caption null, which is not a string"),
        ({"segments": "A ring."}, 'line 1: has the segments "A ring.", which are not a list'),
        ({"segments": ["A ring."]}, 'line 1: segment 1, "A ring.", is not an object with start, end and text'),
        ({"segments": [{"start": 0, "end": 1}]}, 'line 1: segment 1, {"start": 0, "end": 1}, is not an object with'),
        (
            {"segments": [{"start": "0", "end": 1, "text": "a"}]},
            "has a start or an end that is not a number of seconds",
        ),
        (
            {"segments": [{"start": 0, "end": True, "text": "a"}]},
            "has a start or an end that is not a number of seconds",
        ),
        ({"segments": [{"start": 0, "end": 10**400, "text": "a"}]}, "has a start or an end that is not a number"),
        ({"segments": [{"start": 0, "end": 1, "text": "\ud800"}]}, "line 1: text has an unpaired surrogate"),
        ({"segment_time": "middle"}, 'line 1: has the segment_time "middle", which is not one of end, start, spread'),
    ],
)
def test_segments_of_another_form_are_refused(tmp_path, changes, message):
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({**TIMED, "human_caption": None, **changes}) + "\n")
    with pytest.raises(InputError) as raised:
        list(read_data_rows(data))
    assert message in str(raised.value) and str(raised.value).startswith(str(data))
