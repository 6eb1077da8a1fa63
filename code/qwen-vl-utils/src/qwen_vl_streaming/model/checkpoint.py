"""Hashes files and checkpoints, and reads the headers of safetensors files. Independent of the model code."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..common.errors import InputError
from .hub import model_folder

WITH_THE_WEIGHTS = ("config.json", "*processor*.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template.*")
MOST_HEADER = 100_000_000  # maximum size of a header in bytes, the same as in safetensors
SAMPLE = 4096  # bytes of each tensor that are hashed


def of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def of_checkpoint(model: str) -> str:
    """Returns an identifier of a checkpoint: a SHA-256 of its contents for a folder, or the id and commit for an id
    on the Hub.

    The hash does not depend on where the folder is or when it was copied. It covers the config, tokenizer and processor
    files and the headers of safetensors files, with the names and shapes of the weights. Of each tensor it covers up to
    SAMPLE bytes from the middle, because training a tensor changes them. Files named *.bin are hashed whole.

    Raises InputError if the weights cannot be read.
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
    """Gives `path` the permissions of a new file in its folder. safetensors makes files readable only by the owner."""
    other = path.with_name(f".{path.name}.mode")
    other.touch()
    path.chmod(other.stat().st_mode)
    other.unlink()


def tensor_types(path: Path) -> set[str]:
    """Returns the data types of the tensors in a safetensors file, as named there, such as BF16.

    Raises InputError if the file cannot be read.
    """
    with safe_reading(path), path.open("rb") as file:
        return set(_dtypes(file).values())


def tensor_dtypes(folder: Path) -> dict[str, str] | None:
    """Returns the data types of all tensors in a checkpoint's safetensors files by their names, or None if it has no
    such files.

    Raises InputError if a file cannot be read.
    """
    paths, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not paths[0].is_file():
        if not index.is_file():
            return None
        with safe_reading(index):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            paths = sorted(folder / shard for shard in shards)
    dtypes: dict[str, str] = {}
    for path in paths:
        with safe_reading(path), path.open("rb") as file:
            dtypes |= _dtypes(file)
    return dtypes


@contextlib.contextmanager
def safe_reading(path: Path) -> Iterator[None]:
    """Converts errors while a safetensors file is read to InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"the weights in {path} cannot be read ({error}): copy the checkpoint again") from error


def _header(file: BinaryIO) -> bytes:
    """Reads the header. Raises ValueError if its size exceeds MOST_HEADER or the size of the file."""
    size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER or len(header := file.read(size)) < size:
        raise ValueError(f"a header of {size} bytes")
    return header


def _dtypes(file: BinaryIO) -> dict[str, str]:
    header = json.loads(_header(file))
    return {name: str(tensor["dtype"]) for name, tensor in header.items() if name != "__metadata__"}


def _tensors(path: Path) -> Iterator[bytes]:
    """Yields the header of a safetensors file, then up to SAMPLE bytes from the middle of each tensor."""
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
