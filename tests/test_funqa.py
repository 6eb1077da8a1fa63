"""FunQA's preparation: rows from annotation files and videos, bad input, archives and the hub."""

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from funqa.annotations import SUBTASKS
from funqa.run import Options, prepare_funqa
from media import make_files, make_tokenizer, video_bytes
from preparation.rules import Rules
from qwen_vl_streaming.common.errors import InputError
from test_hub import COMMIT, FakeHub

ROOT = Path(__file__).resolve().parents[1]
ALL = Rules(0.0, float("inf"), 0.0, float("inf"))
MP4 = video_bytes(seconds=2, fps=4, size=(64, 48))
KINDS = {"H": "humor", "C": "creative", "M": "magic"}
VIDEOS = {"H": "H_A_101_1433_1631.mp4", "C": "C_KT_10_6402_6422.mp4", "M": "M_Z_7_0010_0190.mp4"}


def entry(task="H2", question="What is funny?", answer="A cat falls.", **changes):
    made = {"instruction": question, "visual_input": VIDEOS[task[0]], "output": answer, "task": task, **changes}
    return {name: value for name, value in made.items() if value is not None}


def full(questions=2, answers=3):
    """All sub-tasks of one video of each kind, and some unused ones, as in the published files."""
    entries = []
    for task in ("H1", *SUBTASKS, "H4", "C5"):
        for q in range(questions):
            entries += [
                entry(task, f"Question {q} of {task}?", f" Answer {a} to question {q} of {task}.")
                for a in range(answers if task in SUBTASKS else 1)
            ]
    return [{**one, "ID": f"test_{number}"} for number, one in enumerate(entries)]


def lay_out(folder, split="test", entries=None, videos=VIDEOS, data=MP4):
    """A folder as unpacked from the published zip files: <split>/<split>_humor/<video> and so on."""
    make_files(folder, {f"FunQA_{split}.json": json.dumps(full() if entries is None else entries).encode()})
    for kind, name in videos.items():
        make_files(folder / split / f"{split}_{KINDS[kind]}", {name: data})
    return folder


