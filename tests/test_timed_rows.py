"""`mani_data.py --dataset segments`: captions with times in their published shapes become rows with `segments`, and
training and evaluation read them."""

import json
import random
from pathlib import Path

import pytest
from media import make_video
from preparation.subtitles import Cue, read_srt, read_webvtt
from preparation.timed_formats import FORMATS
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.timeline.segments import check_segments, in_order, join_segments

import mani_data


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two videos of 6 and 4 seconds, six.mp4 and v_four.mkv."""
    folder = tmp_path_factory.mktemp("films")
    make_video(folder / "six.mp4", seconds=6, size=(64, 48))
    make_video(folder / "v_four.mkv", seconds=4, size=(64, 48))
    return folder


def convert(monkeypatch, folder: Path, films: Path, *flags: str) -> None:
    monkeypatch.chdir(folder)
    where = ["--output", "out/my.jsonl", "--video-root", str(films), "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["mani_data.py", "--dataset", "segments", *where, *flags])
    run(mani_data.main)


def rows(folder: Path) -> list[dict]:
    return [row for _, row in read_data_rows(folder / "out/my.jsonl")]


def skipped(folder: Path) -> list[tuple[str, str]]:
    listed = map(json.loads, (folder / "out/my_skipped.jsonl").read_text().splitlines())
    return [(Path(row["where"]).name, row["reason"]) for row in listed]


def texts(row: dict) -> list[tuple[float, float, str]]:
    return [(segment["start"], segment["end"], segment["text"]) for segment in row["segments"]]


def conversation(video: dict, words: list, text: str = "Comment.", **context) -> str:
    """A line of LiveCC's files."""
    user = [{"type": "video", **video}, {"type": "text", "text": text, **context}]
    stream = [{"type": "text_stream", "text_stream": words}]
    return json.dumps([{"role": "user", "content": user}, {"role": "assistant", "content": stream}])


