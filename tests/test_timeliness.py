"""When a caption says what happens: formulas with values by hand, whole captions, references with times, and the
commands on files as a user calls them."""

import json
import math
import random
from pathlib import Path

import pytest
import timeliness as program
from captioning import make_row
from metrics.lag import decode_pieces
from metrics.lag import measure as measure_lag
from metrics.naming import Event
from metrics.references import events_of, read_times
from metrics.timeliness import (
    Timing,
    area,
    events_within,
    f1,
    match_responses,
    measure,
    quiet_slots,
    summarize,
    timeliness,
)
from metrics.timing import describe, measure_file
from PIL import Image
from qwen_vl_streaming.common.errors import InputError, run
from qwen_vl_streaming.stream import Caption
from qwen_vl_streaming.timeline.variants import VARIANTS
from refusing import refused
from report.said_times import places_of
from result_files import World
from results import FIELDS, hash_rows
from verify import check_times

KEYS = [Event.from_keys(0, None, ["green", "ring"]), Event.from_keys(3, None, ["red", "square", "appears"])]
KEYS += [Event.from_keys(7, 9, ["turns", "blue"])]


def row_of(*slots: str, **more) -> dict:
    """A row of a result file that says the text of each slot; its tokens are the words."""
    words = [(f" {word}", slot) for slot, text in enumerate(slots, 1) for word in text.split()]
    row = {"video_id": "v", "annotation": "x", "result": " ".join(word.strip() for word, _ in words)}
    row |= {"tokens": list(range(len(words))), "slots": [slot for _, slot in words], "clips": len(slots)}
    row["decode"] = lambda tokens: "".join(words[token][0] for token in tokens)
    return row | more


def timing(*slots: str, events=KEYS, **more) -> Timing:
    row = row_of(*slots, **more)
    return measure(row, events, row["decode"])


def said(found: Timing) -> list[float | None]:
    return [one.said for one in found.named]


def test_the_timeliness_of_a_response():
    assert [timeliness(3 + d, 3) for d in (-1, 0, 1)] == [1, 1, 1]
    assert timeliness(5, 3) == pytest.approx(math.exp(-1 / (2 * 0.74**2)))  # a second after the window
    assert timeliness(1, 3) == pytest.approx(math.exp(-1 / (2 * 1.48**2)))  # a second before it


def test_responses_are_matched_as_in_spot_bench():
    late = timeliness(5, 3)
    # Three responses and two events: the first names both in time, the second the first event late, the third nothing.
    assert match_responses([3, 4], [[4.0, 5.0, None], [4.0, None, None]]) == ([1.0, 1.0], 1)
    assert match_responses([3, 4], [[None, 5.0, None], [None, None, None]]) == ([pytest.approx(late), 0.0], 2)
    assert match_responses([3], [[9.0]]) == ([0.0], 1)  # T is below the threshold
    assert match_responses([3], [[3.0] * 7]) == ([1.0], 2)  # an event takes five
    assert match_responses([3], [[]]) == ([0.0], 0)
    # TP 1, FN 1, FP 2 and a weight of one half: P = 1/6, R = 1/4.
    assert f1([0.5, 0.0], 2) == pytest.approx(2 * (1 / 6) * (1 / 4) / (1 / 6 + 1 / 4))
    assert f1([0.0], 0) == 0 and f1([1.0, 1.0], 0) == 1


def test_the_example_of_proactive_video_qa():
    """Its figure 3: replies at 312, 328, 344 and 352 s in (311, 360) have the scores 0, 1, 2 and 2."""
    replies = [(312, 0), (328, 1), (344, 2), (352, 2)]
    assert area(replies, 311, 360, omega=0) == pytest.approx(48.5 / 98)
    assert area(replies, 311, 360, omega=1) == 1  # only the last score counts
    half = 0.5 * 0.5 + 8 * 0 + 8 * 1 + (49 - 16.5) * 2
    assert area(replies, 311, 360) == pytest.approx(half / 98)
    assert area([], 311, 360) == 0.25


