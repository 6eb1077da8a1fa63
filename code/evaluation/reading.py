"""Reads JSON that other programs wrote, and names the place of what is wrong in it. Knows nothing about what it
means."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from json_lines import read_lines
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.numbers import is_number


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not JSON ({reason}): correct it, or download it again") from error


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields each object of a JSON Lines file, or of a JSON array, with its place, such as `a.jsonl, line 3`.

    Raises InputError, with the place, for anything else, and for a file without objects.
    """
    if path.is_file() and path.read_bytes().lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        records = [(f"{path}, entry {number}", value) for number, value in enumerate(read_json(path), 1)]
    else:
        records = [(f"{path}, line {number}", value) for number, value in read_lines(path, whole=True)[0]]
    if not records:
        raise InputError(f"{path} has no entries: give a file with some")
    for place, value in records:
        if not isinstance(value, dict):
            raise InputError(f"{place}: is not a JSON object: correct or delete it")
        yield place, value


def get_text(place: str, record: dict, name: str, optional: bool = False) -> str:
    """The string in a field, empty for an `optional` one that is absent or null. Raises InputError."""
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: {_show(record, name)}, not a string: correct or delete this entry")
    return value


def get_id(place: str, record: dict, name: str) -> str:
    """The identifier in a field, a string or an integer, as a string. Raises InputError."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{place}: {_show(record, name)}, not a string or an integer: correct or delete this entry")
    return str(value)


def get_seconds(place: str, value: Any, name: str) -> float:
    """A time of 0 or more. Raises InputError."""
    if not is_number(value) or value < 0:
        raise InputError(f"{place}: {name} is {str(value)[:40]!r}, not a time in seconds: correct or delete this entry")
    return float(value)


def _show(record: dict, name: str) -> str:
    return f"has the {name} {str(record[name])[:40]!r}" if name in record else f"has no {name}"