def test_livecc(films, tmp_path, monkeypatch, capsys):
    """Times of a row count from the start of its part of the video; in LiveCC, from the start of the video."""
    part = {"video": "video/youtube/six.mp4", "video_start": 2, "video_end": 5}
    lines = [
        conversation({"video": "video/youtube/six.mp4"}, [[0.1, 0.4, " He"], [0.35, 1.2, "shoots"]], title="Football"),
        conversation(part, [[2.5, 3.0, "Go!"], [4.0, 4.9, "Yes!"]]),
        conversation(part, [[0.5, 1.0, "Early"]]),
        conversation({"video": "gone.mp4"}, [[0.5, 1.0, "Hm"]]),
        json.dumps([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
        "{",
        conversation({"video": "six.mp4"}, [[0.5, "x", "Hm"]]),
        conversation({"video": "six.mp4"}, [[6.5, 7.5, "Late"]]),
        conversation({**part, "video_end": None}, [[5, 6.5, "Yes!"]]),
        conversation({**part, "video_end": 4}, [[4.5, 5.1, "Yes!"]]),
        conversation({**part, "video_end": 8}, [[4, 5, "Yes!"]]),
        conversation({**part, "video_end": 2}, [[4, 5, "Yes!"]]),
        json.dumps([0, 100, 200]),
    ]
    (tmp_path / "live.jsonl").write_text("\n".join(lines) + "\n")
    convert(monkeypatch, tmp_path, films, "--format", "livecc", "--input", "live.jsonl")
    first, second, to_the_end = rows(tmp_path)
    assert texts(first) == [(0.1, 0.4, "He"), (0.35, 1.2, "shoots")] and first["question"] == "Comment."
    assert (first["video_id"], first["video_duration_in_s"], first["segment_time"]) == ("six", 6.0, "end")
    assert texts(second) == [(0.5, 1.0, "Go!"), (2.0, 2.9, "Yes!")] and second["video_id"] == "six_2-5"
    named = ("video_path", "video_start", "video_end", "video_duration_in_s")
    assert [second[name] for name in named] == [first["video_path"], 2, 5, 6] and "video_start" not in first
    assert texts(to_the_end) == [(3, 4.5, "Yes!")] and "video_end" not in to_the_end
    assert [(where, reason[:48]) for where, reason in skipped(tmp_path)] == [
        ("live.jsonl, line 3", "segments are not valid: segment 1 (-1.5 to -1 s)"),
        ("live.jsonl, line 4", "video is missing: video gone.mp4 does not exist "),
        ("live.jsonl, line 5", "row has 0 videos and 0 text streams: one of each"),
        ("live.jsonl, line 6", "row is not JSON: Expecting property name enclose"),
        ("live.jsonl, line 7", "text_stream is not a number of seconds: 'x'"),
        ("live.jsonl, line 8", "segments are not valid: segment 1 (6.5 to 7.5 s)"),
        ("live.jsonl, line 10", "segments are not valid: segment 1 (2.5 to 3.1 s)"),
        ("live.jsonl, line 11", f"part of the video is missing: video {films}"[:48]),
        ("live.jsonl, line 12", "part of the video is not valid: has the video_en"),
    ]
    said = capsys.readouterr().out
    assert "live.jsonl: 12 samples, 3 rows in out/my.jsonl" in said and "dropped" not in said
    report = json.loads((tmp_path / "out/my_report.json").read_text())["splits"]["live.jsonl"]
    assert report["kept"] == 3 and report["bad"] == 9


def test_activitynet(films, tmp_path, monkeypatch, caplog):
    """Dense captions may overlap; each is written from its end."""
    (tmp_path / "val.json").write_text(
        json.dumps(
            {
                "v_four": {
                    "duration": 4.02,
                    "timestamps": [[0, 4.02], [0.5, 1.5], [1.2, 3]],
                    "sentences": ["All in all.", " A red ring. ", "It turns blue."],
                },
                "six": {"duration": 9.5, "timestamps": [[0, 1]], "sentences": ["A ring."]},
                "v_backward": {"timestamps": [[3, 1]], "sentences": ["A ring."]},
                "v_uneven": {"timestamps": [[3, 4]], "sentences": []},
            }
        )
    )
    (films / "v_backward.mp4").write_bytes((films / "six.mp4").read_bytes())
    convert(monkeypatch, tmp_path, films, "--format", "activitynet", "--input", "val.json")
    (row,) = rows(tmp_path)
    assert texts(row) == [
        (0.5, 1.5, "A red ring."),
        (1.2, 3, "It turns blue."),
        (0, 4.02, "All in all."),
    ]  # as published
    assert row["video_id"] == "v_four" and row["segment_time"] == "end" and "question" not in row
    assert skipped(tmp_path) == [
        ("val.json, six", "video is shorter than its JSON says: 6.00 s instead of 9.50 s"),
        (
            "val.json, v_backward",
            "segments are not valid: segment 1 (3 to 1 s) ends before it starts: correct or remove the row",
        ),
        ("val.json, v_uneven", "timestamps and sentences are not lists of the same length"),
    ]
    assert "1 rows had segments that were not in the order in which they are written: sorted" in caplog.text


def test_joyai(films, tmp_path, monkeypatch):
    def entry(question: list, response: list, **changes) -> dict:
        said = [{"content": text, "time": time} for time, text in response]
        asked = [{"content": text, "time": time} for time, text in question]
        return {"video_name": "six.mp4", "video_path": "", "question": asked, "response": said, **changes}

    (tmp_path / "a").mkdir()
    entries = [
        entry([("1", "Tell me when it rings.")], [("5", "Again."), ("3", "It rings.")]),
        entry([], [("2.5", "A ring.")], video_path="/elsewhere/six.mp4"),
        entry([("1", "One?"), ("2", "Two?")], [("3", "Yes.")]),
        entry([("4", "What now?")], [("3", "It rings.")]),
        entry([], [("soon", "It rings.")]),
        entry([], [("3", "")]),
        entry([], []),
    ]
    (tmp_path / "a/x.json").write_text(json.dumps(entries))
    convert(monkeypatch, tmp_path, films, "--format", "joyai", "--input", "a")
    asked, unasked = rows(tmp_path)
    assert texts(asked) == [(3, 3, "It rings."), (5, 5, "Again.")] and asked["question"] == "Tell me when it rings."
    assert texts(unasked) == [(2.5, 2.5, "A ring.")] and unasked["video_id"] == "six:2"
    assert [reason for _, reason in skipped(tmp_path)] == [
        "entry has several questions: 2, and a stream is asked one",
        "response comes before its question",
        "time is not a number of seconds: 'soon'",
        "text is not text: ''",
        "segments are not valid: it has no segments: correct or remove the row",
    ]


SRT = """\ufeff1\r
00:00:00,500 --> 00:00:02,000 X1:10 X2:20\r
<i>Look &amp; see</i>\r
the {\\an8}ring < 3\r
\r
00:00:01,500 --> 00:00:03,25\r
No counter\r
\r
or pause\r
\r
7\r
00:03.500 --> 00:04.000\r
 \r
\r
8\r
00:00:04,000 --> 00:00:05,000\r
2025\r
"""
VTT = """WEBVTT - some text
Kind: captions

NOTE 00:00.000 is not a cue
and this neither

STYLE
::cue(b) { color: red }

intro
00:00.500 --> 00:02.000 align:start position:0%
<v Anna>Look &lt; <b>see</b></v>
the <c.red>ring</c>

00:02.000 --> 00:04.000
 
hello<00:00:02.500><c> there</c><00:00:03.000><c> friend</c>

00:00:04.000 --> 00:00:04.010
hello there friend

00:00:04.010 --> 00:00:05.500
hello there friend
ok &nbsp;go
"""


def test_subtitles(films, tmp_path, monkeypatch):
    """Files beside their videos; a language may be part of the name."""
    for name, content in {"six.srt": SRT, "v_four.en.srt": "1\n00:00:00,000 --> 00:00:09,000\nToo long\n"}.items():
        (tmp_path / name).write_text(content, newline="")
    (tmp_path / "bad.srt").write_text("1\n00:00:01;0 --> 00:00:02,000\nHm\n")
    (tmp_path / "latin.srt").write_bytes(b"1\n00:00:01,000 --> 00:00:02,000\n\xe9t\xe9\n")
    convert(monkeypatch, tmp_path, films, "--format", "srt", "--input", ".")
    (row,) = rows(tmp_path)
    assert texts(row) == [(0.5, 2, "Look & see the ring < 3"), (1.5, 3.25, "No counter or pause"), (4, 5, "2025")]
    assert row["video_id"] == "six" and row["segment_time"] == "spread"
    assert [(where, reason.replace(str(tmp_path), ""))[:2] for where, reason in skipped(tmp_path)] == [
        (
            "bad.srt",
            "subtitles are not valid: /bad.srt, line 2: '00:00:01;0 --> 00:00:02,000' are not the times of a cue: "
            "correct them",
        ),
        ("latin.srt", "subtitles are not valid: /latin.srt, line 3: is not UTF-8: save the file as UTF-8"),
        (
            "v_four.en.srt",
            "segments are not valid: segment 1 (0 to 9 s) ends after the video, at 4 s: correct or remove the row",
        ),
    ]


def test_webvtt(films, tmp_path, monkeypatch):
    """Of captions that roll up, each line is used once, with the times inside it."""
    (tmp_path / "six.vtt").write_text(VTT)
    convert(monkeypatch, tmp_path, films, "--format", "webvtt", "--input", "six.vtt", "--segment-time", "start")
    (row,) = rows(tmp_path)
    assert texts(row) == [
        (0.5, 2.0, "Look < see the ring"),
        (2.0, 2.5, "hello"),
        (2.5, 3.0, "there"),
        (3.0, 4.0, "friend"),
        (4.01, 5.5, "ok go"),
    ]
    assert row["segment_time"] == "start"


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_webvtt, "1\n00:01.000 --> 00:02.000\nHm\n", r"line 1: is not WebVTT"),
        (read_webvtt, "WEBVTT\n\n00:03.000 --> 00:02.000\nHm\n", r"line 3: the cue ends at 2 s, before it starts"),
        (read_webvtt, "WEBVTT\n\nx\n-00:01.000 --> 00:02.000\nHm\n", r"line 4: '-00:01.000 --> 00:02.000' are not the"),
        (read_webvtt, "WEBVTT\n\n00:01.000 --> 00:02.000\n<b></b>\n", r"has no cues with text"),
        (read_srt, "", r"has no cues with text"),
        (read_srt, "1\n-00:00:01,000 --> 00:00:02,000\nHm\n", r"line 2: '-00:00:01,000 --> 00:00:02,000' are not the"),
    ],
)
def test_subtitles_that_are_not_valid(tmp_path, read, content, message):
    (tmp_path / "a").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a")


