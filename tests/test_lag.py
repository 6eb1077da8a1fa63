"""Lags of streaming: values of the formulas computed by hand, and words found in tokens with a real tokenizer."""

import random

import pytest
from metrics.lag import average_lagging, check, measure, word_slots
from qwen_vl_streaming.model.prompts import load_processor

TEXT = "The video shows 2 été 日本語 🙂 squares, red-green (doesn't) antidisestablish"


def test_values_computed_by_hand():
    # 3 clips, 4 words: the third is the first that all clips were there for. 1 - 0, 2 - 3/4 and 3 - 6/4, a third each.
    assert average_lagging([1, 2, 3, 3], 3, 4) == pytest.approx(1.25)
    # For a reference of 6 words: 1 - 0, 2 - 3/6 and 3 - 6/6.
    assert average_lagging([1, 2, 3, 3], 3, 6) == pytest.approx(1.5)


def test_known_policies():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(20):
        clips = draw.randint(2, 30)
        words = draw.randint(1, 100)
        assert average_lagging([clips] * words, clips, words) == clips  # offline: all is seen before the first word
        k = draw.randint(1, clips)
        waits = [min(k + t, clips) for t in range(clips)]
        assert average_lagging(waits, clips, clips) == pytest.approx(k)  # Ma et al.: wait-k has k
        rate = draw.randint(1, 4)
        paced = [1 + t // rate for t in range(rate * clips)]
        assert 0 < average_lagging(paced, clips, rate * clips) <= 1  # at an even pace: within the clip
        early = [draw.randint(1, clips - 1) for _ in range(words)]  # ends before the last clip: every word counts
        even = [t * clips / words for t in range(words)]
        assert average_lagging(early, clips, words) == pytest.approx((sum(early) - sum(even)) / words)


def test_a_word_is_written_with_its_last_token():
    pieces = ["The", " vid", "eo", " shows", " a", " red", ",", "", " \n", "ri", "ng.", "", "(x)"]
    assert word_slots(pieces, [1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]) == [1, 2, 2, 3, 4, 8]
    assert word_slots(["", " ", "\n"], [1, 2, 3]) == []


def test_words_with_a_real_tokenizer(made):
    """Compared with the text of every prefix of the tokens, which shows when a word is final."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    tokenizer = load_processor(made[0]).tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def decode(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)

    split = 0
    for _ in range(10):
        words = draw.choices(TEXT.split(), k=12)
        tokens = [*tokenizer(draw.choice([" ", "  ", "\n"]).join(words)).input_ids, end]
        slots = sorted(draw.randint(1, 9) for _ in tokens)
        final = decode(tokens).split()
        begun = [decode(tokens[:count]).split() for count in range(len(tokens) + 1)]
        expected = [
            slots[next(i for i, so_far in enumerate(begun) if so_far[w : w + 1] == [word]) - 1]
            for w, word in enumerate(final)
        ]
        row = {"video_id": "a", "result": decode(tokens), "annotation": "a b c", "tokens": tokens, "slots": slots}
        found = measure({**row, "clips": 9}, decode)
        assert found["words"] == len(words) and found["early_words"] == sum(slot < 9 for slot in expected)
        assert found["AL"] == pytest.approx(average_lagging(expected, 9, len(words)))
        assert found["LAAL"] == found["AL"]  # the reference is shorter
        longer = measure({**row, "clips": 9, "annotation": ["a b c", " ".join("x" * 30)]}, decode)
        assert longer["LAAL"] == pytest.approx(average_lagging(expected, 9, 30)) and longer["AL"] == found["AL"]
        split += sum("\N{REPLACEMENT CHARACTER}" in decode([token]) for token in tokens)
    assert split, "no character was split over tokens"
    silent = {"video_id": "a", "result": "", "annotation": "a", "tokens": [end], "slots": [2], "clips": 2}
    assert measure(silent, decode) == {"words": 0, "early_words": 0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"slots": None}, "v has no slots"),
        ({"slots": [1]}, "a slot from 1 to 2"),
        ({"slots": [0, 1]}, "a slot from 1 to 2"),
        ({"slots": [1, 3]}, "a slot from 1 to 2"),
        ({"result": "another"}, "v do not decode to its text"),
    ],
)
def test_rows_without_slots_are_refused(change, says):
    row = {"video_id": "v", "result": "a b", "annotation": "x", "tokens": [7, 8], "slots": [1, 2], "clips": 2, **change}
    row = {name: value for name, value in row.items() if value is not None}
    with pytest.raises(ValueError, match=says):
        measure(row, lambda tokens: "".join({7: "a", 8: " b"}[token] for token in tokens))
    if "result" not in change:
        with pytest.raises(ValueError, match=says):
            check(row)
