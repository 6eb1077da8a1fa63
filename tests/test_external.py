"""Benchmarks from outside, on made-up data of the published shapes, and the commands of docs/evaluation.md as they are
written."""

import json
import os
import re
import shlex
from pathlib import Path

import eval as evaluation
import pytest
from adapters import cli
from adapters.activitynet import split_sentences, time_sentences, watched
from media import make_video
from metrics.preference import PROMPT, read_preference
from qwen_vl_streaming.common.data_rows import read_data_rows
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.model.prompts import load_processor
from refusing import refused
from test_commands import FROM_OUTSIDE

BETTER = "Commentary {} is better aligned with the human commentary."


def event(video_id, event_id, begin, end, **more):
    """An entry of LiveSports-3K-CC.json."""
    return {
        "video_id": video_id, "url": f"https://www.youtube.com/watch?v={video_id}", "event_id": event_id,
        "begin": begin, "end": end, "event_type": 1, "video": f"{video_id}.mp4", "class": "Cricket",
        "event_title": "Runs scored.", "event_asr": f'[[{begin}, {begin + 1.5}, "Bat and"], [{end - 1}, {end}, "4."]]',
        "event_asr_text": "Bat and ball for 4.", "preasr": "[]", "preasr_text": "", **more,
    }  # fmt: skip


EVENTS = [
    event("LEsNbpDKrbM", 12, 2.25, 6.5, preasr_text="Just testing him."),
    event("LEsNbpDKrbM", 3, 0.5, 2.5, event_title=None),
    event("-edKF31R_Tk", 24, 1, 5),
]
KEYS = ["LEsNbpDKrbM_12", "LEsNbpDKrbM_3", "-edKF31R_Tk_24"]


def prediction(entry, text):
    return {**{name: entry[name] for name in ("video_id", "event_id", "begin", "end")}, "pred": text}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(EVENTS))
    write(tmp_path / "mine.jsonl", [prediction(entry, f"mine {number}") for number, entry in enumerate(EVENTS)])
    write(tmp_path / "base.jsonl", [prediction(entry, f"base {number}") for number, entry in enumerate(EVENTS)])

    def command(*flags):
        monkeypatch.setattr("sys.argv", ["external.py", *map(str, flags)])
        run(cli.main)

    return command


def test_rows_of_livesports(call, tmp_path, capsys):
    call("livesports-rows", "bench.json", "--output", "rows.jsonl")
    assert capsys.readouterr().out == "3 events of 2 videos: rows.jsonl\n"
    asks = "Comment on this video live, as an expert commentator does."
    assert read("rows.jsonl")[0] == {
        "video_id": "LEsNbpDKrbM_12", "video_path": "LEsNbpDKrbM.mp4", "video_start": 2.25, "video_end": 6.5,
        "human_caption": "Bat and ball for 4.", "segment_time": "spread",
        "segments": [{"start": 0, "end": 1.5, "text": "Bat and"}, {"start": 3.25, "end": 4.25, "text": "4."}],
        "question": f"{asks}\nThe title of the video: Runs scored.\n"
        "The commentary so far, which you continue: Just testing him.",
    }  # fmt: skip
    assert [row["video_id"] for row in read("rows.jsonl")] == KEYS and read("rows.jsonl")[1]["question"] == asks
    lines = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(entry).encode() for entry in EVENTS)
    (tmp_path / "lines.jsonl").write_bytes(lines)
    call("livesports-rows", "lines.jsonl", "--output", "again.jsonl", "--question", "none")
    without = [{name: row[name] for name in row if name != "question"} for row in read("rows.jsonl")]
    assert read("again.jsonl") == without