def test_a_caption_by_hand():
    found = timing("The video shows", "a green ring", "here.", "A red", "square appears.", "", "", "It", "turns blue.")
    assert said(found) == [2, 5, 9] and [one.delay for one in found.named] == [2, 2, 2]
    late = timeliness(2, 0)
    assert found.timeliness == [late, late, late] and found.unmatched == 0
    # Each is named by its sentence at 2 of 5 seconds, of which ω takes half; the score is 0.5 before and 2 after that.
    assert found.pauc == pytest.approx((1 * 0.5 + 4 * 2) / 10)
    assert (found.quiet, found.quiet_words) == (0, 0)
    values = summarize([found, timing(*[""] * 9)])
    assert values == {
        "videos": 2, "events": 6, "delay_median": 2, "delay_95": 2, "within_1": 0, "within_2": 50, "within_3": 50,
        "never": 50, "early": 0, "TF1": pytest.approx(100 * f1([late] * 3 + [0] * 3, 0)),
        "PAUC": pytest.approx(100 * (found.pauc + 0.25) / 2),
    }  # fmt: skip


def test_what_is_said_before_it_happens_is_early():
    found = timing("", "", "A red square appears.", *[""] * 6, events=KEYS[1:2])
    assert said(found) == [3] and found.named[0].early and found.named[0].delay is None
    assert found.timeliness == [1]  # SPOT-Bench lets a response be a second early
    assert found.pauc == 0.25  # and ProactiveVideoQA only counts replies within the span
    values = summarize([found])
    assert values["early"] == 100 and values["never"] == values["within_3"] == 0 and "delay_median" not in values
    found = timing("", "", "A red square appears.", "A red square appears.", *[""] * 5, events=KEYS[1:2])
    assert said(found) == [4] and found.unmatched == 0


def test_an_event_between_two_frames_is_seen_in_the_next_clip():
    """Clip 3 has frames at 2.0 and 2.5 s: an event at 2.6 s is on screen in clip 4."""
    for time, seconds, first in ((2.0, 1, 3), (2.5, 1, 3), (2.6, 1, 4), (3.0, 1, 4), (4.9, 2, 6), (5.1, 2, 8)):
        event, texts = Event.from_keys(time, None, ["ring"]), ["", "", "", "", "", "", "", "", ""]
        for slot in range(1, 9):
            found = timing(*texts[: slot - 1], "A ring.", *texts[slot:], events=[event], seconds_per_clip=seconds)
            early = slot * seconds < first
            assert said(found) == [slot * seconds] and found.named[0].early == early, (time, slot)
            assert found.named[0].delay == (None if early else slot * seconds - time)
    # Of two pieces, the one that was said when the event had been seen names it.
    texts = ["", "", "A ring.", "", "A ring.", "", ""]
    assert said(timing(*texts, events=[Event.from_keys(2.6, None, ["ring"])])) == [5]
    # No frame is after 6.6 s: such an event may be named in the last slot.
    last = timing(*[""] * 6, "A ring.", events=[Event.from_keys(6.6, None, ["ring"])])
    assert not last.named[0].early


def test_events_at_the_same_time_in_any_order():
    events = [Event.from_text(3, 5, "A dog barks loudly."), Event.from_text(3, 5, "A cat runs away.")]
    for order in (events, events[::-1]):
        found = timing("", "", "", "A cat runs away.", "A dog barks loudly.", "", "", events=order)
        assert {one.event.text: one.said for one in found.named} == {events[0].text: 5, events[1].text: 4}


def test_wrong_replies_score_below_silence():
    silent = timing(*[""] * 9, events=KEYS[1:2]).pauc
    wrong = timing("", "", "", "It moves up.", *[""] * 5, events=KEYS[1:2])
    partly = timing("", "", "", "A red cross appears.", *[""] * 5, events=KEYS[1:2])
    assert wrong.unmatched == 1 and wrong.pauc < silent < partly.pauc
    assert partly.pauc == pytest.approx((0.5 * 0.5 + 4.5 * 1) / 10)


def test_all_at_the_end():
    """As offline: everything is named, nothing in time."""
    found = timing(*[""] * 19, "A green ring. A red square appears. It turns blue.")
    values = summarize([found])
    assert said(found) == [20, 20, 20] and values["never"] == values["within_3"] == values["TF1"] == 0
    assert (found.quiet, found.quiet_words) == (9, 0) and values["words_per_quiet_second"] == 0


