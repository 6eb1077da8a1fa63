"""Where paths and videos are searched, in the library and by the programs."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import eval as evaluation
import pytest
from captioning import VideoDataset
from identity import describe_model
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.common.paths import (
    check_videos,
    find_data,
    find_model,
    find_path,
    find_video,
    find_video_root,
    look_up,
)
from qwen_vl_streaming.model.prompts import load_processor
from qwen_vl_streaming.replay.clips import _named_clips
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.frames import read_video
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl import train
from qwenvl.data import StreamingDataset
from qwenvl.prescan import scan
from qwenvl.rows import read_rows
from report.gallery import show_video
from schedules import Schedules


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project whose user is in another folder."""
    for folder in ("here", "project/code", "videos/a"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(path))
    return path


def test_a_path_is_looked_up_here_then_in_the_project_then_in_its_code(tree):
    root = tree / "project"
    with pytest.raises(InputError, match=r"not in .*here or in .*project or in .*project/code: check"):
        find_path("x/y.jsonl", root, "the data")
    for place in (root / "code/x/y.jsonl", root / "x/y.jsonl", tree / "here/x/y.jsonl"):
        put(place)
        assert find_path("x/y.jsonl", root, "the data").resolve() == look_up("x/y.jsonl", root).resolve() == place
    # The published README's, from code/qwen-vl-finetune.
    data = put(root / "dataset/train_3_5.jsonl")
    assert find_path("../dataset/train_3_5.jsonl", root, "the data").resolve() == data
    assert find_path(str(data), root, "the data") == data
    with pytest.raises(InputError, match="'/nowhere' is missing"):
        find_path("/nowhere", root, "the data")


def test_a_video_is_the_first_of_four(tree):
    root, videos = tree / "project", tree / "videos"
    with pytest.raises(InputError, match=r"video a/1\.mp4 does not exist in .*here or in .*project or in .*videos: "):
        find_video("a/1.mp4", root, videos)
    for place in (videos / "1.mp4", videos / "a/1.mp4", root / "a/1.mp4", tree / "here/a/1.mp4"):
        put(place)
        assert find_video("a/1.mp4", root, videos).resolve() == place
    put(root / "code/b/2.mp4")
    put(videos / "2.mp4")
    with pytest.raises(
        InputError, match=r"b/2\.mp4 does not exist"
    ):  # not in code/, and without a video root not by name
        find_video("b/2.mp4", root)
    assert find_video("/moved/away/2.mp4", root, videos) == videos / "2.mp4"
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\)"):
        find_video("long" * 100, root, videos)


def test_two_videos_never_match_one_file(tree):
    root, videos = tree / "project", tree / "videos"
    put(videos / "1.mp4")
    check_videos(["a/1.mp4", "a/1.mp4", "./a/1.mp4"], root, videos)  # one video, looked up more than once
    for others in (["a/1.mp4", "b/1.mp4"], ["1.mp4", "b/1.mp4"], ["b/1.mp4", str(videos / "1.mp4")]):
        with pytest.raises(InputError, match=r"both match .*videos/1\.mp4 by file name alone"):
            check_videos(others, root, videos)
    put(videos / "a/1.mp4")
    check_videos(["a/1.mp4", "b/1.mp4"], root, videos)
    check_videos(["c/1.mp4", "b/1.mp4"], root, None)


def test_a_model_is_a_folder_or_a_hub_id(tree):
    root = tree / "project"
    trained = root / "code/qwen-vl-finetune/output/qwen2_5vl-pe-origin"
    trained.mkdir(parents=True)
    for name in ("code/qwen-vl-finetune/output/qwen2_5vl-pe-origin", "qwen-vl-finetune/output/qwen2_5vl-pe-origin"):
        assert find_model(name, root) == str(trained)
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", "gpt2"):
        assert find_model(name, root) == name
    for name in ("code/output/none", "./none", "/none", ""):
        with pytest.raises(InputError):
            find_model(name, root)


def test_a_video_root_is_a_folder_or_nothing(tree):
    root = tree / "project"
    assert find_video_root("", root) is find_video_root(" ", root) is None
    assert find_video_root(str(tree / "videos"), root) == tree / "videos"
    for path, says in (("none", "is not in"), (str(put(tree / "file")), "is not a folder")):
        with pytest.raises(InputError, match=f"the video root .*{says}"):
            find_video_root(path, root)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dataset/train_3_5.jsonl", ": create it with `python mani_data.py`"),
        ("../dataset/test_3_5.jsonl", ": create it with `python mani_data.py`"),
        ("dataset/funqa_test.jsonl", ": create it with `python mani_data.py --dataset funqa`"),
        ("mine.jsonl", ": check the path, or create it with `python mani_data.py`"),
    ],
)
def test_the_message_for_missing_data_names_mani_data(tree, name, says):
    with pytest.raises(InputError) as refused:
        find_data(name, tree / "project", "the training data")
    assert str(refused.value).endswith(says)
    put(tree / "project" / name).write_text("")
    with pytest.raises(InputError) as refused:
        find_data(name, tree / "project", "the training data")
    assert ("mani_data.py" in str(refused.value)) == (name != "mine.jsonl") and "is empty" in str(refused.value)


