"""Captions with times: which tokens each slot writes, on hand-made cases and on random segments."""

import math
import random

import pytest
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.prompts import QUESTIONS, answer_ids, answer_slots, load_processor, make_template
from qwen_vl_streaming.timeline.segments import (
    arrival_times,
    check_segments,
    join_segments,
    row_caption,
    slot_tokens,
    token_times,
)

TEXTS = ("A red ring appears on the left.", "It turns blue.", "état 🙂 5,000 m", "球来了。", "他跑", "The-", "end", "…")


def segment(start: float, end: float, text: str) -> dict:
    return {"start": start, "end": end, "text": text}


def random_segments(draw: random.Random, seconds: float) -> list[dict]:
    """Segments without overlap within `seconds`; some are points in time, some follow each other without a gap."""
    times = sorted(draw.choice((draw.uniform(0, seconds), draw.randint(0, int(seconds)))) for _ in range(8))
    pairs = zip(times[::2], times[1::2], strict=True)
    return [segment(start, end, draw.choice(TEXTS)) for start, end in pairs]


def test_each_slot_writes_what_has_come():
    """Slot i starts when clip i has arrived, at i seconds."""
    tokens, arrivals = list("abcdefg"), arrival_times(5, 1.0)
    times = [0.0, 1.0, 1.5, 3.0, 3.0, 3.0, 3.2]
    assert slot_tokens(tokens, times, arrivals, 8, "<end>") == [
        ["a", "b"],
        ["c"],
        ["d", "e", "f"],
        ["g"],
        ["<end>"],
    ]
    assert slot_tokens(tokens, times, arrivals, 2, "<end>") == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
        ["f", "g"],
        ["<end>"],
    ]
    assert slot_tokens(tokens, times, arrivals, 2, "<end>", ".") == [
        ["a", "b"],  # full, so it ends without the end-of-slot token
        ["c", "."],
        ["d", "e"],
        ["f", "g"],
        ["<end>"],
    ]
    assert slot_tokens(tokens, times, arrivals[:2], 1, "<end>") == [
        ["a"],
        [*"bcdefg", "<end>"],
    ]  # the last has no bound
    assert slot_tokens(tokens, [9.0] * 7, arrivals[:3], 1, "<end>", ".") == [["."], ["."], [*tokens, "<end>"]]


def test_a_text_has_the_time_of_its_segment():
    segments = [
        segment(0, 2, " A dog\nruns in."),
        segment(2, 2.5, "球来"),
        segment(4, 6, "了。"),
        segment(6, 7, "go home"),
    ]
    timed = join_segments(segments)
    assert timed.text == "A dog runs in.球来了。go home" and timed.times == (2, 2.5, 6, 7)
    assert join_segments(segments, "start").times == (0, 2, 4, 6)
    spread = join_segments(segments, "spread")
    pieces = [spread.text[a:b] for a, b in zip((0, *spread.ends), spread.ends, strict=False)]
    assert pieces == ["A", " dog", " runs", " in.", "球", "来", "了", "。", "go", " home"] and spread.text == timed.text
    assert spread.times[:4] == pytest.approx((2 / 14, 10 / 14, 20 / 14, 2)) and spread.times[-1] == 7
    assert spread.times[4:8] == (2.25, 2.5, 5, 6)  # each character of Chinese is a word
    # A token across two segments has the later time, and so has what is split from one character.
    assert token_times(timed, [(0, 14), (13, 15), (15, 16), (15, 16), (16, 17)]) == [2, 2.5, 2.5, 2.5, 6]
    assert row_caption({"segments": segments}) == timed.text
    assert row_caption({"segments": segments, "human_caption": "A dog."}) == "A dog."


