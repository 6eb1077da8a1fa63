"""FunQA from its annotation file to scores, with a real tiny checkpoint: questions, sub-tasks and their mean."""

import json
from statistics import fmean
from types import SimpleNamespace

import eval as evaluation
import pytest
import tasks
import verify
from captioning import VideoDataset
from funqa.annotations import SUBTASKS
from funqa.run import prepare_funqa
from make_model import tiny_checkpoint
from media import video_bytes
from metrics import scorecard
from planning import read_data
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.model.prompts import QUESTIONS, load_processor, make_template
from qwen_vl_streaming.timeline.variants import VARIANTS
from qwen_vl_streaming.video.pixel_budget import PixelBudget
from qwenvl.data import StreamingDataset
from qwenvl.rows import read_rows
from schedules import Schedules
from test_funqa import full, lay_out, make_options

MP4 = video_bytes(seconds=3, fps=4, size=(56, 56))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, FunQA's test rows (two questions of each sub-task, three answers each), and a folder."""
    folder = tmp_path_factory.mktemp("funqa")
    for split in ("test", "train"):
        lay_out(folder / "source", split, full(), data=MP4)
    prepare_funqa(make_options(folder))
    return tiny_checkpoint(folder / "model"), folder / "dataset/funqa_test.jsonl", folder


@pytest.fixture
def evaluate(made, tmp_path, monkeypatch):
    """Run eval.py's main with flags over the defaults of this test; returns its output folder."""
    monkeypatch.delenv("QWEN2_5_VL_VARIANT", raising=False)

    def call(*flags, data=made[1], task="funqa"):
        small = ["--min-pixels-per-frame", "3136", "--max-pixels-per-frame", "3136", "--max-new-tokens", "20"]
        small += ["--device", "cpu", "--workers", "0", "--video-root", str(made[2]), "--task", task]
        small += ["--data", str(data), "--model", str(made[0]), "--output-dir", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["eval.sh", *small, *flags])
        run(evaluation.main)
        return tmp_path / "out"

    return call


def stand_in(references, candidates):
    """Replaces the metrics by the mean length of the captions, and a metric that the sub-tasks of magic do not have."""
    mean = {"BLEU-1": fmean(float(len(text)) for text in candidates.values())}
    magic = any(name.startswith("M_") for name in candidates)
    return {**mean, "not_computed": {"CIDEr": "no magic"}} if magic else {**mean, "CIDEr": 1.0}


def test_every_sub_task_is_captioned_scored_and_verified(made, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(scorecard, "score", stand_in)
    out = evaluate("--variant", "group", "--batch-size", "5")
    rows = [json.loads(line) for line in (out / "group_infer.json").read_text().splitlines()]
    asked = [json.loads(line) for line in made[1].read_text().splitlines()]
    assert [(row["video_id"], row["task"]) for row in rows] == [(row["video_id"], row["task"]) for row in asked]
    assert [row["annotation"] for row in rows] == [row["references"] for row in asked]
    assert json.loads((out / "group_infer.args.json").read_text())["task"] == "funqa"

    scores = json.loads((out / "group_scores.json").read_text())
    assert list(scores["tasks"]) == list(SUBTASKS) == scores["mean_over"] and scores["count"] == 12
    for name, found in scores["tasks"].items():
        assert found["count"] == 2
        assert found["BLEU-1"] == fmean(len(row["result"]) for row in rows if row["task"] == name)
    for metric in ("BLEU-1", "early_words"):
        assert scores[metric] == pytest.approx(fmean(found[metric] for found in scores["tasks"].values()))
    assert "CIDEr" not in scores and scores["not_computed"]["CIDEr"] == "M2: no magic"
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in (*SUBTASKS, "mean of 6"))

    # The stock model, asked each row's own question, writes the same.
    monkeypatch.setattr("sys.argv", ["verify.py", str(out / "group_infer.json"), "--device", "cpu"])
    count = sum(len(row["tokens"]) for row in rows)
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert ended.value.code == 0 and f"{count} of {count} tokens of 12 videos" in capsys.readouterr().out


def test_training_and_evaluation_use_the_question_of_a_row(made):
    """With the same prompt, which differs from that of a row without a question."""
    checkpoint, data, folder = made
    processor = load_processor(checkpoint)
    budget = PixelBudget(3136, 3136)
    rows = read_rows(data)
    without = [{**row, "question": None} for row in rows]
    training, plain = (
        StreamingDataset(some, folder, processor, 2, VARIANTS["group"], "wait-3", budget, 4096)
        for some in (rows, without)
    )
    asked = read_data(data, limit=None, task=tasks.TASKS["funqa"])
    schedules = Schedules("wait-3", VARIANTS["group"])
    where = {"video_root": folder, "max_clips": None, "variant": VARIANTS["group"], "end_of_slot": None}
    work = SimpleNamespace(rows=asked, **where, budget=budget, reader=None, schedules=schedules, dtype="float32")
    watched = VideoDataset(work, processor, 2)
    for index in (0, 3, 11):
        sample, template = training[index], watched[index].job.template
        assert not sample.bad and tuple(sample.input_ids[: len(template.prompt)].tolist()) == template.prompt
        assert rows[index]["question"] in processor.tokenizer.decode(template.prompt)
        drawn = processor.tokenizer.decode(plain[index].input_ids)
        assert any(question in drawn for question in QUESTIONS) and rows[index]["question"] not in drawn


