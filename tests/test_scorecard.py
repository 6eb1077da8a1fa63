"""All metrics of a file of captions, with `eval.py --score-only`, as a user calls it."""

import json
import random
import shutil
from pathlib import Path

import eval as evaluation
import pytest
from metrics.bleurt import bleurt
from metrics.lag import measure
from metrics.scoring import METRICS, check_java, score
from qwen_vl_streaming.common.errors import run
from qwen_vl_streaming.model.prompts import load_processor
from results import FIELDS, sibling
from tiny_bleurt import tiny_bleurt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bleurt")
    tiny_bleurt(folder)
    return folder


@pytest.fixture
def endpoint(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    return endpoint


@pytest.fixture
def quick_java(monkeypatch, tmp_path):
    """A java without memory for METEOR, which takes seconds to load."""
    fake = tmp_path / "java"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = -jar ]; then echo no memory >&2; exit 1; fi\nexec {check_java()} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.fixture
def score_only(monkeypatch):
    monkeypatch.delenv("QWEN2_5_VL_VARIANT", raising=False)

    def call(path: Path, *flags: object) -> dict:
        given = ["eval.sh", "--score-only", str(path), "--device", "cpu", *map(str, flags)]
        monkeypatch.setattr("sys.argv", given)
        run(evaluation.main)
        return json.loads(sibling(path, "scores.json").read_text())

    return call


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> list[dict]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def captions(count: int) -> list[dict]:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    words = ["the", "video", "shows", "a", "red", "blue", "square", "circle", "that", "moves"]

    def caption() -> str:
        return " ".join(draw.choices(words, k=draw.randint(4, 9)))

    return [{"video_id": f"v{n}", "annotation": caption(), "result": f"{caption()} {n}"} for n in range(count)]


def test_every_metric_of_captions_with_slots(
    made, checkpoint, endpoint, score_only, quick_java, tmp_path, capsys, caplog
):
    tokenizer = load_processor(made[0]).tokenizer

    def decode(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)

    rows = captions(6)
    rows[2]["annotation"] = [rows[2]["annotation"], "a blue circle moves to the right and on and on and on and on"]
    rows[5]["result"] = ""
    for number, row in enumerate(rows):
        tokens = tokenizer(row["result"]).input_ids
        slots = [min(1 + index // 3, 5) for index in range(len(tokens))]
        row |= {"task": "description", "variant": "group", "schedule": [3, 3, 3, 3, 3], "seconds": 1.0 + number}
        row |= {"tokens": tokens, "slots": slots, "clips": 5}
        assert set(row) == set(FIELDS)
    path = tmp_path / "group_infer.json"
    write_rows(path, rows)
    path.with_suffix(".args.json").write_text(json.dumps({"model": str(made[0])}))
    endpoint.plan[rows[1]["result"]] = [(200, '{"score": 1, "why": "broken"}')]
    endpoint.plan[rows[4]["result"]] = [(400, {"error": {"message": "filtered"}})]
    times = tmp_path / "times.jsonl"
    write_rows(times, [{"video_id": "v1", "events": [{"time": 0, "words": rows[1]["result"].split()[:1]}]}])
    flags = ("--bleurt", checkpoint, "--judge-url", endpoint.url, "--judge-model", "grader", "--times", times)
    scores = score_only(path, *flags)

    references = {row["video_id"]: row["annotation"] for row in rows}
    expected = score(references, {row["video_id"]: row["result"] for row in rows})
    assert list(scores["not_computed"]) == ["METEOR"] == list(expected.pop("not_computed"))
    assert expected.keys() == set(METRICS) - {"METEOR"} and {metric: scores[metric] for metric in expected} == expected
    several = [[text] if isinstance(text, str) else text for text in references.values()]
    each = bleurt(checkpoint, several, [row["result"] for row in rows])
    assert scores["BLEURT"] == pytest.approx(sum(each) / 6)
    assert scores["Fluency"] == (4 * 4 + 1) / 5
    assert scores["judge"] == {"model": "grader", "judged": 5, "not_judged": 1}
    lags = [measure(row, decode) for row in rows]
    for name in ("AL", "LAAL"):
        assert scores[name] == pytest.approx(sum(found[name] for found in lags[:5]) / 5)
    assert scores["early_words"] == sum(found["early_words"] for found in lags) / 6
    assert scores["lag"] == {"videos": 5, "without_words": 1}
    assert (scores["count"], scores["skipped"]) == (6, 0)
    found = scores["timeliness"]
    assert (found["events"], found["without_times"], found["delay_median"], found["within_1"]) == (1, 5, 1, 100)
    said = [{"video_id": "v1", "event": rows[1]["result"].split()[0], "time": 0, "said": 1, "early": False}]
    assert lines(tmp_path / "group_timeliness.jsonl") == said
    said_then, asked = said, len(endpoint.asked)

    videos = lines(tmp_path / "group_per_video.jsonl")
    assert [video["video_id"] for video in videos] == [row["video_id"] for row in rows]
    assert [video["BLEURT"] for video in videos] == pytest.approx(each)
    assert videos[1]["Fluency"] == 1 and videos[1]["why"] == "broken"
    assert "Fluency" not in videos[4] and "filtered" in videos[4]["not_judged"]
    assert [{name: video.get(name) for name in lags[0]} for video in videos[:5]] == lags[:5] and "AL" not in videos[5]
    said = capsys.readouterr()
    assert "5 of 6 captions judged by grader" in said.out and "LAAL" in said.out
    assert "1 event in 1 video: delay 1.0 s (median)" in said.out
    assert {request["key"] for request in endpoint.asked} == {"Bearer secret"}

    # What is not asked for this time is kept, unless the captions have changed.
    assert score_only(path) == scores and lines(tmp_path / "group_per_video.jsonl") == videos
    assert lines(tmp_path / "group_timeliness.jsonl") == said_then and len(endpoint.asked) == asked
    without = score_only(path, *flags[:2])  # BLEURT is computed again, the rest kept
    assert without == scores
    write_rows(
        path,
        [rows[0] | {"result": rows[1]["result"], "tokens": rows[1]["tokens"], "slots": rows[1]["slots"]}, *rows[1:]],
    )
    assert not {"BLEURT", "Fluency", "timeliness", "bleurt", "judge"} & score_only(path).keys()
    assert "BLEURT, Fluency, timeliness removed, as not asked for" in caplog.text
    (tmp_path / "group_scores.json").write_text('{"BLEU')
    score_only(path)
    assert "group_scores.json or group_per_video.jsonl cannot be read" in caplog.text
    write_rows(path, rows)

    endpoint.plan.clear()
    endpoint.asked.clear()
    assert score_only(path, *flags)["judge"] == {"model": "grader", "judged": 6, "not_judged": 0}
    assert len(endpoint.asked) == 2, "more than the check and the caption that was left"


def test_metrics_that_cannot_be_computed_are_omitted_with_the_reason(
    made, checkpoint, endpoint, score_only, quick_java, tmp_path, capsys
):
    rows = write_rows(tmp_path / "mine.json", captions(30))
    plan = [(200, '{"score": 5, "why": ""}')] * 4  # the first of them is the check
    endpoint.plan = {"": [*plan, (404, {"error": "the model was unloaded"})]}
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-9])
    flags = ("--bleurt", cut, "--judge-url", endpoint.url, "--judge-model", "grader")
    scores = score_only(tmp_path / "mine.json", *flags)
    reasons = scores["not_computed"]
    assert list(reasons) == ["METEOR", "BLEURT", "Fluency", "AL", "LAAL", "early_words"]
    assert not scores.keys() & reasons.keys() and scores["BLEU-1"] > 0
    assert "v0 has no tokens, slots, clips" in reasons["LAAL"] and "cannot be read" in reasons["BLEURT"]
    assert "unloaded" in reasons["Fluency"] and "3 of 30" in reasons["Fluency"]
    out = capsys.readouterr().out
    assert all(f"\n{metric} " in out for metric in reasons)
    assert len(lines(tmp_path / "mine.judge.jsonl")) == 3

    assert "timeliness" not in scores and not (tmp_path / "mine.timeliness.jsonl").exists()

    # Without metrics that were not requested, and with a tokenizer other than the one that wrote.
    rows = [{**row, "tokens": [5, 6], "slots": [1, 1], "clips": 2} for row in rows]
    write_rows(tmp_path / "mine.json", rows)
    scores = score_only(tmp_path / "mine.json")
    assert list(scores["not_computed"]) == ["METEOR", "AL", "LAAL", "early_words"]
    assert "mine.args.json" in scores["not_computed"]["AL"]
    (tmp_path / "mine.args.json").write_text(json.dumps({"model": str(made[0])}))
    assert "do not decode to its text" in score_only(tmp_path / "mine.json")["not_computed"]["AL"]
    (tmp_path / "mine.args.json").write_text(json.dumps({"model": str(tmp_path / "gone")}))
    assert "gone" in score_only(tmp_path / "mine.json")["not_computed"]["AL"]
    write_rows(tmp_path / "mine.json", [{**row, "segments": [{"start": "x"}]} for row in rows])
    found = score_only(tmp_path / "mine.json")["timeliness"]
    assert list(found) == ["not_computed"] and "video v0, segment 1: start is 'x'" in found["not_computed"]


