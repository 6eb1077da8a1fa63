"""Which word of a caption names an event: hand-made cases, and properties of random captions."""

import itertools
import random
from dataclasses import replace

import pytest
from metrics.naming import Event, Spoken, align, content_words, spoken_words, stem, words_in

COLOURS, SHAPES = ("red", "green", "blue", "pink"), ("ring", "square", "cross")


def spoken(*slots: str) -> Spoken:
    """What was said, as the text of each slot from 1; each word is a token."""
    pieces = [(f" {word}", slot) for slot, text in enumerate(slots, 1) for word in text.split()]
    return Spoken(spoken_words([piece for piece, _ in pieces], [slot for _, slot in pieces]))


def named(events: list[Event | None], said: Spoken) -> list[int | None]:
    """The slots in which the events are named."""
    assert all(events)
    return [None if found is None else said.words[found].slot for found in align(events, said)]


def text(time: float, words: str) -> Event | None:
    return Event.from_text(time, None, words)


ALIKE = (
    "turns turn turned turning", "moves moved moving move", "stops stopped stopping stop", "boxes box", "carries carry",
    "dog's dogs dog", "passes passed pass passing", "falls falling fall", "ring rings", "leaves leaving leave",
    "go goes going", "die dies died dying", "tie ties tied tying", "lie lies lied lying", "untie unties untied untying",
    "try tries tried trying", "carry carried carrying", "use uses used using", "ice iced icing",
    "eye eyes eyed eyeing",
    "dye dyes dyed dyeing", "free frees freed freeing", "agree agrees agreed agreeing", "see sees seeing",
    "ski skis skied skiing",    "add adds added adding", "puff puffs puffed puffing", 
    "drop drops dropped dropping", "trek treks trekked trekking",
    "travel travels travelled travelling", "install installs installed installing", "roll rolls rolled rolling",
    "echo echoes echoed echoing", "shoe shoes", "toe toes", "canoe canoes canoeing", "potato potatoes", "movie movies",
    "cookie cookies", "lens lenses", "gas gases", "canvas canvases", "bus buses", "size sizes sized", "axe axes",
    "play plays played playing", "buzz buzzes buzzed buzzing", "own owns owned owning", "feed feeds feeding", 
    "owe owes owed",)  # fmt: skip


@pytest.mark.parametrize("alike", ALIKE)
def test_words_with_one_stem(alike):
    assert len({stem(word) for word in alike.split()}) == 1, [stem(word) for word in alike.split()]


def test_words_with_different_stems():
    text = "red ring bed king thing bus gas grass left right lift need speed rig riding 視 été "
    text += (
        "go use us to toe off of in inn add file fill roll role die dye news new seed see feed agreement lay lie goat"
    )
    words = text.split()
    assert len({stem(word) for word in words}) == len(words)
    assert stem("Bus") == "bus" and stem("grass") == "grass" and stem("king") == "king" and stem("été") == "été"


def test_content_words():
    assert content_words("The video shows a green ring on the left; it's GREEN.") == ["green", "ring", "left"]
    assert content_words("It is there.") == [] and Event.from_text(0, None, "It is there.") is None
    assert content_words("一個紅圈") == ["一", "個", "紅", "圈"]


def test_an_event_is_named_by_the_last_word_that_is_needed():
    said = spoken("The video shows", "a green", "ring on the", "left. A", "red square", "appears on", "the right.")
    assert named([Event.from_keys(0, None, ["green", "ring"])], said) == [3]
    assert named([text(3, "A red square appears on the right.")], said) == [6]  # three of four key words
    assert named([text(3, "A red square leaves the right side.")], said) == [7]  # red, square, right: three of five
    assert named([text(3, "A blue ring appears on the right.")], said) == [None]
    assert named([Event.from_keys(3, None, ["red", "square", "turns"])], said) == [None]  # all words are needed


def test_a_piece_is_within_one_sentence_and_not_too_long():
    assert named([text(0, "a red ring")], spoken("a red", "ring")) == [2]
    assert named([text(0, "a red ring")], spoken("It is red.", "A ring")) == [None]
    assert named([text(0, "a red ring")], spoken("red", "", "ring")) == [3]
    assert named([text(0, "a red ring")], spoken("red", "", "", "ring")) == [None]  # two slots without a word: a pause
    far = "red one two three four five six seven eight ring"
    assert named([text(0, "a red ring")], spoken(far)) == [None]  # ten words, for a text of three
    assert named([text(0, "a red ring")], spoken(far.replace(" one", ""))) == [1]


def test_the_order_is_that_of_the_events():
    turns = [text(3, "It turns red."), text(5, "It turns blue."), text(8, "It turns red.")]
    said = spoken("", "", "", "It turns red.", "", "It turns blue.", "", "", "It turns red.")
    assert named(turns, said) == [4, 6, 9]
    # The first is not said, and the later "turns red" is about the third.
    assert named(turns, spoken("", "", "", "", "", "It turns blue.", "", "", "It turns red.")) == [None, 6, 9]
    # Said once, after both: about the nearer.
    assert named([turns[0], turns[2]], spoken(*[""] * 8, "It turns red.")) == [None, 9]
    # Said before and after: the second is about the event, the first a guess.
    assert named([turns[2]], spoken("", "It turns red.", *[""] * 6, "It turns red.")) == [9]
    assert named([turns[2]], spoken("", "It turns red.")) == [2]  # only before


