"""Finds the word of a caption by which it names an event. Knows nothing about models, files, videos and scores.

Words are compared by their stems. They are separated by spaces or punctuation; in Chinese and Japanese, each character
is a word. Thai, Khmer, Lao and Burmese, also written without spaces, are not divided into words. An event has *key
words*: those that it is given with, all of which are needed, or the content words of its text, of which three in five
are needed. A *piece* of a caption names the event if it contains as many different key words as are needed, lies within
one sentence, and is not longer than three times the text of the event. The event is named by the last word of such a
piece: there, enough has been said.

`align` chooses the pieces of several events: in the order of the events, and without a word in two of them.
"""

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

SHARE = (3, 5)
"""Of the content words of a text, how many are needed, as a fraction."""
LONGEST = 3
"""Length of the longest piece, in units of the event's text."""
FRAMES_PER_CLIP = 2
"""Frames are sampled at the start of a clip and in its middle."""
SLACK = 1e-6
"""Seconds by which times may differ from rounding."""
PAUSE = 2
"""So many slots without a word end a sentence, as a full stop does."""

# Characters of Chinese and Japanese. Each is a word of its own: these are written without spaces.
_HAN_KANA = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
# Accents and vowel signs that follow their letter, as in Hindi and Thai: in `re`, these are not part of \w.
_MARKS = "".join(char for char in map(chr, range(0x300, 0x20000)) if unicodedata.category(char).startswith("M"))
_PART = rf"(?:[^\W_{_HAN_KANA}][{_MARKS}]*)+"
WORD = re.compile(rf"[{_HAN_KANA}][{_MARKS}]*|{_PART}(?:['’]{_PART})*")
_CLOSING = r"[\"'”’)\]»」』）】]*"
SENTENCE_END = re.compile(rf"[.!?…]+{_CLOSING}(?=\s|$)|[.!?](?=[{_HAN_KANA}])|[。！？｡؟۔।॥]+{_CLOSING}|\n+")
"""The end of a sentence, in Arabic, Urdu and Hindi as well. The point of a number such as 3.5 is not one; that of "Mr.
Smith" is."""
STOP = (
    "a an the this that these those there here it its he him his she her they them their we us our you "
    "your i me my and or but so as if then than while when with without of to in on at by for from into "
    "onto over is are was were be been being am do does did has have had can could will would may might "
    "not no who which what where video videos clip scene shows show shown showing see sees seen "
)
STOP_WORDS = frozenset(STOP.split())
"""Words that do not tell one event from another, among them those that introduce a description of a video."""


UNCHANGED = ("lens", "gas", "news", "canvas")
IRREGULAR = dict(zip(UNCHANGED, UNCHANGED, strict=True))
IRREGULAR |= {"goes": "go", "going": "go", "skied": "ski", "freed": "free", "axes": "axe", "guaranteed": "guarantee"}
IRREGULAR |= {"agreed": "agree", "disagreed": "disagree", "refereed": "referee"}
"""Words to which the rules of `stem` do not apply."""


def stem(word: str) -> str:
    """The lower-case word without the endings 's, -s, -es, -ing, -ed and -e, with -y for -ie, -ies and -ied, and
    without the doubled consonant that -ing or -ed may leave: a simplified form of steps 1a, 1b and 5a of Porter's
    algorithm (1980). Irregular forms, such as went, fell and men, are other words. Different codes of one character
    (Unicode's NFKC) are the same. Stems are only compared with each other; they need not be words."""
    word = re.sub(r"['’](?:s$)?", "", unicodedata.normalize("NFKC", word).lower())
    if not word.isascii():
        return word
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif len(word) > 3 and re.search(r"ie[sd]$", word):
        return word[:-3] + "y"
    elif re.search(r"(\w(ss|sh|ch|x|z)|\w\wo)es$", word):
        word = word[:-2]
    elif len(word) > 2 and re.search(r"[^us]s$", word):
        word = word[:-1]
    if found := re.fullmatch(r"(\w*[aeiouy]\w*?)(ing|(?<!e)ed)", word):
        if len(found[1]) > 2:
            word = re.sub(r"(?<=\w\w)([bdgkmnprtv])\1$", r"\1", found[1])
        elif re.match(r"[aeiou][^aeiou]", found[1]) or found[0].endswith("yed"):  # used, using, dyed
            word = found[1] + "e"
        elif found[1].endswith("y"):  # dying
            word = found[1]
    word = re.sub(r"([aeiou][^aeiou]+[aeiou]+l)l$", r"\1", re.sub(r"ie$", "y", word))  # travelled, travels
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def words_in(text: str) -> list[str]:
    """The words of a text as written, without punctuation."""
    return WORD.findall(text)


def is_stop_word(word: str) -> bool:
    """Whether the word, or of a contraction such as it's its first part, is one of STOP_WORDS."""
    return re.split("n?['’]", word.lower())[0] in STOP_WORDS


def content_words(text: str) -> list[str]:
    """The stems of the words of a text that are not stop words, each once."""
    return list(dict.fromkeys(stem(word) for word in words_in(text) if not is_stop_word(word)))