def pack(folder, split="test", videos=VIDEOS, data=MP4):
    """The same videos in a zip file."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for kind, name in videos.items():
            archive.writestr(f"{split}/{split}_{KINDS[kind]}/{name}", data)
            archive.writestr(f"__MACOSX/{split}/._{name}", b"junk")


def make_options(tmp_path, **changes):
    return Options(
        **{
            "splits": ["train", "test"],
            "source": tmp_path / "source",
            "outputs": {split: tmp_path / f"dataset/funqa_{split}.jsonl" for split in ("train", "test")},
            "root": tmp_path,
            "videos": tmp_path / "dataset/FunQA/videos",
            "output_dir": tmp_path / "dataset",
            "hub_name": "",
            "rules": ALL,
            "tokenizer": str(tmp_path / "tokenizer"),
            "max_samples": None,
            "seed": 0,
            "max_questions": None,
            "max_references": None,
            "workers": 1,
            "prefix": "funqa_",
            **changes,
        }
    )


def rows(tmp_path, split="test"):
    return [json.loads(line) for line in (tmp_path / f"dataset/funqa_{split}.jsonl").read_text().splitlines()]


def skipped(tmp_path):
    return [json.loads(line) for line in (tmp_path / "dataset/funqa_skipped.jsonl").read_text().splitlines()]


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_test_row_has_all_answers_and_a_train_row_has_one(tmp_path):
    lay_out(tmp_path / "source", "test")
    lay_out(tmp_path / "source", "train")
    tallies = prepare_funqa(make_options(tmp_path))
    test, train = rows(tmp_path), rows(tmp_path, "train")
    assert len(test) == 6 * 2 and len(train) == 6 * 2 * 3
    assert tallies["test"].tasks == dict.fromkeys(SUBTASKS, 2) and tallies["train"].tasks == dict.fromkeys(SUBTASKS, 6)
    assert test[0] == {
        "video_id": "H_A_101_1433_1631:H2:1",
        "video_path": "source/test/test_humor/H_A_101_1433_1631.mp4",
        "video_duration_in_s": 2.0,
        "task": "H2",
        "question": "Question 0 of H2?",
        "human_caption": "Answer 0 to question 0 of H2.",
        "references": [f"Answer {a} to question 0 of H2." for a in range(3)],
        "funqa_ids": ["test_2", "test_3", "test_4"],
    }
    assert "references" not in train[0] and train[1]["human_caption"] == "Answer 1 to question 0 of H2."
    for made in (test, train):
        assert len({row["video_id"] for row in made}) == len(made)
        assert all((tmp_path / row["video_path"]).read_bytes() == MP4 for row in made)
    report = json.loads((tmp_path / "dataset/funqa_report.json").read_text())
    assert report["rules"]["max_seconds"] is None
    assert report["splits"]["test"]["dropped"]["other sub-task"] == 6
    assert (tmp_path / "dataset/funqa_report.png").read_bytes().startswith(b"\x89PNG")


def test_max_questions_and_max_references(tmp_path):
    lay_out(tmp_path / "source")
    tally = prepare_funqa(make_options(tmp_path, max_questions=1, max_references=2))["test"]
    assert [row["task"] for row in rows(tmp_path)] == list(SUBTASKS)
    assert all(len(row["references"]) == 2 and row["question"].startswith("Question 0") for row in rows(tmp_path))
    assert tally.outcomes["more answers than --max-references"] == 6
    assert tally.outcomes["more questions than --max-questions"] == 18


def test_bounds_apply_to_the_video_duration_and_to_each_answer(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    entries = [entry(answer=" ".join(["word"] * count)) for count in (5, 6, 10, 11)]
    long = entry("C2", answer=" ".join(["word"] * 15), visual_input="long.mp4")
    lay_out(tmp_path / "source", entries=[*entries, long])
    make_files(tmp_path / "source", {"long.mp4": video_bytes(seconds=5, fps=4, size=(64, 48))})
    rules = Rules(0.0, 4.0, 3.0, 5.0)
    tally = prepare_funqa(make_options(tmp_path, rules=rules))["test"]
    (row,) = rows(tmp_path)
    assert [len(text.split()) for text in row["references"]] == [6, 10]  # 3 and 5 tokens per second
    assert tally.outcomes == {
        "kept": 2,
        "too few tokens per second": 1,
        "too many tokens per second": 1,
        "too long": 1,
    }


def test_max_samples_samples_by_seed(tmp_path):
    lay_out(tmp_path / "source", "train")
    drawn = []
    for seed in (0, 0, 1):
        tally = prepare_funqa(make_options(tmp_path, max_samples=7, seed=seed))["train"]
        drawn.append([row["video_id"] for row in rows(tmp_path, "train")])
        assert len(drawn[-1]) == 7 == tally.rows and tally.not_drawn == 29
    assert drawn[0] == drawn[1] != drawn[2]


# --- bad entries and videos ----------------------------------------------------------------------------------------


def test_bad_entries_are_counted_with_their_reasons(tmp_path):
    fine = [entry(task, ID=f"fine_{task}") for task in SUBTASKS]
    bad = {
        "entry is not an object": 7,
        "no instruction": entry(question=None),
        "instruction is empty": entry(question=" "),
        "no output": entry(answer=None),
        "output is empty": entry(answer=""),
        "output is not text": entry(answer=["a"]),
        "output has no words": entry(answer="[ , ]"),
        "output is not valid Unicode": entry(answer="a \ud800"),
        "no visual_input": entry(visual_input=None),
        "unknown sub-task": entry(task="H9"),
        "duplicate ID": entry(answer="Another.", ID="fine_H2"),
        "video is missing": entry(visual_input="gone.mp4"),
        "video cannot be used": entry(visual_input="broken.mp4"),
        "two videos have the same name": entry(visual_input="twice.mp4"),
    }
    entries = [*bad.values(), *fine, {**fine[0], "ID": "again"}]
    print("seed 3")
    random.Random(3).shuffle(entries)
    if entries.index(bad["duplicate ID"]) < entries.index(fine[0]):  # the first entry with an ID is used
        entries.remove(bad["duplicate ID"])
        entries.append(bad["duplicate ID"])
    source = lay_out(tmp_path / "source", entries=entries)
    make_files(source, {"broken.mp4": MP4[:300], "twice.mp4": MP4})
    make_files(source / "other", {"twice.mp4": MP4 + b"\0\0\0\x08free"})
    tally = prepare_funqa(make_options(tmp_path))["test"]
    assert len(rows(tmp_path)) == 6
    assert tally.reasons == dict.fromkeys(bad, 1)
    assert tally.outcomes["repeated question and answer"] == 1
    assert sorted(line["reason"].partition(": ")[0] for line in skipped(tmp_path)) == sorted(bad)
    assert all(line["where"].startswith("FunQA_test.json, entry ") for line in skipped(tmp_path))


def test_broken_links_are_missing_videos(tmp_path):
    folder = lay_out(tmp_path / "source", videos={kind: VIDEOS[kind] for kind in "HM"}) / "test"
    (folder / VIDEOS["C"]).symlink_to("x" * 300)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    prepare_funqa(make_options(tmp_path))
    assert {row["task"] for row in rows(tmp_path)} == {"H2", "H3", "M2", "M3"}
    assert {entry["reason"] for entry in skipped(tmp_path)} == {f"video is missing: {VIDEOS['C']}"}


def test_ids_do_not_depend_on_skipped_entries(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    entries = [
        entry(question=f"Q{q}?", answer=" ".join(["word"] * (3 + q)), visual_input=video)
        for q in range(3)
        for video in ("a.mp4", "b.mp4")
    ]
    source = lay_out(tmp_path / "source", entries=entries, videos={})
    make_files(source, {"a.mp4": MP4, "b.mp4": MP4})
    prepare_funqa(make_options(tmp_path))
    every = {row["video_id"]: row["question"] for row in rows(tmp_path)}
    assert list(every) == [f"{stem}:H2:{n}" for n in (1, 2, 3) for stem in "ab"]
    (source / "b.mp4").unlink()
    prepare_funqa(make_options(tmp_path, rules=Rules(0.0, 9.0, 2.0, 9.0)))
    left = {row["video_id"]: row["question"] for row in rows(tmp_path)}
    assert list(left) == ["a:H2:2", "a:H2:3"] and left.items() <= every.items()


def test_a_missing_sub_task_is_reported(tmp_path, caplog):
    lay_out(tmp_path / "source", entries=[one for one in full() if one["task"] != "M3"])
    tally = prepare_funqa(make_options(tmp_path))["test"]
    assert tally.tasks["M3"] == 0 and "has no rows of sub-task M3" in caplog.text
    assert "the train split is skipped" in caplog.text


def test_videos_in_both_splits_are_reported(tmp_path, caplog):
    lay_out(tmp_path / "source", "train", [entry()], {"H": VIDEOS["H"]})
    lay_out(tmp_path / "source", "test")
    prepare_funqa(make_options(tmp_path))
    said = "videos in both funqa_train.jsonl and funqa_test.jsonl: 1, such as H_A_101_1433_1631.mp4. Scores on"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "FunQA_test.json is not JSON"),
        (b"\xff", "FunQA_test.json is not JSON"),
        (b"{}", "is not a list of questions"),
        (b"[]", "is not a list of questions"),
        (json.dumps([entry("H1"), entry("H4")]).encode(), r"no question of H2, H3, C2, C3, M2, M3, only H1 \(1\), H4"),
        (json.dumps([{"question": "?"}]).encode(), "only None"),
        (json.dumps([entry(visual_input="x.mp4")]).encode(), "none of the 1 videos .* x.mp4: put test.zip"),
    ],
)
def test_invalid_annotation_files(tmp_path, content, message):
    make_files(tmp_path / "source", {"FunQA_test.json": content})
    with pytest.raises(InputError, match=message):
        prepare_funqa(make_options(tmp_path))
    assert not (tmp_path / "dataset/funqa_test.jsonl").exists()


def test_two_annotation_files_for_one_split(tmp_path):
    lay_out(tmp_path / "source")
    make_files(tmp_path / "source/annotation_with_ID", {"funqa_test.json": b"[]"})
    with pytest.raises(InputError, match="both are annotation files of test"):
        prepare_funqa(make_options(tmp_path))


# --- zip files, resuming, the hub --------------------------------------------------------------------------------


def test_videos_in_a_zip_file_are_unpacked_once(tmp_path, monkeypatch):
    source = lay_out(tmp_path / "source", videos={})
    pack(source)
    prepare_funqa(make_options(tmp_path))
    first = rows(tmp_path)
    assert first[0]["video_path"] == "dataset/FunQA/videos/test/H_A_101_1433_1631.mp4"
    assert all((tmp_path / row["video_path"]).read_bytes() == MP4 for row in first)
    monkeypatch.setattr("funqa.run.check_videos", None)  # a second run checks none of them again …
    prepare_funqa(make_options(tmp_path))
    assert rows(tmp_path) == first
    monkeypatch.undo()
    (tmp_path / first[0]["video_path"]).unlink()  # … except one that was deleted
    state = tmp_path / "dataset/.mani_data/funqa-test-videos.jsonl"
    state.write_text(state.read_text() + '["half')  # as after a killed run
    prepare_funqa(make_options(tmp_path))
    assert rows(tmp_path) == first and (tmp_path / first[0]["video_path"]).read_bytes() == MP4


def test_damaged_zip_files(tmp_path):
    source = lay_out(tmp_path / "source", videos={})
    pack(source)
    whole = (source / "test.zip").read_bytes()
    damaged = bytearray(whole)
    at = whole.index(VIDEOS["H"].encode()) + len(VIDEOS["H"]) + 40  # in the first video's data
    damaged[at : at + 8] = bytes(8)
    (source / "test.zip").write_bytes(bytes(damaged))
    tally = prepare_funqa(make_options(tmp_path))["test"]
    assert {row["task"][0] for row in rows(tmp_path)} == {"C", "M"}
    assert tally.reasons == {"video cannot be unpacked": 12}
    assert sorted(path.name for path in (tmp_path / "dataset/FunQA/videos").rglob("*.*")) == [VIDEOS["C"], VIDEOS["M"]]
    (source / "test.zip").write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"test\.zip cannot be read as a zip file"):
        prepare_funqa(make_options(tmp_path))


class FunqaHub(FakeHub):
    """The hub's responses for a data set with its files at the top level."""

    def answer(self, request, path):
        name = "fesvhtr/FunQA"
        if path.rstrip("/") == f"/api/datasets/{name}/tree/{COMMIT}":
            files = sorted(path for path in self.folder.iterdir() if path.is_file())
            entries = [{**self.entry(file), "path": file.name} for file in files]
            return self.send(request, 200, entries)
        return super().answer(request, path.replace(name, "facebook/PE-Video"))