def test_words_get_the_slot_of_their_last_character():
    pieces = [
        "The",
        " vid",
        "eo",
        " is",
        "",
        " red",
        "-gre",
        "en",
        ".",
        ' "',
        "Wow",
        '"',
        " …",
        " ",
        "視",
        "!",
    ]
    slots = [1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 8, 10]
    words = spoken_words(pieces, slots)
    assert [(word.stem, word.slot) for word in words[3:]] == [("red", 3), ("green", 4), ("wow", 6), ("視", 8)]
    assert [word.sentence for word in words] == [0] * 5 + [1, 2]


def test_text_without_spaces_has_the_slots_of_its_characters():
    said = Spoken(spoken_words(["红色", "圆出现。", "蓝色方", "块消失。"], [1, 2, 7, 9]))
    assert named([text(1, "红色圆出现"), text(7, "蓝色方块消失")], said) == [2, 9]
    assert [len(span) for span in said.sentences] == [5, 6]
    said = Spoken(spoken_words(["赤い丸", "が出る！」", "青い", "四角が消える"], [1, 2, 3, 4]))
    assert named([text(0, "赤い丸が出る"), text(2, "青い四角が消える")], said) == [2, 4]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("आदमी दौड़ता है। कुत्ता भौंकता है॥", [["आदमी", "दौड़ता", "है"], ["कुत्ता", "भौंकता", "है"]]),
        ("هل يجري؟ كَلْب كبير", [["هل", "يجري"], ["كَلْب", "كبير"]]),
        ("کتا دوڑتا ہے۔ وہ", [["کتا", "دوڑتا", "ہے"], ["وہ"]]),
        ("ที่นี่ สีแดง", [["ที่นี่", "สีแดง"]]),
        ("👩\u200d🚀 🔴 A ring ☀️. 🎉! It", [["A", "ring"], ["It"]]),
        ("cafe\u0301 re\u0301d", [["cafe\u0301", "re\u0301d"]]),
        ("レッド・リング!次", [[*"レッドリング"], ["次"]]),
        ("it's红色 𠀀", [["it's", *"红色", "𠀀"]]),
        ("3.5 m, a.b", [["3", "5", "m", "a", "b"]]),
    ],
)
def test_words_and_sentences_in_other_scripts(caption, expected):
    words = spoken_words(list(caption), [1] * len(caption))
    plain = [[stem(word) for word in sentence] for sentence in expected]
    numbers = sorted({word.sentence for word in words})
    assert [[word.stem for word in words if word.sentence == number] for number in numbers] == plain
    assert words_in(caption) == [word for sentence in expected for word in sentence]


def test_different_codes_of_a_character_are_the_same():
    assert stem("cafe\u0301") == stem("café") and stem("ＲＥＤ") == "red" and stem("dog’s") == "dog"


def random_story(draw: random.Random) -> tuple[list[Event], list[str], list[str]]:
    """Different events, the sentence about each, and the text that each of 12 slots says: some of these sentences and
    others, at random times."""
    things = draw.sample([*itertools.product(COLOURS, SHAPES)], 4)
    sentences = [f"A {colour} {shape} appears on the left." for colour, shape in things]
    times = sorted(draw.sample(range(10), 3))
    events = [Event.from_keys(time, None, [*thing, "appears"]) for time, thing in zip(times, things[:3], strict=True)]
    slots = [""] * 12
    for slot in sorted(draw.sample(range(12), 6)):
        slots[slot] = draw.choice(sentences)
    return events, sentences, slots


def brute_force(events: list[Event], said: Spoken) -> tuple[int, int, float]:
    """What `align` maximizes, over all choices of pieces."""
    best = (0, 0, 0.0)
    for chosen in itertools.product(*([None, *said.pieces(event)] for event in events)):
        pieces = [piece for piece in chosen if piece]
        if all(a.last < b.first for a, b in itertools.pairwise(pieces)):
            delays = [
                said.words[piece.last].slot - event.time
                for event, piece in zip(events, chosen, strict=True)
                if piece is not None
            ]
            best = max(best, (sum(d > 0 for d in delays), len(delays), -float(sum(map(abs, delays)))))
    return best


def test_properties_of_random_captions():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    several = 0
    for _ in range(60):
        events, _, slots = random_story(draw)
        said = spoken(*slots)
        found = align(events, said)
        indices = [index for index in found if index is not None]
        assert indices == sorted(set(indices))
        delays = [said.words[i].slot - event.time for event, i in zip(events, found, strict=True) if i is not None]
        assert (sum(d > 0 for d in delays), len(delays), -sum(map(abs, delays))) == brute_force(events, said)
        several += len(indices) > 1

        # The order of the words of one slot does not matter, as long as a sentence ends where it did.
        mixed = []
        for words in slots:
            *others, last = words.removesuffix(".").split() or [""]
            mixed.append(" ".join([*draw.sample([*others, last], len(others) + 1)]) + ("." if last else ""))
        assert named(events, spoken(*mixed)) == named(events, said)

        # Only the times between events and words matter.
        later = [replace(event, time=event.time + 2) for event in events]
        expected = [None if slot is None else slot + 2 for slot in named(events, said)]
        assert named(later, spoken("", "", *slots)) == expected
    assert several > 10