def test_words_in_quiet_stretches():
    # Nothing begins in slots 4 to 9 but the event at 3, whose three seconds end with slot 6.
    assert quiet_slots([3.0], 10, 1.0) == {1, 2, 7, 8, 9} and quiet_slots([0.5], 4, 2.0) == {2, 3}
    found = timing("a", "b c", "", "", "", "", "It is", "", "there", "The rest of it", events=KEYS[1:2])
    assert (found.quiet, found.quiet_words) == (5, 6)
    assert summarize([found])["words_per_quiet_second"] == 6 / 5


def test_clips_of_other_lengths():
    found = timing("", "A red square", "appears.", "", events=KEYS[1:2], seconds_per_clip=2.0)
    assert said(found) == [6] and found.named[0].delay == 3
    with pytest.raises(ValueError, match="v has seconds_per_clip '-1'"):
        timing("", events=KEYS[:1], seconds_per_clip=-1)
    caption = Caption([5], [1], [1])
    rows = [make_row(row_of("a") | {"task": "x"}, "a", caption, VARIANTS["group"], 0.5, clip) for clip in (1.0, 2.0)]
    assert rows[0].keys() == FIELDS.keys() and rows[1] == {**rows[0], "seconds_per_clip": 2.0}
    assert check_times({"seconds_per_clip": 2.0}, {}, 1.0) == ["the row has clips of 2.0 s, the video 1 s"]
    assert check_times({}, {}, 2.0) == []  # written before rows had it
    assert check_times({"segments": []}, {"segments": [1]}, 1.0) == ["the segments are not those of the data"]


def test_tokens_without_text_do_not_matter():
    """The end of a slot, where it is a token, and the end of the answer."""
    row = row_of("A green", "ring. A", "", "red square appears.", "")
    plain = measure(row, KEYS[:2], row["decode"])
    tokens, slots = [], []
    for slot in range(1, 6):
        tokens += [token for token, when in zip(row["tokens"], row["slots"], strict=True) if when == slot] + [99]
        slots += [slot] * (len(tokens) - len(slots))
    found = measure(
        row | {"tokens": tokens, "slots": slots}, KEYS[:2], lambda ids: row["decode"]([i for i in ids if i != 99])
    )
    assert found == plain and said(found) == [2, 4]


BYTES = "红色\u3000圆。🙂 é".encode()


@pytest.mark.parametrize("end_of_slot", [None, 99])
def test_characters_of_several_tokens(end_of_slot):
    """Each token is a byte, also of white space; the end of a slot may be between them."""

    def decode(tokens):
        return bytes(BYTES[token] for token in tokens).decode(errors="replace")

    tokens, slots = list(range(len(BYTES))), [1] * 8 + [2] * 7 + [3] * (len(BYTES) - 15)
    if end_of_slot:
        tokens[8:8], slots[8:8] = [end_of_slot], [1]
    row = {"video_id": "v", "annotation": "x", "result": BYTES.decode(), "tokens": tokens, "slots": slots}
    row |= {"clips": 3, "end_of_slot": end_of_slot}
    pieces = decode_pieces(row, decode)
    assert "".join(pieces) == BYTES.decode() and pieces[2:4] == ["红", ""]
    assert said(measure(row, [Event.from_text(0, None, "红色"), Event.from_text(1, None, "圆")], decode)) == [1, 2]
    assert measure_lag(row, decode)["words"] == 3
    # An answer that ends within a character.
    cut = row | {"tokens": tokens[:-1], "slots": slots[:-1], "result": BYTES[:-1].decode(errors="replace")}
    assert "".join(decode_pieces(cut, decode)) == cut["result"]


def test_captions_without_words_and_videos_of_one_clip():
    for slots in (["", ""], ["... 🙂", ""], [""]):
        found = timing(*slots, events=KEYS[:1])
        assert said(found) == [None] and found.unmatched == 0 and found.pauc == 0.25
    found = timing("A green ring.", events=KEYS[:1])
    assert said(found) == [1] and found.quiet == 0 and summarize([found])["TF1"] == 100