def test_times_of_livesports(call, tmp_path, capsys):
    """Sentences may overlap; without times in order within the event, a row has no segments."""
    cases = {
        '[[10, 12.5, " A  goal! "], [12, 13.8, "Yes."]]': [(0, 2.5, "A goal!"), (2, 3.8, "Yes.")],
        '[[12, 13, "A goal!"], [10, 11, "Yes."]]': None,
        '[[9.9, 11, "A goal!"]]': None,
        '[[11, 15.5, "A goal!"]]': None,
        '[[12, 11, "A goal!"]]': None,
        '[[10, NaN, "A goal!"]]': None,
        "[]": None,
    }
    entries = [event("x", number, 10, 14, event_asr=text) for number, text in enumerate(cases)]
    write(tmp_path / "bench.jsonl", [*entries, event("x", 7, 10, 14, event_asr=None)])
    call("livesports-rows", "bench.jsonl", "--output", "rows.jsonl")
    found = [row.get("segments") for row in read("rows.jsonl")]
    times = [each and [(one["start"], one["end"], one["text"]) for one in each] for each in found]
    assert times == [*cases.values(), None]
    assert "7 events without segments" in capsys.readouterr().out
    list(read_data_rows(tmp_path / "rows.jsonl"))


def test_predictions_of_livesports(call, tmp_path, capsys):
    captions = [{"video_id": KEYS[index], "annotation": "x", "result": f"said {index}"} for index in (2, 0)]
    write(tmp_path / "group_infer.json", captions)
    call("livesports-predictions", "group_infer.json", "--benchmark", "bench.json", "--output", "group.jsonl")
    assert "predictions for 2 of 3 events: group.jsonl" in capsys.readouterr().out
    assert read("group.jsonl") == [
        {"video_id": "LEsNbpDKrbM", "event_id": 12, "begin": 2.25, "end": 6.5, "pred": "said 0"},
        {"video_id": "-edKF31R_Tk", "event_id": 24, "begin": 1.0, "end": 5.0, "pred": "said 2"},
    ]
    write(tmp_path / "group_infer.json", [*captions, {**captions[0], "video_id": "other"}])
    flags = "livesports-predictions", "group_infer.json", "--benchmark", "bench.json", "--output", "group.jsonl"
    assert "group_infer.json, video other: the benchmark has no such event" in refused(call, capsys, *flags)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"begin": "2"}, "begin is '2', not a time in seconds"),
        ({"begin": -1}, "begin is '-1', not a time in seconds"),
        ({"end": float("inf")}, "end is 'inf', not a time in seconds"),
        ({"end": None}, "end is 'None', not a time in seconds"),
        ({"end": 1, "begin": 1}, "ends at 1 s, not after its begin at 1 s"),
        ({"video_id": ""}, "has the video_id '', not a string or an integer"),
        ({"event_id": True}, "has the event_id 'True', not a string or an integer"),
        ({"event_id": 3}, "is the second entry of event LEsNbpDKrbM_3"),
        ({"event_asr_text": 5}, "has the event_asr_text '5', not a string"),
        ({"event_asr_text": "..."}, "event_asr_text has no word"),
        ({"event_asr": "[[1, 2]]"}, "event_asr is not a list of [start, end, text]: correct or delete it"),
        ({"event_asr": '[["1", 2, "Go"]]'}, "event_asr is not a list of [start, end, text]"),
        ({"event_asr": "Go"}, "event_asr is not a list of [start, end, text]"),
        ({"preasr_text": []}, "has the preasr_text '[]', not a string"),
        ("[1]", "is not a JSON object"),
        ("{", "not JSON (Expecting property name"),
    ],
)
def test_an_invalid_entry_is_named_with_its_line(call, tmp_path, capsys, change, says):
    last = change if isinstance(change, str) else json.dumps({**EVENTS[0], "event_id": 9, **change})
    (tmp_path / "bad.jsonl").write_text("\n".join([json.dumps(EVENTS[1]), "", last]) + "\n")
    error = refused(call, capsys, "livesports-rows", "bad.jsonl", "--output", "rows.jsonl")
    assert error.startswith(f"error: bad.jsonl, line 3: {says}") and not (tmp_path / "rows.jsonl").exists()


