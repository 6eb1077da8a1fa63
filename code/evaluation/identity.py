"""What a result file is made from: the contents of data, checkpoint and schedule, and the values of the settings.

Knows nothing about rows and how they are made.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.files import read_object, write_file
from qwen_vl_streaming.model.trained import training_record

logger = logging.getLogger(__name__)

ARGUMENTS = {name: str for name in ("model", "data", "schedule", "variant")}
"""Fields that the arguments beside a result file always have."""
NOT_COMPARED = ("versions",)
AGAIN = "run eval.sh again"


def arguments_path(out: Path) -> Path:
    return out.with_suffix(".args.json")


def read_arguments(out: Path, fields: Mapping[str, type | tuple[type, ...]] = ARGUMENTS) -> dict:
    """The arguments beside the result file `out`, with at least `fields`. Raises InputError."""
    path = arguments_path(out)
    if not path.exists():
        raise InputError(f"{path}, the arguments of {out.name}, is missing: {AGAIN}")
    found = read_object(path, AGAIN)
    for name, kind in fields.items():
        if not isinstance(found.get(name), kind):
            raise InputError(f"{path} has no valid {name!r}: {AGAIN}")
    return found


def describe_model(model: str, data_sha256: str | None = None) -> str:
    """The checkpoint's name and, if sft.sh wrote it, what it was trained on. Warns if those are these data."""
    try:
        made = training_record(Path(model))
        trained, data = f"{model}, trained as {made['variant']} on {made['data']['path']}", made["data"]
    except (InputError, OSError, KeyError, TypeError):
        return model
    if data_sha256 is not None and data.get("sha256") == data_sha256:
        logger.warning("the checkpoint was trained on these data: its scores are those of training videos")
    return trained


def keep_arguments(out: Path, facts: dict, begun: bool) -> None:
    """Write the `facts` that `out` is made from beside it. If `out` was `begun` and so has rows, raises InputError
    where they were made from something else. A fact with a hash, `<name>_sha256`, is compared by the hash: its path may
    change."""
    path = arguments_path(out)
    if begun:
        check_unchanged(out, path, facts)
    write_file(path, json.dumps(facts, indent=2) + "\n")


def check_unchanged(out: Path, path: Path, facts: dict) -> None:
    """Raise InputError if the arguments at `path`, those of the result file `out`, differ from `facts`."""
    fix = "give another --output-dir, or delete it to start over"
    try:
        before = read_object(path, AGAIN)
    except InputError as error:
        raise InputError(f"{out} has rows, but their arguments, {path}, cannot be read: {fix}") from error
    for key, value in facts.items():
        if before.get(key) == value or f"{key}_sha256" in facts or key in NOT_COMPARED:
            continue
        what = key.removesuffix("_sha256")
        was = before.get(what)
        if what != key and was == facts[what]:
            raise InputError(f"{out} was started with other contents of the {what} {was!r}: {fix}")
        raise InputError(f"{out} was started with {what} {was!r}, not {facts[what]!r}: {fix}")