def test_requirements_of_scoring_are_checked_first(checkpoint, endpoint, score_only, tmp_path, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("something long ran")

    for name in ("make_plan", "score_rows"):
        monkeypatch.setattr(evaluation, name, never)
    write_rows(tmp_path / "mine.json", captions(2))
    endpoint.plan = {"": [(401, {"error": {"message": "who are you"}})]}
    judge = ("--judge-url", endpoint.url, "--judge-model", "grader")
    for flags, says in (
        (("--bleurt", tmp_path / "nowhere"), "no such folder"),
        (("--bleurt", tmp_path), "config.json is not that of a BLEURT-20"),
        (judge, "set OPENAI_API_KEY"),
        (judge[:2], "--judge-url and --judge-model go together"),
        ((*judge, "--judge-options", "[1]"), "--judge-options '[1]': give a JSON object"),
        ((*judge, "--judge-options", "{"), "give a JSON object"),
        ((*judge, "--judge-workers", 0), "--judge-workers 0: give a number from 1"),
        (("--times", tmp_path / "nowhere"), "--times"),
        (("--times", tmp_path / "mine.json"), "mine.json, line 1: the row has neither segments nor events"),
    ):
        with pytest.raises(SystemExit) as ended:
            score_only(tmp_path / "mine.json", *flags)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert ended.value.code == 2 and len(error) == 1 and says in error[0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"video_id": "a", "annotation": "x"}, "no 'result'"),
        ({"video_id": "a", "annotation": " .", "result": "x"}, "'a' has a reference without a word"),
        ({"video_id": "a", "annotation": ["x", 3], "result": "x"}, "'a' has a reference without a word"),
    ],
)
def test_an_invalid_row_of_captions_is_one_line(score_only, tmp_path, capsys, row, says):
    write_rows(tmp_path / "mine.json", [row])
    with pytest.raises(SystemExit):
        score_only(tmp_path / "mine.json")
    assert says in capsys.readouterr().err and not (tmp_path / "mine.scores.json").exists()
