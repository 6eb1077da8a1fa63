"""What a result file is made from: data, checkpoint and schedule by their contents, settings by their values.

Knows nothing about rows and how they come to be.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from results import write_whole

ARGUMENTS = {name: str for name in ("model", "data", "schedule", "variant")}
"""What the arguments beside a result file name at least."""
NOT_COMPARED = ("versions",)


def arguments_path(out: Path) -> Path:
    return out.with_suffix(".args.json")


def read_arguments(out: Path, fields: Mapping[str, type | tuple[type, ...]] = ARGUMENTS) -> dict:
    """What lies beside the result file `out` and says how it was made, with at least `fields`. Raises InputError."""
    path = arguments_path(out)
    if not path.exists():
        raise InputError(f"{path} is missing: it says how {out.name} was made; evaluate again with eval.sh")
    found = read_object(path)
    for name, kind in fields.items():
        if not isinstance(found.get(name), kind):
            raise InputError(f"{path} does not name the {name}: evaluate again with eval.sh")
    return found


def read_object(path: Path) -> dict:
    """The JSON object in a file of eval.sh's. Raises InputError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): evaluate again with eval.sh") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object: evaluate again with eval.sh")
    return found


def describe_model(model: str) -> str:
    """A checkpoint's name, and for a folder that sft.sh has left what it was trained on, as far as that is known."""
    try:
        made = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))
        return f"{model}, trained as {made['variant']} on {made['data']['path']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return model


def keep_arguments(out: Path, mine: dict, begun: bool) -> None:
    """Write beside `out` what it is made from. What has a hash beside it, `<name>_sha256`, is told by that: its path
    may change. Raises InputError where `out` was `begun`, so has rows, and they were made from something else."""
    path = arguments_path(out)
    if begun:
        refuse_another(out, path, mine)
    write_whole(path, json.dumps(mine, indent=2).encode() + b"\n")


def refuse_another(out: Path, path: Path, mine: dict) -> None:
    mend = "give another --output-dir, or delete it to start anew"
    try:
        before = read_object(path)
    except InputError as error:
        raise InputError(f"{out} has rows, but {path}, which says how it was made, cannot be read: {mend}") from error
    for key, value in mine.items():
        if before.get(key) == value or f"{key}_sha256" in mine or key in NOT_COMPARED:
            continue
        what = key.removesuffix("_sha256")
        was = before.get(what)
        if what != key and was == mine[what]:
            raise InputError(f"{out} was begun with other contents of the {what} {was!r}: {mend}")
        raise InputError(f"{out} was begun with {what} {was!r}, not {mine[what]!r}: {mend}")
