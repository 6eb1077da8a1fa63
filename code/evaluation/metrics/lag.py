"""Lag metrics of streaming: how long after the arrival of a clip words are written. Knows nothing about models, files
and other metrics.

The source is the sequence of clips of a video, one per second. The target is the sequence of words of a caption,
separated by whitespace. A word is written in the slot of its last token. In slot i, clips 1 … i have arrived, so g(t),
the number of source units available when target unit t is written, is the slot of word t.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

FIELDS = ("tokens", "slots", "clips")


def word_slots(pieces: Sequence[str], slots: Sequence[int]) -> list[int]:
    """g(1) … g(words): the slot of each word, which is that of its last token.

    `pieces` are the texts of the tokens with their spaces, and `slots` their slots from 1. Tokens without text, such as
    the end of the answer, are ignored.
    """
    words: list[int] = []
    in_word = False
    for piece, slot in zip(pieces, slots, strict=True):
        for char in piece:
            if char.isspace():
                in_word = False
            elif in_word:
                words[-1] = slot
            else:
                words.append(slot)
                in_word = True
    return words


def average_lagging(delays: Sequence[int], source: int, target: float) -> float:
    """Average lagging in source units: how far a caption lags on average behind one at an even pace with the video.

    AL = 1/τ Σ_{t=1…τ} (g(t) - (t-1) / γ), with γ = target / source and τ the first t with g(t) = source, or the number
    of words if there is none: words after the end of the source are not counted (Ma et al. 2019, "STACL",
    arXiv 1810.08398, section 4). `delays` are g(1) … g(words), at least one, and `source` is the number of clips. If
    `target` is the number of written words, this is AL as defined there. If it is the larger of that and the number of
    words in the reference, this is LAAL, which does not reward captions that are too long (Papi et al. 2022, "Over-
    Generation Cannot Be Rewarded", arXiv 2206.05807). A caption that is written after the last clip has AL = `source`;
    wait-k with as many words as clips has AL = k; a negative value is ahead of the even pace.
    """
    last = next((t for t, delay in enumerate(delays, 1) if delay >= source), len(delays))
    return sum(delay - t * source / target for t, delay in enumerate(delays[:last])) / last


def check(row: Mapping) -> None:
    """Raise ValueError, with the reason, if a row does not say when its tokens were written."""
    where = f"the row of video {row['video_id']}"
    if missing := [name for name in FIELDS if name not in row]:
        raise ValueError(f"{where} has no {', '.join(missing)}: it was not written by eval.sh")
    tokens, slots, clips = (row[name] for name in FIELDS)
    if type(tokens) is not list or type(slots) is not list:
        raise ValueError(f"{where} has tokens or slots that are not lists")
    if any(type(number) is not int or not 0 <= number < 2**31 for number in (*tokens, *slots, clips)):
        raise ValueError(f"{where} has tokens, slots or clips that are not non-negative integers")
    if len(tokens) != len(slots) or not all(1 <= slot <= clips for slot in slots):
        raise ValueError(f"{where} does not have a slot from 1 to {clips} for each token")


def decode_pieces(row: Mapping, decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token of a row; joined, they are the whole text. A character that is written by several tokens
    is in the text of the last one. That of a token that ends a slot, where the model decides when to speak, is empty.
    Raises ValueError, with the reason, as `check` does and if `decode` does not return the row's text."""
    check(row)
    ends = row.get("end_of_slot")
    pieces: list[str] = []
    pending: list[int] = []  # tokens up to a character that is not complete, of whose text `shown` characters are
    text, shown, last = "", 0, 0
    for index, token in enumerate(row["tokens"]):
        if token == ends:
            pieces.append("")
            continue
        pending.append(token)
        text = decode(pending)
        complete = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(complete[shown:])
        shown, last = len(complete), index
        if complete == text:
            pending, shown = [], 0
    if pending:
        pieces[last] += text[shown:]
    if "".join(pieces).strip() != row["result"].strip():
        raise ValueError(
            f"the tokens of video {row['video_id']} do not decode to its text: another tokenizer wrote them"
        )
    return pieces


def slot_texts(row: Mapping, decode: Callable[[list[int]], str]) -> list[str]:
    """What each slot added to the text of a row; joined, they are the text without white space around it. Raises
    ValueError as `decode_pieces` does."""
    texts = [""] * row["clips"]
    for piece, slot in zip(decode_pieces(row, decode), row["slots"], strict=True):
        texts[slot - 1] += piece
    text = "".join(texts)
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    bounds = pairwise(accumulate(map(len, texts), initial=0))
    return [text[max(first, begin) : min(last, end)] for first, last in bounds]


def measure(row: Mapping, decode: Callable[[list[int]], str]) -> dict[str, float]:
    """The metrics of one row of a result file. `decode` returns the text of token ids, without special tokens.

    `words` is the number of words and `early_words` the number written before the last clip arrived; `AL` and `LAAL`
    are in clips (seconds) and absent for a caption without words. LAAL uses the longest reference. Raises ValueError
    as `decode_pieces` does.
    """
    pieces, slots, clips = decode_pieces(row, decode), row["slots"], row["clips"]
    delays = word_slots(pieces, slots)
    found = {"words": len(delays), "early_words": sum(delay < clips for delay in delays)}
    if delays:
        references = [row["annotation"]] if isinstance(row["annotation"], str) else row["annotation"]
        longest = max(len(delays), *(len(text.split()) for text in references))
        found["AL"] = average_lagging(delays, clips, len(delays))
        found["LAAL"] = average_lagging(delays, clips, longest)
    return found