@dataclass(frozen=True)
class Event:
    """Something that happens in a video, and the words that name it."""

    time: float
    """When it begins, in seconds of the video."""
    end: float | None
    """When it ends, or None if that is not known."""
    text: str
    """The reference, for people to read."""
    keys: frozenset[str]
    """Stems of the key words; at least one."""
    needed: int
    """How many of them a piece that names it has."""
    longest: int
    """Words of the longest such piece."""

    @classmethod
    def from_text(cls, time: float, end: float | None, text: str) -> "Event | None":
        """The event that `text` describes, or None if that has no content word."""
        keys = content_words(text)
        needed = -(-len(keys) * SHARE[0] // SHARE[1])
        return cls(time, end, text, frozenset(keys), needed, LONGEST * len(words_in(text))) if keys else None

    @classmethod
    def from_keys(cls, time: float, end: float | None, keys: Sequence[str]) -> "Event | None":
        """The event that all of `keys` together name, or None if they have no word."""
        words = [stem(word) for key in keys for word in words_in(key)]
        different = frozenset(words)
        return cls(time, end, " ".join(keys), different, len(different), LONGEST * len(words)) if words else None


@dataclass(frozen=True)
class Word:
    """A word of a caption."""

    stem: str
    slot: int
    """The slot that wrote its last character."""
    sentence: int
    """Which sentence it is in, from 0."""
    content: bool


def spoken_words(pieces: Sequence[str], slots: Sequence[int]) -> list[Word]:
    """The words of a caption whose tokens have the texts `pieces`, joined the whole text, and were written in `slots`.

    A sentence ends at SENTENCE_END, and before PAUSE slots without a word.
    """
    text = "".join(pieces)
    slot_of = [slot for piece, slot in zip(pieces, slots, strict=True) for _ in piece]
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    words: list[Word] = []
    pauses = 0
    for found in WORD.finditer(text):
        slot = slot_of[found.end() - 1]
        pauses += bool(words) and slot - words[-1].slot > PAUSE
        sentence = bisect_right(ends, found.start()) + pauses
        words.append(Word(stem(found[0]), slot, sentence, not is_stop_word(found[0])))
    return words


@dataclass(frozen=True)
class Piece:
    """The shortest piece that names an event and ends at a certain word."""

    first: int
    last: int
    """Indices of its words; the last is that by which it names the event."""


@dataclass(frozen=True)
class Spoken:
    """The words of one caption."""

    words: Sequence[Word]

    def pieces(self, event: Event) -> list[Piece]:
        """For each word at which a piece that names the event can end, the shortest such piece, in order."""
        found = []
        for last, word in enumerate(self.words):
            if word.stem not in event.keys:
                continue
            seen: set[str] = set()
            for first in range(last, max(-1, last - event.longest), -1):
                if self.words[first].sentence != word.sentence:
                    break
                if self.words[first].stem in event.keys:
                    seen.add(self.words[first].stem)
                if len(seen) == event.needed:
                    found.append(Piece(first, last))
                    break
        return found

    @cached_property
    def sentences(self) -> list[range]:
        """Indices of the words of each sentence that has a content word."""
        ends = [i for i, (a, b) in enumerate(pairwise(self.words), 1) if a.sentence != b.sentence]
        spans = [range(first, last) for first, last in pairwise([0, *ends, len(self.words)])]
        return [span for span in spans if any(self.words[i].content for i in span)]

    def keys_in(self, span: range, event: Event) -> int:
        """How many different key words of the event a sentence has."""
        return len({self.words[i].stem for i in span} & event.keys)


def first_slot(time: float, seconds: float = 1.0, clips: float = math.inf) -> int:
    """The slot of the first clip that has a frame at `time` or later: before it, nothing is known of what begins then.
    The last slot for what begins after the last frame of a video of `clips`, of `seconds` each."""
    return min(math.ceil((time - SLACK) * FRAMES_PER_CLIP / seconds) // FRAMES_PER_CLIP + 1, clips)


def align(events: Sequence[Event], spoken: Spoken, seconds: float = 1.0, clips: float = math.inf) -> list[int | None]:
    """For each event, in order of time, the index of the word that names it, or None.

    A word of slot i is said at i * `seconds`, when clip i has arrived. The pieces have the order of the events and
    share no word; events at the same time have the order in which the caption names them first. Of all such choices it
    is the one that names the most events in or after their `first_slot`; then the most in all; then the one with the
    smallest sum of distances in time, so that of several such pieces the first names the event.
    """
    firsts = [first_slot(event.time, seconds, clips) for event in events]
    pieces = [spoken.pieces(event) for event in events]

    def place(number: int) -> tuple:
        seen = [piece for piece in pieces[number] if spoken.words[piece.last].slot >= firsts[number]]
        named = (seen or pieces[number] or [Piece(0, 0)])[0]
        return events[number].time, named.last, named.first, events[number].text

    order = sorted(range(len(events)), key=place)
    size = len(spoken.words)
    best: list[tuple[int, int, float]] = [(0, 0, 0.0)] * (size + 1)  # by the number of words that may be used
    chosen: list[list[Piece | None]] = []
    for number in order:
        ending = {piece.last: piece for piece in pieces[number]}
        new, took = best[:], [None] * (size + 1)
        for used in range(1, size + 1) if ending else ():
            if new[used - 1] > new[used]:
                new[used], took[used] = new[used - 1], took[used - 1]
            if piece := ending.get(used - 1):
                after, named, distance = best[piece.first]
                slot = spoken.words[piece.last].slot
                delay = slot * seconds - events[number].time
                value = (after + (slot >= firsts[number]), named + 1, distance - abs(delay))
                if value > new[used]:
                    new[used], took[used] = value, piece
        best = new
        chosen.append(took)
    found: list[int | None] = [None] * len(events)
    left = size
    for number, took in zip(reversed(order), reversed(chosen), strict=True):
        if piece := took[left]:
            found[number], left = piece.last, piece.first
    return found
