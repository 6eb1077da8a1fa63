"""What a result file is made from: data, checkpoint and schedule by their contents, settings by their values.

Knows nothing about rows and how they come to be.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from qwen_vl_streaming.errors import InputError
from results import write_whole
from settings import ROOT

ARGUMENTS = {name: str for name in ("model", "data", "schedule", "variant")}
"""What the arguments beside a result file name at least."""
NOT_COMPARED = ("versions",)
WITH_THE_WEIGHTS = ("config.json", "*processor*.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template.*")
SAMPLE = 4096  # bytes of each tensor


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
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): evaluate again with eval.sh") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object: evaluate again with eval.sh")
    return found


def find_model(model: str) -> str:
    """A checkpoint's folder, looked up here and in the project's root, or the hub id that it must else be."""
    return next((str(path) for path in (Path(model), ROOT / model) if os.path.isdir(path)), model)


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


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def of_checkpoint(model: str) -> str:
    """SHA-256 of a checkpoint in a folder, wherever it lies and whenever it was copied there: of its configuration,
    tokenizer and processor, of the names and shapes of its weights, and of some bytes out of the middle of each
    tensor, which any training of that tensor changes. Of a hub id, the commit that is used.

    Raises InputError for weights that cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        config = try_to_load_from_cache(model, "config.json")
        return f"{model} {Path(config).parent.name if isinstance(config, str) else ''}".rstrip()
    digest = hashlib.sha256()
    for pattern in WITH_THE_WEIGHTS:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        for piece in _tensors(path):
            digest.update(piece)
    for path in sorted(folder.glob("*.bin")):
        digest.update(path.name.encode() + of_file(path).encode())
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, then up to SAMPLE bytes of each tensor."""
    try:
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            yield header
            for name, tensor in json.loads(header).items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    file.seek(8 + len(header) + (begin + end) // 2)
                    yield file.read(min(SAMPLE, end - begin))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path} holds no weights that can be read ({error}): copy the checkpoint again") from error