@pytest.mark.parametrize("when", ["end", "start", "spread"])
def test_slots_hold_the_text_and_never_write_early(made, when):
    """On random segments, joined slots are the tokens of the joined text, within the bound, none before its time."""
    processor = load_processor(made[0])
    template = make_template(processor, QUESTIONS[-1])
    for seed in range(60):
        draw = random.Random(f"{when} {seed}")
        clips, step, most = draw.randint(1, 12), draw.choice((1.0, 1.001, 2.0)), draw.randint(1, 6)
        segments = random_segments(draw, clips * step)
        check_segments(segments, clips * step)
        arrivals = arrival_times(clips, step)
        ended = answer_slots(processor, template, segments, arrivals, most, when, end_of_slot=-7)
        slots = answer_slots(processor, template, segments, arrivals, most, when)
        text = row_caption({"segments": segments})
        whole = answer_ids(processor, template, text)
        assert [token for slot in slots for token in slot] == whole, f"seed {seed}"
        assert len(slots) == clips and all(len(slot) <= most for slot in slots[:-1])
        assert [token for slot in ended for token in slot if token != -7] == whole
        for slot in ended[:-1]:
            assert len(slot) <= most and slot.count(-7) == (slot[-1:] == [-7]) and (-7 in slot or len(slot) == most)
        assert -7 not in ended[-1]
        for number, (arrival, slot) in enumerate(zip(arrivals[:-1], slots, strict=False), 1):
            key = "start" if when == "start" else "end"
            come = sum(s[key] <= arrival + 1e-6 for s in segments)
            written = processor.tokenizer.decode([token for each in slots[:number] for token in each])
            allowed = join_segments(segments[:come]).text if come else ""
            if when != "spread":
                assert allowed.startswith(written.removesuffix("\ufffd")), f"seed {seed}"
            if len(slot) < most and when != "spread":  # nothing waits for a slot with room
                assert len(written.removesuffix("\ufffd")) >= len(allowed) - 2, f"seed {seed}"


BAD = {
    "it has no segments": [],
    r"segment 2 \(3 to 5 s\) ends before segment 1 ends, at 9 s: sort the segments by end": [
        segment(0, 9, "a"),
        segment(3, 5, "b"),
    ],
    r"segment 2 \(0 to 1 s\) ends before segment 1 ends": [segment(3, 4, "a"), segment(0, 1, "b")],
    r"segment 1 \(2 to 1 s\) ends before it starts": [segment(2, 1, "a")],
    r"segment 1 \(-1 to 1 s\) starts before 0": [segment(-1, 1, "a")],
    r"segment 1 \(nan to 1 s\) has a time that is not a finite number": [segment(math.nan, 1, "a")],
    r"segment 1 \(0 to inf s\) has a time that is not": [segment(0, math.inf, "a")],
    r"segment 1 \(9 to 11.5 s\) ends after the video, at 10 s": [segment(9, 11.5, "a")],
    r"segment 1 \(0 to 1 s\) has no text": [segment(0, 1, " \n")],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_segments_are_named(message):
    with pytest.raises(InputError, match=message):
        check_segments(BAD[message], 10.0)


def test_only_the_times_that_count_are_in_order():
    """Segments may overlap. Spread over overlapping segments, the words of one come before the next starts."""
    by_start = [segment(0, 9, "A man plays"), segment(3, 5, "A dog")]
    for when, given in (("end", by_start[::-1]), ("start", by_start), ("spread", by_start), (None, by_start)):
        check_segments(given, 10, when)
        if when is not None:
            with pytest.raises(InputError, match=f"before segment 1 {'end' if when == 'end' else 'start'}s"):
                check_segments(given[::-1], 10, when)
    assert join_segments(by_start[::-1], "end").times == (5, 9) and join_segments(by_start, "start").times == (0, 3)
    assert join_segments(by_start, "spread").times == pytest.approx((3 / 11, 15 / 11, 3, 3.4, 5))


def test_published_times_that_are_rounded_are_accepted():
    check_segments([segment(0, 0.3, "a"), segment(0.3, 0.3 - 1e-9, "b") | {"start": 0.2}, segment(9, 10.8, "c")], 10.0)
    check_segments([segment(5, 500, "a")])
