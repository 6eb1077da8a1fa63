"""The judge's answers: reads one, and keeps all of them in a file. Knows nothing about requests."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from json_lines import appending, read_lines
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.redact import redacted, shown

SEARCHED = 20_000
"""Characters at the end of an answer that are searched for a verdict."""
LONGEST_REASON = 2000
"""Characters of a verdict's reason that are kept."""
SCORES = (1, 2, 3, 4, 5)
"""The scores of fluency."""
OPENS = re.compile(r"[\[{]")


@dataclass(frozen=True)
class Verdict:
    """The judge's grade for one caption, or the reason why there is none."""

    score: int | str | None
    """1 to 5, or another question's answer; None if the caption could not be judged."""
    why: str


def read_verdict(content: object) -> Verdict:
    """The verdict in an answer: its last JSON object with `score` and `why`. Reasoning and code fences around it are
    ignored.

    Raises ValueError if there is none with an integer `score` from 1 to 5 and a string `why`.
    """
    text = str(content).rpartition("</think>")[2][-SEARCHED:]
    decoder, found, at = json.JSONDecoder(strict=False), None, 0
    while begin := OPENS.search(text, at):
        try:
            value, at = decoder.raw_decode(text, begin.start())
        except ValueError:
            at = begin.end()  # a bracket in a sentence
        except RecursionError:
            break
        else:
            found = value if isinstance(value, dict) and value.keys() >= {"score", "why"} else found
    if found is None:
        raise ValueError(f"not with the requested JSON: {short(content)[:60]!r}")
    score, why = found["score"], found["why"]
    if isinstance(score, str) and re.fullmatch(r"\s*[1-5](\.0)?\s*", score):
        score = float(score)
    return checked(score, why)


def checked(score: object, why: object, scores: tuple = SCORES) -> Verdict:
    """A verdict with one of `scores` and a string `why`. Raises ValueError for anything else."""
    if isinstance(score, bool) or score not in scores or not isinstance(why, str):
        raise ValueError(f"with a score of {short(score)[:20]!r}, not {scores[0]} to {scores[-1]}, or without a reason")
    return Verdict(scores[scores.index(score)], redacted(why[:LONGEST_REASON]))


def short(message: object) -> str:
    """The beginning of a `message` from elsewhere, as it may be printed."""
    return shown(" ".join(str(message)[:SEARCHED].split())[:2000])[:200]


@contextmanager
def open_cache(path: Path, scores: tuple = SCORES) -> Iterator[tuple[dict[str, Verdict], Callable[[Mapping], None]]]:
    """The verdicts, each with one of `scores`, in a JSON Lines file by key, and a function that appends one and waits
    until it is on disk.

    An incomplete last line, left by a killed run, is dropped. Raises InputError for any other invalid line.
    """
    known: dict[str, Verdict] = {}
    lines, size = read_lines(path)
    for number, row in lines:
        try:
            if not isinstance(row["key"], str):
                raise TypeError
            known[row["key"]] = checked(row["score"], row["why"], scores)
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not an answer of the judge: delete this line") from error
    with appending(path, size) as keep:
        yield known, keep