def test_a_video_whose_times_do_not_fit_is_skipped(tmp_path, caplog):
    rows = [row_of("A green ring.", "", video_id=name) for name in ("a", "b")]
    times = {"a": KEYS[:1], "b": [*KEYS[:1], Event.from_keys(3.5, None, ["red"])]}
    path = tmp_path / "group_infer.json"
    found = measure_file(rows, path, times, rows[0]["decode"])
    assert (found["videos"], found["events"], found["within_1"]) == (1, 1, 100)
    assert (found["times_do_not_fit"], found["without_times"], found["after_the_end"]) == (1, 0, 0)
    assert "1 of 2 videos; video b ends at 2 s, but has an event at 3.5 s" in caplog.text
    assert "more than 1 s after the end: 1 video" in describe(found)
    with pytest.raises(ValueError, match=r"none of the 1 videos of .* that fits \(video b ends at 2 s"):
        measure_file(rows[1:], path, times, rows[0]["decode"])


def test_rows_that_cannot_be_timed():
    late = [Event.from_keys(time, None, ["ring"]) for time in (6.5, 5.5, 6.0, 7.0)]
    assert events_within(row_of(*[""] * 6), late) == [late[1]]
    with pytest.raises(ValueError, match=r"v ends at 6 s, but has an event at 7\.5 s"):
        events_within(row_of(*[""] * 6), [*late, Event.from_keys(7.5, None, ["ring"])])
    with pytest.raises(ValueError, match="v has no slots"):
        events_within({"video_id": "v", "tokens": [], "clips": 3}, late)
    with pytest.raises(ValueError, match="v has no slots"):
        row = row_of("a")
        measure({name: value for name, value in row.items() if name != "slots"}, KEYS[:1], row["decode"])
    with pytest.raises(ValueError, match="another tokenizer"):
        timing("a", result="b", events=KEYS[:1])


def test_properties_of_random_captions():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    sentences = ["A green ring.", "A red square appears.", "It turns blue.", "It moves up.", ""]
    for _ in range(60):
        slots = [draw.choice([*sentences, "", ""]) for _ in range(12)]
        found = timing(*slots)
        values = summarize([found])
        assert all(one.delay is None or one.delay > 0 for one in found.named)
        assert 0 <= values["within_1"] <= values["within_2"] <= values["within_3"]
        assert values["within_3"] + values["never"] + values["early"] <= 100 + 1e-9
        assert all(0 <= values[name] <= 100 for name in ("TF1", "PAUC", "never", "early"))
        assert values.get("delay_median", 0) <= values.get("delay_95", 0)
        # Said at once, whole and without anything else, it is the best that is possible.
        best = timing("A green ring.", "", "", "A red square appears.", "", "", "", "It turns blue.", *[""] * 4)
        assert summarize([best])["TF1"] == 100 and summarize([best])["within_1"] == 100
        assert all(values[name] <= summarize([best])[name] + 1e-9 for name in ("TF1", "PAUC", "within_1"))
        # A sentence about nothing that happens, in a slot of its own, names nothing and costs precision.
        more = timing(*slots[:-1], slots[-1] + " It shrinks.")
        assert said(more) == said(found) and summarize([more])["TF1"] <= values["TF1"]
        assert timing(*slots) == found