def test_files_that_are_not_the_benchmark(call, tmp_path, capsys):
    for content, says in (
        (b"", "bad.json has no entries"),
        (b"[]", "bad.json has no entries"),
        (b"[" * 10**6, "bad.json is not JSON (nested too deeply)"),
        (b"\xff", "bad.json, line 1: not JSON ('utf-8' codec"),
        (b'[{"video_id": "a"}]', "bad.json, entry 1: has no event_id, not"),
    ):
        (tmp_path / "bad.json").write_bytes(content)
        assert says in refused(call, capsys, "livesports-rows", "bad.json", "--output", "rows.jsonl")
    assert "would overwrite what is read" in refused(
        call, capsys, "livesports-rows", "bench.json", "--output", "./bench.json"
    )
    assert "(File name too long): move it, or give another path" in refused(
        call, capsys, "livesports-rows", "bench.json", "--output", "a" * 300
    )
    judge = ("--baseline", "base.jsonl", "--benchmark", "bench.json", "--judge-url", "http://x", "--judge-model", "x")
    assert ". cannot be written (it is a folder)" in refused(
        call, capsys, "livesports-judge", "mine.jsonl", *judge, "--output", "."
    )
    assert "the benchmark 'none.json' is not in" in refused(
        call, capsys, "livesports-rows", "none.json", "--output", "rows.jsonl"
    )


@pytest.mark.parametrize(
    ("answer", "winner"),
    [
        (BETTER.format("A"), "A"),
        (BETTER.format("B"), "B"),
        ("**Commentary B**", "B"),
        ("Commentary B is better aligned with the human commentary than Commentary A.", "B"),
        ("<think>Commentary A? Commentary A is better.</think>\nCommentary B is better aligned.", "B"),
        ("Commentary A and Commentary B are alike.", "A"),  # as LiveCC's script reads it
        ("Commentary A is not better; Commentary B is better aligned.", "B"),
        ("Commentary A is better, not Commentary B.", "A"),
        ("Commentary A is better aligned not only in meaning but in style; Commentary B is not.", "A"),
        ("Commentary A is not close and Commentary B is better.", "B"),
        ("Commentary A is not close, so **Commentary B**", "B"),
        ("Commentary A misses the goal. It isn't clear, but Commentary B is better aligned.", "B"),
        ("Neither Commentary A nor Commentary B is better aligned with the human commentary.", None),
        ("Neither Commentary A nor Commentary B", None),
        ("Neither commentary is close, so Commentary A is better aligned.", "A"),
        ("Commentary A is not better than Commentary B.", None),
        ("Commentary A isn't better.", None),
        ("I do not think that Commentary B is better.", None),
        ("Commentary A is no better than Commentary B", None),
        ("Commentary A and Commentary B are equally close.", None),
        ("Commentary A is worse than Commentary B.", None),
        ("Neither.", None),
        ("", None),
        (None, None),
    ],
)
def test_preferences(answer, winner):
    if winner:
        assert read_preference(answer).score == winner
    else:
        with pytest.raises(ValueError, match="with a preference"):
            read_preference(answer)