def mani_data(tmp_path, *flags, **environ):
    arguments = [sys.executable, str(ROOT / "mani_data.py"), "--dataset", "funqa"]
    arguments += ["--dataset-root", str(tmp_path / "dataset"), "--workers", "1", *flags]
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environ})


def test_the_hub_is_streamed(tmp_path):
    lay_out(tmp_path / "hub", videos={})
    pack(tmp_path / "hub", videos={**VIDEOS}, data=MP4)
    with zipfile.ZipFile(tmp_path / "hub/test.zip", "a") as archive:
        archive.writestr("test/unused.mp4", random.Random(0).randbytes(1 << 20))
    with FunqaHub(tmp_path / "hub") as hub:
        environ = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
        result = mani_data(tmp_path, **environ)
        assert result.returncode == 0, result.stderr
        assert len(rows(tmp_path)) == 12
        assert hub.sent < (tmp_path / "hub/test.zip").stat().st_size / 2  # only what is used is read
        hub.broken_after = 0
        result = mani_data(tmp_path, **environ)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("error: http://127.0.0.1")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_its_results(tmp_path):
    lay_out(tmp_path / "source")
    result = mani_data(tmp_path, "--source", str(tmp_path / "source"), "--split", "test")
    assert result.returncode == 0, result.stderr
    assert "test: 42 samples, 12 rows in" in result.stdout
    assert "H2 2, H3 2, C2 2, C3 2, M2 2, M3 2" in result.stdout
    assert "6 dropped: other sub-task" in result.stdout


