"""Your own data: the examples of docs/data.md as written, on small real videos, and `mani_data.py --dataset jsonl`.

The hub is a local server. Its data sets are downloaded by the documented commands."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hubs import Hub
from media import make_tokenizer, make_video
from planning import check_any_video
from published import ROOT, Copy
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.timeline.segments import check_segments
from qwenvl.prescan import CaptionRates
from test_commands import SHORT, SMALL

import mani_data

SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##)", (ROOT / "docs/data.md").read_text(), re.DOTALL | re.MULTILINE))


class DatasetHub(Hub):
    """Serves the data sets below `folder`, each in OWNER/NAME, as the hub does."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}

    def answer(self, request, path: str) -> None:
        match = re.fullmatch(r"/(api/)?datasets/(\w+/\w+)(?:/(tree|resolve|revision)/\w+)?/?(.*)", path)
        if not match or not (repository := self.folder / match[2]).is_dir():
            return self.send(request, 404, {}, "RepoNotFound")
        files = {str(file.relative_to(repository)): file for file in repository.rglob("*") if file.is_file()}
        if match[3] in ("revision", None):
            siblings = [{"rfilename": name} for name in files]
            return self.send(request, 200, {"id": match[2], "sha": self.commit, "siblings": siblings})
        if match[3] == "tree":
            below = [name for name in files if name.startswith(f"{match[4]}/" if match[4] else "")]
            if "recursive=true" not in request.path.lower():
                below = [name for name in below if str(Path(name).parent) == (match[4] or ".")]
            folders = {str(Path(name).parent) for name in files} - {"."} if not match[4] else ()
            entries = [{"type": "file", "path": name, "size": files[name].stat().st_size} for name in below]
            entries += [{"type": "directory", "path": name, "size": 0} for name in folders]
            return self.send(request, 200, [{**entry, "oid": self.commit} for entry in entries])
        if match[4] not in files:
            return self.send(request, 404, {}, "EntryNotFound")
        data = files[match[4]].read_bytes()
        return self.send(request, 200, data, tag=hashlib.sha256(data).hexdigest())


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the project without data, with the eight videos of `made` in dataset/mine/videos."""
    copy = Copy(tmp_path, made[0], tmp_path)
    shutil.copytree(
        made[1].parent / "videos", copy.root / "dataset/mine/videos", ignore=shutil.ignore_patterns("*.json")
    )
    return copy


@pytest.mark.parametrize("kind", ["csv", "json", "tsv"])
def test_other_files_are_converted(tmp_path, kind):
    """As docs/data.md shows, with names that JSON escapes, commas, quotes and line ends."""
    (convert,) = blocks("Captions of your own", "python")
    rows = [{"file": "a/é 1.mp4", "caption": 'A "dog", it\nruns.'}, {"file": "2.mp4", "caption": "狗 runs."}]
    path = tmp_path / "dataset/mine/captions"
    path.parent.mkdir(parents=True)
    if kind == "json":
        path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
        (other,) = re.findall(r"`(rows = load_dataset\(\"json.+?)`", SECTIONS["Captions of your own"])
        convert = re.sub("^rows = load_dataset.*", other, convert, flags=re.MULTILINE)
    else:
        (tabs,) = re.findall(r"`(delimiter=.+?)`", SECTIONS["Captions of your own"])
        with path.with_suffix(".csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["file", "caption"], delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
        convert = convert.replace("split=", f"{tabs}, split=") if kind == "tsv" else convert
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", convert], cwd=tmp_path, env=environment, check=True)
    assert [row for _, row in read_data_rows(path.with_name("train.jsonl"))] == [
        {"video_path": row["file"], "human_caption": row["caption"], "video_id": Path(row["file"]).stem} for row in rows
    ]
    assert "狗" in path.with_name("train.jsonl").read_text(encoding="utf-8")


def rows_of(made, **changes) -> list[dict]:
    """The required fields of the rows of `made`."""
    rows = map(json.loads, made[1].read_text().splitlines())
    return [
        {"video_id": row["video_id"], "video_path": f"{row['video_id']}.mp4", "human_caption": row["human_caption"]}
        for row in rows
    ]


def write(path: Path, rows: list[dict | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)


def commands(section: str) -> list[str]:
    """The commands of the bash blocks of a section, which may change the folder for those after it."""
    return [line for block in blocks(section, "bash") for line in block.splitlines()]


def run_all(copy: Copy, shown: list[str], **environment: str) -> str:
    """Run commands in one shell, with flags that make them short, and return what they print."""
    more = {"scripts/sft.sh": SMALL, "eval.sh": SHORT}
    script = [line + next((flags for name, flags in more.items() if f"bash {name}" in line), "") for line in shown]
    done = copy.run("\n".join(script), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(copy: Copy, name: str) -> list[dict]:
    path = copy.root / f"code/evaluation/output/{name}"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_captions_of_your_own(copy, made):
    rows, folder = rows_of(made), copy.root / "dataset/mine"
    write(folder / "train.jsonl", [*rows[:5], "{", {**rows[5], "human_caption": "A ring."}])
    write(folder / "test.jsonl", rows[6:])
    said = run_all(copy, commands("Captions of your own"))
    assert "train.jsonl: 7 samples, 5 rows in dataset/mine/train_3_5.jsonl" in said
    assert "captions: 5 of 5 have 3 to 5 tokens per second of video\n" in said
    assert "output/mine   skipped samples: 0" in said and "accumulation steps mismatch" not in said
    assert [row["annotation"] for row in results(copy, "mine_infer.json")] == [row["human_caption"] for row in rows[6:]]


def test_questions_of_your_own(copy, made):
    rows, folder = rows_of(made), copy.root / "dataset/mine"
    asked = [{**row, "question": f"What happens in film {row['video_id']}?"} for row in rows]
    again = {**asked[0], "video_id": "again", "question": "Which colors are there?", "human_caption": "It is red " * 12}
    write(folder / "train_qa.jsonl", [*asked[:4], again, rows[4]])
    write(folder / "test_qa.jsonl", [{**asked[6], "references": ["A ring.", "A circle."]}, asked[7]])
    said = run_all(copy, commands("Questions of your own"))
    assert "group: 6 samples; training" in said and "output/mine-qa   skipped samples: 0" in said
    found = [row["annotation"] for row in results(copy, "mine_qa_infer.json")]
    assert found == [["A ring.", "A circle."], asked[7]["human_caption"]]


def test_captions_with_times(copy, made):
    """Subtitles, one of them not valid and one with more text than fits its slots."""
    rows, folder = rows_of(made), copy.root / "dataset/mine"
    cues = ["00:00:01,000 --> 00:00:02,000\nA red ring appears.", "00:00:03,000 --> 00:00:04,000\nIt turns blue."]
    many = ["00:00:00,000 --> 00:00:01,000\n" + "ring " * 12, "00:00:01,000 --> 00:00:02,000\nIt turns blue."]
    backward = ["00:00:02,000 --> 00:00:01,000\nA red ring."]
    for number, row in enumerate(rows[:6]):
        text = "\n\n".join(many if number == 1 else backward if number == 2 else cues)
        (folder / f"videos/{row['video_id']}.srt").write_text(f"\ufeff{text}\n")
    said = run_all(copy, commands("Captions with times"))
    assert "videos: 6 samples, 5 rows in dataset/mine/timed.jsonl" in said
    assert f"{rows[2]['video_id']}.srt, line 1: the cue ends at 1 s" in (folder / "timed_skipped.jsonl").read_text()
    assert "output/mine-timed   skipped samples: 0" in said
    assert re.search(r"times: \d+ of \d+ words are late, since a slot has at most 8 tokens: by 1\.0 s \(median\)", said)
    made_by = json.loads((copy.root / "code/qwen-vl-finetune/output/mine-timed/run.json").read_text())
    assert made_by["schedule"] == "data" and made_by["arguments"]["max_tokens_per_slot"] == 8


@pytest.fixture
def hub(tmp_path, made):
    """OWNER/NAME has the documented columns in two splits, and the videos as files; OWNER/OTHER has other columns."""
    rows, folder = rows_of(made), tmp_path / "served"
    videos = made[1].parent / "videos"
    (folder / "OWNER/NAME/data").mkdir(parents=True)
    (folder / "OWNER/OTHER/data").mkdir(parents=True)
    shutil.copytree(videos, folder / "OWNER/NAME/videos", ignore=shutil.ignore_patterns("*.json"))
    named = [{**row, "video_path": f"videos/{row['video_path']}"} for row in rows]
    for split, some in (("train", named[:6]), ("test", named[6:])):
        datasets.Dataset.from_list(some).to_parquet(folder / f"OWNER/NAME/data/{split}-00000-of-00001.parquet")
    other = [
        {
            "key": row["video_id"],
            "text": row["human_caption"],
            "video": {"bytes": (videos / row["video_path"]).read_bytes(), "path": row["video_path"]},
        }
        for row in rows[:3]
    ]
    kinds = datasets.Features(key=datasets.Value("string"), text=datasets.Value("string"), video=datasets.Video())
    table = datasets.Dataset.from_list(other, features=kinds)
    table.to_parquet(folder / "OWNER/OTHER/data/train-00000-of-00001.parquet")
    with DatasetHub(folder) as hub:
        yield hub


@pytest.mark.long
def test_a_data_set_of_the_hub(copy, made, hub, tmp_path):
    """Trains with the hub, and evaluates from the cache when the hub is gone."""
    shown = commands("A data set of the hub")
    evaluation = next(number for number, line in enumerate(shown) if "eval.sh" in line)
    common = {"HF_HOME": str(tmp_path / "home"), "QWEN2_5_VL_MODEL_PATH": str(made[0])}
    said = run_all(copy, shown[:evaluation], **common, **hub.environment)
    assert "group: 6 samples; training" in said and "output/hub   skipped samples: 0" in said
    (convert,) = blocks("A data set of the hub", "python")
    write(copy.root / "convert.py", [convert])
    run_all(copy, ["python convert.py"], **common, **hub.environment)
    hub.close()
    said = run_all(copy, shown[evaluation:], **common)
    rows = rows_of(made)
    found = [(row["video_id"], row["annotation"]) for row in results(copy, "hub_infer.json")]
    assert found == [(row["video_id"], row["human_caption"]) for row in rows[6:]]
    assert "train: 3 samples, 3 rows in dataset/OTHER/train_3_5.jsonl" in said
    kept = [row for _, row in read_data_rows(copy.root / "dataset/OTHER/train_3_5.jsonl")]
    assert [row["human_caption"] for row in kept] == [row["human_caption"] for row in rows[:3]]


def test_the_rows_of_the_page_are_valid(tmp_path):
    sections = ("Captions of your own", "Questions of your own", "Captions with times")
    shown = [block for section in sections for block in blocks(section, "json")]
    assert len(shown) == 4 and set(SECTIONS) == {*sections, "A data set of the hub", "Caption lengths"}
    found = [*read_data_rows(write(tmp_path / "shown.jsonl", ["".join(shown[:3])]))]
    timed = [row for _, row in read_data_rows(write(tmp_path / "timed.jsonl", [shown[3]]))]
    assert len(found) == 5 and len(timed) == 2
    for row in timed:
        check_segments(row["segments"])


# --- mani_data.py --dataset jsonl ------------------------------------------------------------------------------------


def filtered(tmp_path, monkeypatch, *flags: str) -> None:
    """Run `mani_data.py --dataset jsonl` in this process, in tmp_path, with one token per word."""
    monkeypatch.chdir(tmp_path)
    where = ["--tokenizer-model-id", str(make_tokenizer(tmp_path / "tokenizer")), "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["mani_data.py", "--dataset", "jsonl", *where, *flags])
    run(mani_data.main)


IN_AND_OUT = ("--input", "my.jsonl", "--output", "out/my_3_5.jsonl", "--video-root", "films")


def test_each_row_is_kept_or_listed_with_its_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "films").mkdir()
    make_video(tmp_path / "films/six.mp4", seconds=6)
    make_video(tmp_path / "films/one.mp4", seconds=1)
    (tmp_path / "films/text.mp4").write_text("no video")
    good = {"video_path": "six.mp4", "human_caption": "word " * 24, "mine": [1, "é"]}
    cases = [
        ({**good, "video_id": 7, "question": "Why?"}, None),
        (
            {**good, "video_id": "low", "human_caption": "word " * 17},
            "too few tokens per second: 17 tokens in 6.00 s, 2",
        ),
        (
            {**good, "video_id": "high", "human_caption": "word " * 31},
            "too many tokens per second: 31 tokens in 6.00 s",
        ),
        ({**good, "video_id": "one", "video_path": "one.mp4"}, "too short: the video has 1.00 s, the minimum is 5 s"),
        ("{", "row is not valid: is not JSON"),
        ({"video_id": "x", "video": "six.mp4"}, "row is not valid: has no video_path (its fields: video_id, video)"),
        ({**good, "video_id": "7"}, "row is not valid: lines 1 and 7 both have the video_id 7"),
        ({**good, "video_id": "gone", "video_path": "gone.mp4"}, "video is missing: video gone.mp4 does not exist in"),
        ({**good, "video_id": "text", "video_path": "text.mp4"}, "video cannot be used: "),
        ({**good, "video_id": "dots", "human_caption": "..."}, "caption without a word: '...'"),
        (
            {**good, "video_id": "wrong", "video_duration_in_s": 8},
            "video is shorter than its JSON says: 6.00 s instead",
        ),
        ({**good, "video_id": "stated", "video_duration_in_s": 6.5}, None),
        ({**good, "video_id": "clock", "duration": "00:06", "duration_in_s": 3}, None),
        ({**good, "video_id": "milliseconds", "duration": 6000, "video_duration": 6000}, None),
        ({**good, "video_id": "zero", "video_duration_in_s": 0}, "video_duration_in_s is not a duration: '0'"),
    ]
    write(tmp_path / "my.jsonl", [row for row, _ in cases])
    filtered(tmp_path, monkeypatch, *IN_AND_OUT)
    said = capsys.readouterr().out
    assert "my.jsonl: 15 samples, 4 rows in out/my_3_5.jsonl" in said and "3   row is not valid" in said
    kept = [json.loads(line) for line in (tmp_path / "out/my_3_5.jsonl").read_text().splitlines()]
    assert [(row["video_id"], row["video_duration_in_s"], row["mine"]) for row in kept] == [
        ("7", 6.0, [1, "é"]),
        ("stated", 6.5, [1, "é"]),
        ("clock", 6.0, [1, "é"]),
        ("milliseconds", 6.0, [1, "é"]),
    ]
    listed = [json.loads(line) for line in (tmp_path / "out/my_3_5_skipped.jsonl").read_text().splitlines()]
    expected = [(f"line {number}", reason) for number, (_, reason) in enumerate(cases, 1) if reason]
    assert [row["where"] for row in listed] == [where for where, _ in expected]
    for row, (_, reason) in zip(listed, expected, strict=True):
        assert row["reason"].startswith(reason), row
    report = json.loads((tmp_path / "out/my_3_5_report.json").read_text())["splits"]["my.jsonl"]
    assert (report["samples"], report["rows"], report["bad"]) == (15, 4, 8)
    assert sum(report["dropped"].values()) == 3 and (tmp_path / "out/my_3_5_report.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"video_id": 1, "video_path": "six.mp4", "caption": "word"}, "row is not valid: has no human_caption and no"),
        ({"video_id": 1, "video_path": "no.mp4", "human_caption": "word"}, "video is missing: video no.mp4 does not"),
        ({"video_id": 1, "video_path": "six.mp4", "human_caption": "word"}, "too few tokens per second: 1 tokens in"),
    ],
)
@pytest.mark.parametrize("before", ["", "a row\n"])
def test_an_output_without_rows_is_refused(tmp_path, monkeypatch, capsys, row, reason, before):
    """An earlier output stays; the reasons are listed."""
    (tmp_path / "films").mkdir()
    make_video(tmp_path / "films/six.mp4", seconds=6)
    write(tmp_path / "my.jsonl", [row, {**row, "video_id": 2}])
    (tmp_path / "out").mkdir()
    output = tmp_path / "out/my_3_5.jsonl"
    if before:
        output.write_text(before)
    with pytest.raises(SystemExit) as ended:
        filtered(tmp_path, monkeypatch, *IN_AND_OUT)
    said = capsys.readouterr()
    *_, error = said.err.splitlines()
    none = "none of the 2 samples of my.jsonl is kept, so out/my_3_5.jsonl is not written"
    none += " and still has the rows of an earlier run" if before else ""
    count = "2 too few tokens per second" if "few" in reason else "2 bad"
    first = f"The first of my_3_5_skipped.jsonl, line 1: {reason}"
    assert ended.value.code == 2 and error.startswith(f"error: {none}: {count}. {first}"), error
    assert "my.jsonl: 2 samples, 0 rows\n" in said.out
    assert output.exists() == bool(before) and (not before or output.read_text() == before)
    assert (tmp_path / "out/my_3_5_skipped.jsonl").read_text().count("\n") == 2
    assert not [*(tmp_path / "out").glob(".*.part")]


BY_START = [{"start": 0, "end": 6, "text": "word " * 20}, {"start": 3, "end": 5, "text": "end"}]


def test_rows_with_times_are_filtered_by_their_text(tmp_path, monkeypatch):
    (tmp_path / "films").mkdir()
    make_video(tmp_path / "films/six.mp4", seconds=6)

    def row(video_id: str, words: int, end: float, **more) -> dict:
        segments = [{"start": 0, "end": 1, "text": "word " * words}, {"start": end - 1, "end": end, "text": "end"}]
        return {"video_id": video_id, "video_path": "six.mp4", "segments": segments, **more}

    cases = [
        (row("good", 20, 6.5), None),
        (row("low", 9, 6), "too few tokens per second: 10 tokens in 6.00 s"),
        (row("caption", 9, 6, human_caption="word " * 24), None),
        (row("late", 20, 9), "segments are not valid: segment 2 (8 to 9 s) ends after the video, at 6 s"),
        (row("late too", 20, 9, video_duration_in_s=6), "segments are not valid: segment 2 (8 to 9 s) ends after"),
        (row("overlap", 20, 1.5), None),
        (row("by start", 20, 1.5) | {"segments": BY_START, "segment_time": "start"}, None),
        (
            row("not by end", 20, 1.5) | {"segments": BY_START},
            "segments are not valid: segment 2 (3 to 5 s) ends before",
        ),
        (row("dots", 0, 6) | {"segments": [{"start": 0, "end": 1, "text": "..."}]}, "caption without a word: '...'"),
    ]
    write(tmp_path / "my.jsonl", [row for row, _ in cases])
    filtered(tmp_path, monkeypatch, *IN_AND_OUT)
    kept = [json.loads(line) for line in (tmp_path / "out/my_3_5.jsonl").read_text().splitlines()]
    assert kept == [{**row, "video_duration_in_s": 6.0} for row, reason in cases if not reason]
    listed = [json.loads(line) for line in (tmp_path / "out/my_3_5_skipped.jsonl").read_text().splitlines()]
    for row, (number, reason) in zip(listed, [(n, why) for n, (_, why) in enumerate(cases, 1) if why], strict=True):
        assert row["where"] == f"line {number}" and row["reason"].startswith(reason), row


def test_bounds_sampling_and_running_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "films").mkdir()
    make_video(tmp_path / "films/six.mp4", seconds=6)
    row = {"video_path": "six.mp4", "human_caption": "word " * 12}
    write(tmp_path / "my.jsonl", [{**row, "video_id": name} for name in "abcdef"])
    lower = ("--min-tokens-per-second", "1", "--max-samples", "2")
    kept = []
    for _ in range(2):
        filtered(tmp_path, monkeypatch, *IN_AND_OUT, *lower)
        kept.append((tmp_path / "out/my_3_5.jsonl").read_text())
        monkeypatch.setattr("preparation.own_rows.check_video", None)  # the second run must not check it again
    assert kept[0] == kept[1] and kept[0].count("\n") == 2
    assert capsys.readouterr().out.count("4 not sampled because of --max-samples") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "my.jsonl"), "--dataset jsonl needs --output"),
        (("--output", "a.jsonl"), "--dataset jsonl needs --input"),
        (("--input", "my.jsonl", "--output", "my.jsonl"), "--output my.jsonl would overwrite --input"),
        (("--input", "my.jsonl", "--output", "a.parquet"), "--output a.parquet: give the name of a file that ends in"),
        (("--input", "none.jsonl", "--output", "a.jsonl"), "--input 'none.jsonl' is not in"),
        (("--input", "blank.jsonl", "--output", "a.jsonl"), "blank.jsonl' is empty"),
        ((*IN_AND_OUT[:4], "--video-root", "none"), "the video root 'none' is not in"),
        ((*IN_AND_OUT[:4], "--split", "train"), "--split does not apply to --dataset jsonl"),
        ((*IN_AND_OUT[:4], "--dataset-root", "."), "--dataset-root does not apply to --dataset jsonl"),
        ((*IN_AND_OUT[:4], "--max-questions", "1"), "--max-questions does not apply to --dataset jsonl"),
        (("--dataset", "pe-video", "--input", "my.jsonl"), "--input does not apply to --dataset pe-video"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    write(tmp_path / "my.jsonl", [{}])
    (tmp_path / "blank.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        filtered(tmp_path, monkeypatch, *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and message in line


def test_other_columns_are_named(tmp_path):
    kinds = datasets.Features(
        video_id=datasets.Value("string"), video_path=datasets.Video(), human_caption=datasets.Value("string")
    )
    row = {"video_id": "a", "video_path": {"bytes": b"", "path": "a.mp4"}, "human_caption": "b"}
    datasets.Dataset.from_list([row], features=kinds).save_to_disk(tmp_path / "videos")
    datasets.Dataset.from_list([{"id": "a", "text": "b"}]).save_to_disk(tmp_path / "names")
    for name, message in (
        ("videos", "has Video data in its column video_path: give text, as docs/data.md shows"),
        ("names", "has no column video_id (its columns: id, text): rename its columns with `datasets`"),
    ):
        with pytest.raises(InputError) as raised:
            list(read_data_rows(tmp_path / name))
        assert message in str(raised.value)


def test_evaluation_without_any_video_is_refused(tmp_path):
    rows = [{"video_path": "a.mp4"}, {"video_path": "b.mp4"}]
    plan = SimpleNamespace(rows=rows, data="my.jsonl", video_root=tmp_path)
    with pytest.raises(InputError, match=r"none of the 2 videos of my.jsonl is found: video a\.mp4 does not exist in"):
        check_any_video(plan)
    (tmp_path / "b.mp4").touch()
    check_any_video(plan)


def test_caption_rates_are_counted():
    rates = CaptionRates()
    for tokens in (0, 5, 17, 18, 30, 31):
        rates.add(tokens, 6.0, 6)
    assert (rates.within, rates.fewer, rates.more, rates.below_clips) == (2, 3, 1, 2)
    assert str(rates).startswith(
        "captions: 2 of 6 have 3 to 5 tokens per second of video, 3 fewer (2 of them less than one per clip), 1 more: "
    )