def test_the_judge_compares_in_both_orders(call, endpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.plan = {  # by the commentary that is A
        "mine 0": [(200, BETTER.format("A"))],
        "base 0": [(200, BETTER.format("B"))],  # the model's wins in both orders
        "mine 1": [(200, BETTER.format("A"))],
        "base 1": [(200, BETTER.format("A"))],  # whichever is A wins
        "mine 2": [(200, "I cannot say.")],  # a tie
        "base 2": [(200, BETTER.format("A"))],
        "": [(200, BETTER.format("A"))],
    }
    flags = ["livesports-judge", "mine.jsonl", "--baseline", "base.jsonl", "--benchmark", "bench.json"]
    flags += ["--judge-url", endpoint.url, "--judge-model", "gpt", "--output", "judged.jsonl"]
    call(*flags)
    out = capsys.readouterr().out
    assert (
        "mine wins 50.00% against base, judged by gpt" in out
        and "3 events in both orders\nwinners: judged.jsonl" in out
    )
    assert read("judged.jsonl") == [
        {"video_event_id": KEYS[0], "ab_winner": "mine", "ba_winner": "mine"},
        {"video_event_id": KEYS[1], "ab_winner": "mine", "ba_winner": "base"},
        {"video_event_id": KEYS[2], "ab_winner": "tie", "ba_winner": "base"},
    ]
    assert all(request["seed"] == 42 and request["temperature"] == 0 for request in endpoint.asked)
    assert "secret" not in (tmp_path / "judged.answers.jsonl").read_text()
    assert "Human commentary\n-----\nBat and ball for 4.\n-----" in endpoint.asked[-1]["messages"][0]["content"]

    endpoint.asked.clear()
    endpoint.plan["mine 2"] = [(200, BETTER.format("A"))]
    call(*flags)  # only the tie is asked about again, after the check
    assert [request["caption"] for request in endpoint.asked[1:]] == ["mine 2"]
    assert "mine wins 66.67%" in capsys.readouterr().out

    # Another prompt, and only the events that have a prediction.
    write(tmp_path / "mine.jsonl", [prediction(EVENTS[1], "{b} {human}")])
    assert "mine.jsonl has no prediction for 2 of 3 events of base.jsonl (first: LEsNbpDKrbM_12)" in refused(
        call, capsys, *flags
    )
    (tmp_path / "prompt.txt").write_text("{which?}\n-----\n{a}\n-----\n{b}\n-----\n{human}\n-----\n")
    call(*flags, "--allow-missing", "--prompt", "prompt.txt")
    out = capsys.readouterr().out
    assert "mine wins 50.00%" in out and "1 event in both orders; not counted, without a prediction: 2\n" in out
    asked = {request["messages"][0]["content"] for request in endpoint.asked[-2:]}
    texts = ("{b} {human}", "base 1")
    assert asked == {f"{{which?}}\n-----\n{a}\n-----\n{b}\n-----\nBat and ball for 4.\n-----\n"
                     for a, b in (texts, texts[::-1])}  # fmt: skip
    (tmp_path / "prompt.txt").write_text(PROMPT.replace("{a}", "{b}"))
    assert "the prompt prompt.txt must contain {a}, {b} and {human} once each" in refused(
        call, capsys, *flags, "--prompt", "prompt.txt"
    )


def test_predictions_that_cannot_be_judged(call, endpoint, tmp_path, capsys):
    judge = ["--benchmark", "bench.json", "--judge-url", endpoint.url, "--judge-model", "gpt", "--output", "out.jsonl"]
    twice = [prediction(EVENTS[0], "x")] * 2
    other = [prediction({**EVENTS[0], "event_id": 99}, "x")]
    for mine, base, flags, says in (
        (twice, [], [], "mine.jsonl, line 2: is the second prediction for event LEsNbpDKrbM_12"),
        ([{**twice[0], "pred": None}], [], [], "mine.jsonl, line 1: has the pred 'None', not a string"),
        (other, other, [], "mine.jsonl has a prediction for event LEsNbpDKrbM_99, but the benchmark does not"),
        (twice[:1], [prediction(EVENTS[1], "y")], [], "but base.jsonl does not have it"),
        (twice[:1], twice[:1], ["--judge-options", "[1]"], "--judge-options '[1]': give a JSON object"),
        (twice[:1], twice[:1], ["--judge-workers", "0"], "--judge-workers 0: give a number from 1 to 1000"),
    ):
        write(tmp_path / "mine.jsonl", mine)
        write(tmp_path / "base.jsonl", base or twice[:1])
        error = refused(call, capsys, "livesports-judge", "mine.jsonl", "--baseline", "base.jsonl", *judge, *flags)
        assert says in error, error
    endpoint.plan = {"": [(200, "I am a teapot.")]}
    flags = ["livesports-judge", "mine.jsonl", "--baseline", "base.jsonl", *judge]
    assert "answers, but not with a preference: 'I am a teapot.'" in refused(call, capsys, *flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_sentences_and_their_slots():
    pieces = ["A red", " ring. It", "", " grows to 3.5 m", '!" (Then', " it", " goes.) ... The", " e", "nd"]
    assert list(split_sentences(pieces)) == [
        ("A red ring.", 1, 2),
        ('It grows to 3.5 m!"', 2, 5),
        ("(Then it goes.)", 5, 7),
        ("The end", 7, 9),
    ]
    assert list(split_sentences(["一つ。二つ", "。\n- a", "\n"])) == [("一つ。", 1, 1), ("二つ。", 1, 2), ("- a", 2, 2)]
    assert [each[0] for each in split_sentences(["「一つ。」二つ！", "क है। ख", "是.否"])] == [
        "「一つ。」", "二つ！", "क है।", "ख是.", "否",
    ]  # fmt: skip
    assert list(split_sentences(["", " . ", "..."])) == [] == list(split_sentences([]))


def test_times_of_sentences():
    pieces = ["A red", " ring. It", "", " moves"]
    assert time_sentences(pieces) == [
        {"sentence": "A red ring.", "timestamp": [0.0, 2.0]},
        {"sentence": "It moves", "timestamp": [1.0, 4.0]},
    ]
    spans = [each["timestamp"] for each in time_sentences(pieces, 10.5, 3.25)]  # its last clip is cut
    assert spans == [[10.5, 12.5], [11.5, 13.75]]
    assert [each["timestamp"] for each in time_sentences(pieces, 0, None, 1.5)] == [[0.0, 3.0], [1.5, 6.0]]


def test_the_part_that_was_watched():
    row = {"video_path": "a.mp4"}
    assert watched(row) == (0.0, None) and watched(row | {"video_start": 2, "video_end": 5}) == (2.0, 3.0)
    for duration in (4.5, "4.5"):  # eval.sh accepts both
        assert watched(row | {"video_duration_in_s": duration, "video_start": 2}) == (2.0, 2.5)
    with pytest.raises(InputError, match="video_duration_in_s is 'long': give seconds"):
        watched(row | {"video_duration_in_s": "long"})


@pytest.fixture
def results(made, tmp_path):
    """A result file of a video of which a part was watched, and one that was watched whole."""
    tokenizer = load_processor(made[0]).tokenizer
    texts = ["A red ring moves up.", " It turns blue!", " The end"]
    counts = [len(tokenizer(text).input_ids) for text in texts]
    tokens = tokenizer("".join(texts)).input_ids
    assert len(tokens) == sum(counts)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    schedule = [counts[0], 0, counts[1] - 1, 1, counts[2] + 1]
    row = {"annotation": "x", "task": "description", "result": "".join(texts), "variant": "group"}
    row |= {"schedule": schedule, "tokens": [*tokens, end], "clips": 5, "seconds": 0.1}
    row |= {"slots": [slot for slot, count in enumerate(schedule, 1) for _ in range(count)]}
    write(tmp_path / "group_infer.json", [{"video_id": name, **row} for name in ("v_a", "v_b")])
    data = [{"video_id": name, "video_path": f"{name}.mp4", "human_caption": "x"} for name in ("v_a", "v_b")]
    data[0] |= {"video_duration_in_s": 4.5}
    data[1] |= {"video_start": 20, "video_end": 24.25}
    arguments = {"model": str(made[0]), "data": str(write(tmp_path / "data.jsonl", data))}
    arguments |= {"schedule": "x.json", "variant": "group"}
    (tmp_path / "group_infer.args.json").write_text(json.dumps(arguments))
    return tmp_path / "group_infer.json"


def test_predictions_in_the_layout_of_activitynet(call, results, tmp_path, capsys):
    call("activitynet-predictions", "group_infer.json", "--output", "dense.json", "--external-data", "none")
    assert "6 sentences of 2 videos: dense.json" in capsys.readouterr().out
    found = json.loads((tmp_path / "dense.json").read_text())
    assert found["version"] == "VERSION 1.0" and found["external_data"] == {"used": True, "details": "none"}
    assert found["results"]["v_a"] == [
        {"sentence": "A red ring moves up.", "timestamp": [0.0, 1.0]},
        {"sentence": "It turns blue!", "timestamp": [2.0, 4.0]},
        {"sentence": "The end", "timestamp": [4.0, 4.5]},
    ]
    assert [each["timestamp"] for each in found["results"]["v_b"]] == [[20.0, 21.0], [22.0, 24.0], [24.0, 24.25]]

    flags = ("activitynet-predictions", "group_infer.json", "--output", "dense.json")
    rows = read(results)
    # A model that decides when to speak ends its slots with a token that is not text; and a video of few frames.
    tokens, slots = rows[0]["tokens"], rows[0]["slots"]
    ends = [(9, slot) for slot in range(1, 5)]
    both = sorted([*zip(tokens, slots, strict=True), *ends], key=lambda pair: pair[1])
    assert 9 not in tokens
    quiet = {"tokens": [token for token, _ in both], "slots": [slot for _, slot in both], "end_of_slot": 9}
    quiet["schedule"] = [quiet["slots"].count(slot) for slot in range(1, 6)]
    write(results, [{**rows[0], **quiet, "seconds_per_clip": 0.5}])
    call(*flags)
    found = json.loads((tmp_path / "dense.json").read_text())["results"]["v_a"]
    assert [each["sentence"] for each in found] == ["A red ring moves up.", "It turns blue!", "The end"]
    assert [each["timestamp"] for each in found] == [[0.0, 0.5], [1.0, 2.0], [2.0, 2.5]]
    write(results, [{**rows[0], "seconds_per_clip": 0}])
    assert "group_infer.json: the row of video v_a has seconds_per_clip '0'" in refused(call, capsys, *flags)
    write(results, [{**rows[0], "result": "Something else"}])
    assert "group_infer.json: the tokens of video v_a do not decode to its text" in refused(call, capsys, *flags)
    write(results, [{**rows[0], "video_id": "v_c"}])
    assert "has no row for video v_c" in refused(call, capsys, *flags)
    write(results, [{**rows[0], "slots": [1]}])
    assert "group_infer.json, video 'v_a': the slots do not match" in refused(call, capsys, *flags)
    results.with_suffix(".args.json").unlink()
    assert "group_infer.args.json, the arguments of group_infer.json, is missing" in refused(call, capsys, *flags)


def test_files_that_soda_cannot_read(call, tmp_path, capsys):
    good = {"results": {"v_a": [{"sentence": "A ring.", "timestamp": [0, 1]}]}}
    references = {"v_a": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["A ring."]}}

    def said(**change):
        return {"results": {"v_a": [good["results"]["v_a"][0], {**good["results"]["v_a"][0], **change}]}}

    for predicted, reference, says in (
        ([], references, "dense.json has no object 'results'"),
        ({"results": {}}, references, "dense.json has no predictions"),
        ({"results": {"v_a": 3}}, references, "dense.json, video v_a: not a list of sentences"),
        (said(sentence=3), references, "dense.json, video v_a, sentence 2: its sentence is '3', not a string"),
        (said(timestamp=[1]), references, "dense.json, video v_a, sentence 2: its timestamp is '[1]', not [start"),
        (said(timestamp=[-1, 2]), references, "sentence 2: its timestamp is '-1', not a time in seconds"),
        (said(timestamp=[3, 2]), references, "sentence 2: ends at 2 s, before its start at 3 s"),
        (good, {}, "val_1.json has no videos"),
        (good, {"v_a": {"timestamps": [[0, 1]], "sentences": []}}, "val_1.json, video v_a: has no timestamps and"),
        (good, {"v_a": {"timestamps": ["x"], "sentences": ["x"]}}, "val_1.json, video v_a, sentence 1: its timestamp"),
        (good, {"v_b": references["v_a"]}, "dense.json: SODA_c was not computed: no video has both predictions and"),
    ):
        (tmp_path / "dense.json").write_text(json.dumps(predicted))
        (tmp_path / "val_1.json").write_text(json.dumps(reference))
        error = refused(call, capsys, "activitynet-soda", "dense.json", "--references", "val_1.json")
        assert says in error, error


def test_the_commands_of_the_page(call, made, endpoint, tmp_path, capsys, monkeypatch):
    """As they are written, one after the other; with real videos, a tiny model and METEOR itself."""
    (tmp_path / "LiveSports-3K-CC.json").write_text(json.dumps(EVENTS))
    write(tmp_path / "GPT-4o.jsonl", [prediction(entry, f"base {number}") for number, entry in enumerate(EVENTS)])
    (tmp_path / "LiveSports-3K").mkdir()
    for name in ("LEsNbpDKrbM", "-edKF31R_Tk"):
        make_video(tmp_path / f"LiveSports-3K/{name}.mp4", seconds=7, fps=6, size=(64, 64))
    endpoint.plan = {"": [(200, BETTER.format("A"))]}
    output = tmp_path / "code/evaluation/output"
    small = f"--model {made[0]} --device cpu --workers 0 --max-new-tokens 8 --output-dir {output}"
    small += " --min-pixels-per-frame 3136 --max-pixels-per-frame 3136 --variant group"
    monkeypatch.setattr(evaluation, "prepare_scoring", lambda *_: None)  # Java takes seconds
    monkeypatch.setattr(evaluation, "score_rows", lambda *_: None)
    commands = re.findall(r"^(?:python|bash) (.+)$", FROM_OUTSIDE, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        program, *flags = shlex.split(command.replace("https://api.openai.com/v1", endpoint.url))
        if program == "eval.sh":
            monkeypatch.setattr("sys.argv", [program, *shlex.split(small), *flags])
            run(evaluation.main)
            rows = read(output / "livesports_infer.json")
            assert {row["video_id"]: row["clips"] for row in rows} == dict(zip(KEYS, (5, 2, 4), strict=True))
            for what in ("json", "args.json"):
                os.link(output / f"livesports_infer.{what}", output / f"group_infer.{what}")
            continue
        assert program == "code/evaluation/external.py"
        if flags[0] == "activitynet-soda":  # made-up predictions: the tiny model says nothing of sense
            ring, blue = "A red ring moves up.", "It turns blue."
            said = [(ring, [0, 10]), (blue, [10, 20]), ("...", [20, 30])]
            dense = [{"sentence": sentence, "timestamp": span} for sentence, span in said]
            (tmp_path / "dense.json").write_text(json.dumps({"results": {"v_a": dense}}))
            first = {"v_a": {"duration": 30, "timestamps": [[0, 5]], "sentences": [ring.upper()]}}
            second = {"v_a": {"duration": 30, "timestamps": [[10, 20], [9, 2]], "sentences": [blue, "Bat and ball."]}}
            (tmp_path / "val_1.json").write_text(json.dumps(first))
            (tmp_path / "val_2.json").write_text(json.dumps(second))
            flags += ["--output", "soda.json"]
        call(*flags)
    out = capsys.readouterr().out
    assert "predictions for 3 of 3 events: group.jsonl" in out and "group wins 50.00% against GPT-4o" in out
    assert {row["video_id"] for row in read("group.jsonl")} == {"LEsNbpDKrbM", "-edKF31R_Tk"}
    # METEOR of the same words is 1. IoU 1/2 and 1, of 3 predictions and 3 references: 1.5 / 3 both.
    scores = json.loads((tmp_path / "soda.json").read_text())
    assert (scores["SODA_c"], scores["precision"], scores["recall"]) == pytest.approx((50, 50, 50), abs=1e-4)


def test_a_judge_that_stops_answering_is_one_line(call, endpoint, tmp_path, capsys):
    entries = [event("x", number, 0, 2) for number in range(30)]
    write(tmp_path / "bench.jsonl", entries)
    for name in ("mine", "base"):
        write(tmp_path / f"{name}.jsonl", [prediction(each, f"{name} {each['event_id']}") for each in entries])
    endpoint.plan = {"": [*[(200, BETTER.format("B"))] * 9, (401, {"error": {"message": "key revoked"}})]}
    flags = ["livesports-judge", "mine.jsonl", "--baseline", "base.jsonl", "--benchmark", "bench.jsonl"]
    flags += ["--judge-url", endpoint.url, "--judge-model", "gpt", "--output", "judged.jsonl", "--judge-workers", "1"]
    error = refused(call, capsys, *flags)
    assert "stopped answering" in error and "key revoked" in error and "after 8 of 60 comparisons" in error
    assert len(read("judged.answers.jsonl")) == 8 and not (tmp_path / "judged.jsonl").exists()
    with pytest.raises(InputError, match="line 1: not an answer"):
        write(tmp_path / "judged.answers.jsonl", [{**read("judged.answers.jsonl")[0], "score": "C"}])
        endpoint.plan = {"": [(200, BETTER.format("B"))]}
        arguments = cli.make_parser().parse_args(flags)
        arguments.run(arguments)
