"""What files and checkpoints are told by: their contents. Knows nothing of models."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..common.errors import InputError
from .hub import model_folder

WITH_THE_WEIGHTS = ("config.json", "*processor*.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template.*")
MOST_HEADER = 100_000_000  # bytes, as in safetensors itself
SAMPLE = 4096  # bytes of each tensor


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
        return f"{model} {model_folder(model, weights=False).name}"
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


def like_other_files(path: Path) -> None:
    """Give `path` the mode that a new file has here: what safetensors writes its owner alone may read."""
    other = path.with_name(f".{path.name}.mode")
    other.touch()
    path.chmod(other.stat().st_mode)
    other.unlink()


def tensor_types(path: Path) -> set[str]:
    """The types of the tensors in a safetensors file, by their names in there, such as BF16. Raises InputError."""
    with safe_reading(path), path.open("rb") as file:
        header = json.loads(_header(file))
        return {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}


def tensor_names(folder: Path) -> set[str] | None:
    """The names of all tensors in a checkpoint's safetensors files, or None where its weights are of another kind.
    Raises InputError."""
    paths, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not paths[0].is_file():
        if not index.is_file():
            return None
        with safe_reading(index):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            paths = sorted(folder / shard for shard in shards)
    names: set[str] = set()
    for path in paths:
        with safe_reading(path), path.open("rb") as file:
            names.update(json.loads(_header(file)))
    return names


@contextlib.contextmanager
def safe_reading(path: Path) -> Iterator[None]:
    """Raises InputError for what goes wrong while a safetensors file is read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} holds no weights that can be read ({error}): copy the checkpoint again") from error


def _header(file: BinaryIO) -> bytes:
    """Raises ValueError where it is longer than safetensors allows, or than the file."""
    size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER or len(header := file.read(size)) < size:
        raise ValueError(f"a header of {size} bytes")
    return header


def _tensors(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, then up to SAMPLE bytes of each tensor."""
    with safe_reading(path), path.open("rb") as file:
        header = _header(file)
        yield header
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                if not 0 <= begin <= end:
                    raise ValueError(f"{name!r:.80} from byte {begin} to {end}")
                file.seek(8 + len(header) + (begin + end) // 2)
                yield file.read(min(SAMPLE, end - begin))
