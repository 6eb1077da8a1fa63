"""Streaming's own measures: how long after a clip's arrival words are written. Knows nothing about models, files and
other metrics.

The source are the clips of a video, one a second; the target are the words of a caption, what whitespace separates. A
word was written in the slot of its last token. In slot i, clips 1 … i have arrived; so g(t), the number of source units
that were there when target unit t was written, is the slot of word t.
"""

from collections.abc import Callable, Mapping, Sequence

FIELDS = ("tokens", "slots", "clips")


def word_slots(pieces: Sequence[str], slots: Sequence[int]) -> list[int]:
    """g(1) … g(words): the slot of each word, which is that of its last token.

    `pieces` (tokens) are the texts of the tokens, spaces included, and `slots` (tokens) their slots, from 1. Tokens
    without text, such as the end of the answer, count nowhere.
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
    """Average lagging in source units: how far, on average, a caption lags behind one that keeps pace with the video.

    AL = 1/τ Σ_{t=1…τ} (g(t) - (t-1) / γ), with γ = target / source and τ the first t with g(t) = source, or the number
    of words where there is none: words that are written when all is seen do not lag any more (Ma et al. 2019, "STACL",
    arXiv 1810.08398, section 4). `delays` are g(1) … g(words), at least one; `source` is the number of
    clips. With `target` the number of words written this is AL as defined there. With the larger of that and the number
    of words of the reference it is LAAL, which does not reward a caption for being too long (Papi et al. 2022, "Over-
    Generation Cannot Be Rewarded", arXiv 2206.05807). A caption that is written after the last clip has `source`;
    wait-k, with as many words as clips, has k; a negative value is ahead of an even pace.
    """
    last = next((t for t, delay in enumerate(delays, 1) if delay >= source), len(delays))
    return sum(delay - t * source / target for t, delay in enumerate(delays[:last])) / last


def check(row: Mapping) -> None:
    """Raise ValueError, with the reason, where a row of captions does not say when its caption was written."""
    if missing := [name for name in FIELDS if name not in row]:
        raise ValueError(f"the row of video {row['video_id']} has no {', '.join(missing)}: it was not made by eval.sh")
    tokens, slots, clips = (row[name] for name in FIELDS)
    if type(tokens) is not list or type(slots) is not list:
        raise ValueError(f"the row of video {row['video_id']} has no lists of tokens and slots")
    if any(type(number) is not int or not 0 <= number < 2**31 for number in (*tokens, *slots, clips)):
        raise ValueError(f"the row of video {row['video_id']} has tokens, slots or clips that are not such numbers")
    if len(tokens) != len(slots) or not all(1 <= slot <= clips for slot in slots):
        raise ValueError(f"the row of video {row['video_id']} does not have one of its {clips} slots for each token")


def measure(row: Mapping, decode: Callable[[list[int]], str]) -> dict[str, float]:
    """The measures of one row of a result file, with `decode` the text of token ids (special tokens have none).

    `words`, how many were written, and `early_words`, how many of them before the last clip arrived; `AL` and `LAAL`
    in clips, that is seconds, absent for a caption without a word. Of several references the longest counts. Raises
    ValueError, with the reason, where `check` does and where `decode` does not give the row's text.
    """
    check(row)
    tokens, slots, clips = (row[name] for name in FIELDS)
    if decode(tokens).strip() != row["result"].strip():
        raise ValueError(f"the tokens of video {row['video_id']} are not its text: another tokenizer has written them")
    delays = word_slots([decode([token]) for token in tokens], slots)
    found = {"words": len(delays), "early_words": sum(delay < clips for delay in delays)}
    if delays:
        references = [row["annotation"]] if isinstance(row["annotation"], str) else row["annotation"]
        longest = max(len(delays), *(len(text.split()) for text in references))
        found["AL"] = average_lagging(delays, clips, len(delays))
        found["LAAL"] = average_lagging(delays, clips, longest)
    return found