def test_a_description_may_have_its_own_question(made, tmp_path):
    """Training and evaluation accept it, with the same prompt."""
    checkpoint, data, folder = made
    row = {**json.loads(data.read_text().splitlines()[0]), "question": "Who wins?"}
    mine = tmp_path / "mine.jsonl"
    mine.write_text(json.dumps({key: value for key, value in row.items() if key not in ("task", "references")}))
    (asked,) = read_data(mine, limit=None, task=tasks.TASKS["description"])
    processor = load_processor(checkpoint)
    training = StreamingDataset(
        read_rows(mine), folder, processor, 2, VARIANTS["group"], "wait-3", PixelBudget(3136, 3136), 4096
    )
    assert asked["question"] == "Who wins?" and asked["task"] == "description"
    assert make_template(processor, asked["question"]) == training.template(0)


def test_captions_made_elsewhere_are_scored_by_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scorecard, "score", stand_in)
    rows = [
        {"video_id": f"{task}{n}", "task": task, "annotation": ["a cat", "a cat falls"], "result": "a" * length}
        for task, lengths in (("C2", (9, 3)), ("H2", (4, 5, 12)))
        for n, length in enumerate(lengths)
    ]
    path = tmp_path / "mine.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["eval.sh", "--task", "funqa", "--score-only", str(path)])
    run(evaluation.main)
    scores = json.loads((tmp_path / "mine.scores.json").read_text())
    assert scores["tasks"]["H2"] == {"BLEU-1": 7.0, "CIDEr": 1.0, "count": 3}
    assert scores["BLEU-1"] == 6.5 and scores["count"] == 5  # the mean of the sub-tasks, not of the rows
    assert scores["mean_over"] == ["H2", "C2"] and scores["missing_tasks"] == ["H3", "C3", "M2", "M3"]
    printed = capsys.readouterr().out
    assert "mean of 2" in printed and "C3 has no row" in printed


def test_a_missing_sub_task_is_never_zero():
    rows = [{"task": task, "value": value} for task, value in (("H2", 1.0), ("H2", 3.0), ("M3", 8.0))]
    found = tasks.score_by_task(rows, lambda some: {"x": fmean(row["value"] for row in some)}, SUBTASKS)
    assert found["x"] == 5.0 and found["tasks"] == {"H2": {"x": 2.0, "count": 2}, "M3": {"x": 8.0, "count": 1}}
    assert set(found["missing_tasks"]) == set(SUBTASKS) - {"H2", "M3"}
    uneven = tasks.score_by_task(rows, lambda some: {"x": 1.0} if len(some) > 1 else {}, SUBTASKS)
    assert "x" not in uneven and uneven["not_computed"] == {"x": "M3: no video has this metric"}


def test_data_of_another_task_is_refused_in_one_line(made, evaluate, tmp_path, capsys):
    rows = [json.loads(line) for line in made[1].read_text().splitlines()]
    plain = {key: rows[0][key] for key in ("video_id", "video_path", "human_caption")}
    captions = {"video_id": "a", "annotation": "a cat", "result": "a dog"}
    for name, row in (
        ("plain", plain),
        ("title", {**rows[0], "task": "H4"}),
        ("unasked", {**rows[0], "question": " "}),
        ("wordless", {**rows[0], "references": ["a", "."]}),
        ("numbers", {**rows[0], "references": [1]}),
        ("captions", captions),
        ("mine", {**captions, "task": "C3"}),
    ):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "twice").write_text(2 * (json.dumps(rows[0]) + "\n"))
    for flags, task, reason in (
        ([], "fun", "unknown task 'fun': choose one of description, funqa"),
        (["--data", str(tmp_path / "plain")], "funqa", "plain, line 1: has sub-task None, not one of H2, H3"),
        (["--data", str(tmp_path / "title")], "funqa", "has sub-task 'H4', not one of"),
        (["--data", str(tmp_path / "unasked")], "funqa", 'has the question " ", which is not a non-blank string'),
        (["--data", str(tmp_path / "wordless")], "funqa", "caption without a word"),
        (["--data", str(tmp_path / "numbers")], "funqa", "references that are not a list of strings"),
        (["--data", str(tmp_path / "twice")], "funqa", "both have the video_id"),
        ([], "description", "funqa_test.jsonl, line 1: has sub-task H2 of funqa: give --task funqa"),
        (["--score-only", str(tmp_path / "captions")], "funqa", "captions, video a: has sub-task None"),
        (["--score-only", str(tmp_path / "mine")], "description", "mine, video a: has sub-task C3 of funqa"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluate(*flags, task=task)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert ended.value.code == 2 and len(errors) == 1 and reason in errors[0], (flags, errors)


def test_defaults_of_funqa(monkeypatch):
    """Its own data and folder, so that both tasks have separate files; values from the user are kept."""
    for name in ("DATA_DIR", "OUTPUT_DIR"):
        monkeypatch.delenv(f"QWEN2_5_VL_EVAL_{name}", raising=False)
    plain, funqa = evaluation.Settings(), evaluation.Settings(task="funqa")
    assert (plain.data, funqa.data) == ("dataset/test_3_5.jsonl", "dataset/funqa_test.jsonl")
    assert funqa.output_dir == plain.output_dir / "funqa"
    assert evaluation.Settings(task="funqa", data="mine.jsonl").data == "mine.jsonl"
    with pytest.raises(InputError):
        evaluation.Settings(task="Funqa")