def test_times_without_milliseconds(tmp_path):
    path = tmp_path / "a"
    path.write_text("1\n00:00:01 --> 00:00:02\nHm\n\n00:03-->00:04,5 X1:0\nSo\n")
    assert read_srt(path) == [Cue(1, 2, "Hm"), Cue(3, 4.5, "So")]
    path.write_text("WEBVTT\n\n00:01 --> 00:02\nHm\n")  # whose specification requires them
    with pytest.raises(InputError, match="line 3: '00:01 --> 00:02' are not the times"):
        read_webvtt(path)


def test_random_cues_are_read_as_written(tmp_path):
    """Of both formats, with any line ends, in UTF-8 and UTF-16."""
    for seed in range(30):
        draw = random.Random(seed)
        times = sorted(draw.sample(range(10_000_000), 8))
        cues = [
            Cue(a / 1000, b / 1000, draw.choice(["Hm", "A, b & c.", "2", "球", "--> no"]))
            for a, b in zip(times[::2], times[1::2], strict=True)
        ]
        end, encoding = draw.choice(["\n", "\r\n", "\r"]), draw.choice(["utf-8", "utf-8-sig", "utf-16"])
        for read, sign, head in ((read_srt, ",", []), (read_webvtt, ".", ["WEBVTT", ""])):
            lines = list(head)
            for number, cue in enumerate(cues, 1):
                text = cue.text.replace("&", "&amp;").replace("-->", "--&gt;")
                stamps = [
                    f"{int(t // 3600):02}:{int(t // 60 % 60):02}:{round(t % 60 * 1000) // 1000:02}{sign}"
                    f"{round(t * 1000) % 1000:03}"
                    for t in (cue.start, cue.end)
                ]
                lines += [str(number), " --> ".join(stamps), text, ""]
            (tmp_path / "a").write_bytes(end.join(lines).encode(encoding))
            assert read(tmp_path / "a") == cues, seed