def test_an_output_without_rows_is_refused(tmp_path):
    lay_out(tmp_path / "source", data=b"no video")
    result = mani_data(tmp_path, "--source", str(tmp_path / "source"), "--split", "test")
    output = tmp_path / "dataset/funqa_test.jsonl"
    *_, error = result.stderr.splitlines()
    none = f"error: none of the 42 samples of test is kept, so {output} is not written: "
    assert result.returncode == 2 and error.startswith(none) and " bad. The first of funqa_skipped.jsonl" in error
    assert "H_A_101_1433_1631.mp4 cannot be opened" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "fun"], "unknown --dataset 'fun': choose one of pe-video, funqa"),
        (["--source", "/nowhere"], "folder /nowhere does not exist"),
        (["--train-dir", "."], "--train-dir does not apply to --dataset funqa"),
        (["--max-references", "0"], "--max-references is 0: it must be at least 1"),
        (["--max-seconds", "1", "--min-seconds", "2"], "are not a range"),
        (["--source", "docs"], "docs has no FunQA_train.json or FunQA_test.json"),
        ([], "hf download fesvhtr/FunQA"),
    ],
)
def test_user_errors_are_one_line(mani_refusal, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in mani_refusal("--dataset", "funqa", "--dataset-root", str(tmp_path / "dataset"), *flags)


def test_funqa_flags_are_refused_for_pe_video(mani_refusal, tmp_path):
    said = mani_refusal("--dataset-root", str(tmp_path), "--max-questions", "1")
    assert "--max-questions does not apply to --dataset pe-video" in said
