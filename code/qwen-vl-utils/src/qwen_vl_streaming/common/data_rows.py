"""The rows of a data set, JSON Lines: the one reader, so that what one program takes, all take.

Knows nothing about what a program needs of a row beyond its four fields.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

SURROGATE = re.compile("[\ud800-\udfff]")
"""In a text from JSON: one half without the other."""
TEXTS = ("video_path", "human_caption")
FIX = "correct or delete this line"


def read_data_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of its line and each row of a JSONL: a JSON object with a `video_id` that no other row has, a
    text as `video_path` and `human_caption`, and a text with a word as `question`, where it has one.

    UTF-8, with or without a byte order mark; lines end with a newline or with a carriage return and a newline; blank
    lines are passed over. Raises InputError, naming the line, for anything else.
    """
    line_of: dict[str, int] = {}
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not (line := line.removeprefix(codecs.BOM_UTF8)).strip():
                    continue
                try:
                    row = _read_row(line)
                except InputError as error:
                    raise InputError(f"{path}, line {number}: {error}") from error
                video_id = str(row["video_id"])
                if (other := line_of.setdefault(video_id, number)) != number:
                    raise InputError(
                        f"{path}, lines {other} and {number} both have the video_id {video_id}, and no video comes "
                        "twice: rename or delete one"
                    )
                yield number, row
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a JSONL with the rows of videos") from error


def check_characters(row: dict[str, Any], *fields: str) -> None:
    """Raise InputError where one of `fields` holds half of a surrogate pair, which no file name or tokenizer takes."""
    for name in fields:
        if SURROGATE.search(str(row.get(name))):
            raise InputError(f"{name} holds half of a surrogate pair, which is not a character: {FIX}")


def _read_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"cannot be read as UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except RecursionError as error:
        raise InputError(f"is nested too deeply: {FIX}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON ({error.msg} at character {error.pos + 1}): {FIX}") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise InputError(f"holds a number that is too long: {FIX}") from error
    if not isinstance(row, dict):
        raise InputError(f"is not a row (a JSON object): {FIX}")
    for name in ("video_id", *TEXTS):
        if name not in row:
            raise InputError(f"has no {name}: {FIX}")
    video_id, question = row["video_id"], row.get("question")
    if isinstance(video_id, bool) or not isinstance(video_id, str | int) or video_id == "":
        raise InputError(f"has {_show(video_id)} as its video_id, which is not a name: {FIX}")
    for name in TEXTS:
        if not isinstance(row[name], str):
            raise InputError(f"has no text as its {name}, but {_show(row[name])}: {FIX}")
    if question is not None and not (isinstance(question, str) and question.strip()):
        raise InputError(f"has no question, but {_show(question)}: give it one, or delete the field")
    check_characters(row, "video_id", "video_path", "question")
    return row


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