def line_of(main, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2
    return line


def test_the_message_for_a_custom_file_does_not_name_mani_data(made, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.jsonl"
    row = {"video_id": "1", "video_path": "1.mp4", "human_caption": "A red ring."}
    model = ["--model", str(made[0]), "--output-dir", str(tmp_path)]
    training = ["--model_name_or_path", str(made[0]), "--use_cpu", "True", "--bf16", "False", "--report_to", "none"]
    training += ["--output_dir", str(tmp_path / "out")]
    for text in ("{", json.dumps({**row, "video_path": None}), json.dumps({"video_id": 1}), "\n", ""):
        mine.write_text(text)
        for main, flags in (
            (evaluation.main, ["--data", str(mine), *model]),
            (train.main, ["--train_data", str(mine), *training]),
        ):
            line = line_of(main, monkeypatch, capsys, *flags)
            assert "mine.jsonl" in line and "mani_data" not in line, line


def test_the_default_checkpoint_is_that_of_the_task(made, tmp_path, monkeypatch, capsys):
    data = tmp_path / "funqa.jsonl"
    row = {"video_id": "1", "video_path": "1.mp4", "human_caption": "A red ring.", "task": "H2", "question": "Why?"}
    data.write_text(json.dumps(row))
    monkeypatch.delenv("QWEN2_5_VL_EVAL_MODEL_PATH", raising=False)
    monkeypatch.setattr("settings.ROOT", tmp_path)
    output = tmp_path / "code/qwen-vl-finetune/output"
    (output / "qwen2_5vl-pe-group").mkdir(parents=True)
    given = ("--data", str(data), "--output-dir", str(tmp_path / "out"), "--device", "cpu")
    line = line_of(evaluation.main, monkeypatch, capsys, "--task", "funqa", *given)
    assert (
        f"{output / 'qwen2_5vl-funqa-group'}, the default checkpoint of --task funqa, does not exist: train it" in line
    )
    assert "--output_dir output/qwen2_5vl-funqa-group` in code/qwen-vl-finetune, or give another with" in line
    (output / "qwen2_5vl-pe-group").rmdir()
    line = line_of(evaluation.main, monkeypatch, capsys, "--data", str(made[1]), *given[2:])
    assert "qwen2_5vl-pe-group, the default checkpoint of --task description, does not exist: train it" in line


def test_the_evaluated_checkpoint_is_logged(tmp_path, caplog):
    assert describe_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert describe_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / "run.json").write_text(
        json.dumps({"variant": "gap", "data": {"path": "/d/funqa_train.jsonl", "sha256": "a"}})
    )
    assert describe_model(str(tmp_path), "b") == f"{tmp_path}, trained as gap on /d/funqa_train.jsonl"
    assert not caplog.records
    describe_model(str(tmp_path), "a")
    assert "the checkpoint was trained on these data" in caplog.text


def test_training_and_evaluation_find_a_video_by_its_name(made, tmp_path, monkeypatch):
    """So do verify.py, the gallery and a replay: they all call `find_video`."""
    rows = [{**row, "video_path": f"elsewhere/{Path(row['video_path']).name}"} for row in read_rows(made[1])][:2]
    videos, processor, budget = made[1].parent / "videos", load_processor(made[0]), PixelBudget(3136, 3136)
    make = partial(StreamingDataset, rows, tmp_path, processor, 2, VARIANTS["group"], "wait-3", budget, 4096)
    assert len(scan(make()).bad) == 2 and make()[0].bad
    assert not scan(make(video_root=videos)).bad and not make(video_root=videos)[0].bad
    work = SimpleNamespace(rows=rows, budget=budget, reader=None, schedules=Schedules("wait-3", VARIANTS["group"]))
    work.dtype, work.video_root, work.max_clips, work.variant = "float32", None, None, VARIANTS["group"]
    work.end_of_slot = None
    assert "does not exist" in VideoDataset(work, processor, 2)[0].reason
    work.video_root = videos
    assert VideoDataset(work, processor, 2)[0].job
    clips = read_video(videos / os.path.basename(rows[0]["video_path"])).clips
    args = {"video_root": str(videos)}
    assert len(show_video(SimpleNamespace(args=args), rows[0], clips)[1]) == clips
    about = {"video": {"path": rows[0]["video_path"]}}
    assert len(_named_clips(about, processor, None, videos)) == clips
    with pytest.raises(InputError, match="does not exist"):
        _named_clips(about, processor, None, None)