def test_segments_are_put_in_order():
    for seed in range(200):
        draw = random.Random(seed)
        given = [
            {"start": start, "end": start + draw.choice([0, draw.random() * 4]), "text": "a"}
            for start in (draw.uniform(0, 10) for _ in range(draw.randint(1, 6)))
        ]
        for when in ("end", "start", "spread"):
            ordered = in_order(given, when)
            check_segments(ordered, when=when)
            assert sorted(map(str, ordered)) == sorted(map(str, given))  # no time moves
            times = join_segments(ordered, when).times
            assert list(times) == sorted(times)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--input", "a.json"),
            "--dataset segments needs --format: choose one of livecc, activitynet, joyai, srt, webvtt",
        ),
        (("--input", "a.json", "--format", "vtt"), "unknown --format 'vtt': choose one of livecc, activitynet, joyai"),
        (("--format", "srt"), "--dataset segments needs --input"),
        (
            ("--input", "a.json", "--format", "srt", "--segment-time", "middle"),
            "unknown --segment-time 'middle': choose",
        ),
        (
            ("--input", "a.json", "--format", "srt", "--max-samples", "2"),
            "--max-samples does not apply to --dataset seg",
        ),
        (
            ("--input", "a.json", "--format", "srt", "--min-seconds", "2"),
            "--min-seconds does not apply to --dataset seg",
        ),
        (("--input", "none", "--format", "srt"), "--input 'none' is not in"),
        (("--input", ".", "--format", "livecc"), "--input . is a folder: give a file for --format livecc"),
        (("--input", "folder", "--format", "webvtt"), "folder has no *.vtt file"),
        (("--input", "a.json", "--format", "activitynet"), "a.json is not in ActivityNet's format"),
        (("--input", "text", "--format", "joyai"), "text is not JSON"),
        (
            ("--input", "a.json", "--format", "webvtt"),
            "none of the 1 samples of a.json is kept, so out/my.jsonl is not written: 1 bad. The first of ",
        ),
    ],
)
def test_user_errors_are_one_line(films, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "text").write_text("hm")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        convert(monkeypatch, tmp_path, films, *flags)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    assert ended.value.code == 2 and line.startswith("error: ") and message in line


def test_a_file_that_is_not_utf8_is_not_called_something_else(tmp_path):
    (path := tmp_path / "latin.json").write_text('"é"', encoding="latin-1")
    with pytest.raises(InputError) as error:
        list(FORMATS["joyai"].read(path))
    assert str(error.value) == f"{path} is not UTF-8: save the file as UTF-8"