def test_references_are_read(tmp_path):
    path = tmp_path / "times.jsonl"
    demo = [{"second": 0, "shape": "ring", "colour": "red", "event": "appears", "word": 3}]
    demo += [{"second": 4, "shape": "ring", "colour": "red", "event": "appears", "word": 9}]
    demo += [{"second": 2, "shape": "ring", "colour": "blue", "event": "turns blue", "word": 9}]
    segments = [{"start": 2, "end": 4.5, "text": "It is."}, {"start": 1, "text": "A dog runs."}]
    rows = [{"video_id": "a", "events": demo}, {"video_id": 7, "segments": segments}, {"video_id": "b", "segments": []}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(map(json.dumps, rows)).encode())
    found = read_times(path)
    assert [(event.time, event.text) for event in found["a"]] == [
        (0, "red ring"), (2, "turns blue"), (4, "red ring appears"),
    ]  # fmt: skip
    assert found["7"] == [Event.from_text(1, None, "A dog runs.")] and found["b"] == []
    assert events_of({"video_id": "c"}, "c") is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: is not a JSON object"),
        ('{"segments": []}', "line 2: has no video_id, not a string"),
        ('{"video_id": "b"}', "line 2: the row has neither segments nor events"),
        ('{"video_id": "a", "events": []}', "line 2: is the second row of video a"),
        ('{"video_id": "b", "events": {}}', "line 2: events is not a list"),
        ('{"video_id": "b", "events": [3]}', "line 2, event 1: not an object"),
        ('{"video_id": "b", "segments": [{"start": -1, "text": "a"}]}', "line 2, segment 1: start is '-1', not"),
        ('{"video_id": "b", "segments": [{"start": NaN, "text": "a"}]}', "line 2, segment 1: start is 'nan', not"),
        ('{"video_id": "b", "segments": [{"start": 1, "end": "x", "text": "a"}]}', "segment 1: end is 'x', not"),
        ('{"video_id": "b", "segments": [{"start": 2, "end": 1, "text": "a"}]}', "segment 1: ends at 1 s, before"),
        ('{"video_id": "b", "segments": [{"text": "a"}]}', "line 2, segment 1: time is 'None', not"),
        ('{"video_id": "b", "events": [{"time": 1}]}', "line 2, event 1: neither a text nor a list of words"),
        ('{"video_id": "b", "events": [{"time": 1, "words": []}]}', "line 2, event 1: neither a text nor"),
    ],
)
def test_bad_references_are_refused_in_one_line(tmp_path, line, says):
    path = tmp_path / "times.jsonl"
    path.write_text('{"video_id": "a", "events": []}\n' + line + "\n")
    with pytest.raises(InputError) as refused:
        read_times(path)
    assert says in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_files_without_rows_are_refused(tmp_path):
    for name, content in (("none", None), ("empty", "\n")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            read_times(tmp_path / name)


def test_close_events_are_one_point_on_their_side_of_the_diagonal():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    points = [(draw.uniform(0, 20), draw.choice([None, float(draw.randint(1, 20))])) for _ in range(2000)]
    points = [(time, said, said is not None and said < time + draw.random()) for time, said in points]
    places = places_of(points, 20.0)
    assert sum(place.count for place in places) == 2000 and len(places) < 61 * 22
    for kind in ("named", "early", "never"):
        expected = sum(
            kind == ("never" if said is None else "early" if early else "named") for _, said, early in points
        )
        assert sum(place.count for place in places if place.kind == kind) == expected
    assert all(place.said is None or abs(place.said - round(place.said)) == 0 for place in places)


@pytest.fixture(scope="module")
def world(made, tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world") / "results", *made)
    world.add("group")
    world.add("batch")
    return world


def truth(world: World) -> str:
    return str(world.data.parent / "data/truth.jsonl")


def call(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["timeliness.py", *arguments])
    run(program.main)
    return capsys.readouterr().out


def test_the_command_on_the_demos_scenes(world, monkeypatch, capsys, tmp_path):
    """Captions that are the references name every event, a variant that streams in seconds."""
    picture = tmp_path / "said.png"
    out = call(monkeypatch, capsys, *world.files, "--times", truth(world), "--picture", str(picture))
    files = (world.folder / f"{variant}_wait-3_scores.json" for variant in ("batch", "group"))
    batch, group = (json.loads(file.read_text()) for file in files)
    events = [len(read_times(Path(truth(world)))[video["video_id"]]) for video in world.videos]
    for scores in (batch, group):
        assert scores["count"] == 3 and "CIDEr" in scores  # kept
        assert scores["timeliness"]["events"] == sum(events) and scores["timeliness"]["never"] == 0
    offline, streamed = batch["timeliness"], group["timeliness"]
    assert streamed["early"] == 0 and 1 < streamed["delay_median"] <= 3 < offline["delay_median"]
    assert streamed["within_3"] > 60 > 30 > offline["within_3"] and streamed["PAUC"] > offline["PAUC"]
    lines = out.splitlines()
    assert lines[0].split()[2:5] == ["events", "delay", "95%"] and lines[0].split()[-2:] == ["AL", "LAAL"]
    assert lines[1].startswith("batch wait-3") and lines[2].startswith("group wait-3") and "picture: " in out
    points = [json.loads(line) for line in (world.folder / "group_wait-3_timeliness.jsonl").read_text().splitlines()]
    assert len(points) == sum(events) and all(point["said"] > point["time"] for point in points)
    assert min(Image.open(picture).size) > 300
    # Rows with segments of their own need no --times.
    path = world.folder / "group_wait-3_infer.json"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    timed = [{**row, "segments": [{"start": 0.0, "end": 2.0, "text": row["result"].split(".")[0]}]} for row in rows[:2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*timed, rows[2]]))
    call(monkeypatch, capsys, str(path))
    path.write_text(before)
    found = json.loads((world.folder / "group_wait-3_scores.json").read_text())["timeliness"]
    assert (found["events"], found["without_times"], found["never"]) == (2, 1, 0)


def test_the_report_shows_it(world, monkeypatch, capsys):
    call(monkeypatch, capsys, *world.files, "--times", truth(world))
    page, text = world.report(*world.files, "--videos", "0")
    found = json.loads((world.folder / "group_wait-3_scores.json").read_text())["timeliness"]
    (row,) = [
        line
        for line in text.partition("### When it speaks")[2].partition("## Runs")[0].splitlines()
        if "| group |" in line
    ]
    cells = [cell.strip() for cell in row.split("|")[5:-1]]
    assert cells[:3] == [str(found["events"]), f"{found['delay_median']:.2f}", f"{found['delay_95']:.2f}"]
    assert cells[8:10] == [f"{found['TF1']:.2f}", f"{found['PAUC']:.2f}"]
    assert page.count('aria-label="event time against said time') == 2 and page.count('<circle class="named"') > 6
    (world.folder / "batch_wait-3_timeliness.jsonl").write_text("{}\n")
    monkeypatch.setattr("sys.argv", ["report.py"])
    with pytest.raises(SystemExit):
        world.report(*world.files, "--videos", "0")
    assert "batch_wait-3_timeliness.jsonl cannot be read" in capsys.readouterr().err
    scores = world.folder / "batch_wait-3_scores.json"
    scores.write_text(json.dumps({**json.loads(scores.read_text()), "timeliness": {"not_computed": "in /a/b.txt"}}))
    page, text = world.report(*world.files, "--videos", "0")
    assert "not computed: in b.txt" in text.replace("\\", "") and page.count('aria-label="event time') == 1


def test_events_and_scores_of_other_captions_are_not_mixed(world, monkeypatch, capsys, caplog):
    path, scores = Path(world.files[1]), world.folder / "group_wait-3_scores.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    other = {"CIDEr": 1.5, "count": 3, "skipped": 0, "captions": hash_rows([{**row, "result": "old"} for row in rows])}
    scores.write_text(json.dumps(other))
    call(monkeypatch, capsys, str(path), "--times", truth(world))
    assert json.loads(scores.read_text()) == other
    assert "timeliness is not added to its scores: group_wait-3_scores.json is of other captions" in caplog.text

    scores.write_text(json.dumps({**other, "captions": hash_rows(rows)}))
    call(monkeypatch, capsys, str(path), "--times", truth(world))
    assert json.loads(scores.read_text())["timeliness"]["events"] > 3
    points = world.folder / "group_wait-3_timeliness.jsonl"
    points.write_text("".join(points.read_text().splitlines(keepends=True)[1:]))
    monkeypatch.setattr("sys.argv", ["report.py"])
    assert f"{points} cannot be read (it is not of the timeliness in" in refused(
        world.report, capsys, str(path), "--videos", "0"
    )


def test_the_command_refuses_in_one_line(world, monkeypatch, capsys, tmp_path):
    file = world.files[0]
    other = tmp_path / "other.jsonl"
    other.write_text('{"video_id": "elsewhere", "events": [{"time": 1, "words": ["a"]}]}\n')
    for arguments, says in (
        ([file], "have no segments: give references with --times"),
        ([file, "--times", "nowhere.jsonl"], "--times 'nowhere.jsonl' is not in"),
        ([file, "--times", str(other)], "none of the 3 videos of"),
        ([file, "--times", truth(world), "--picture", "said.svg"], "--picture said.svg"),
        (["nowhere_infer.json"], "the result file 'nowhere_infer.json'"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, capsys, *arguments)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert ended.value.code == 2 and len(errors) == 1 and says in errors[0], errors
