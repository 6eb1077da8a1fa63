"""Counting caption tokens, with the tokenizer alone: loading transformers would cost each worker seconds."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from qwen_vl_streaming.errors import InputError


def find_tokenizer(model_id: str, root: Path) -> Path:
    """The tokenizer.json of a folder, looked up from here and then from `root`, or of a model on the hub.

    Raises InputError where there is none.
    """
    for folder in (Path(model_id), root / model_id):
        if folder.is_dir():
            if (folder / "tokenizer.json").is_file():
                return folder / "tokenizer.json"
            raise InputError(f"tokenizer folder {folder} has no tokenizer.json: save it with save_pretrained")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    from .hub import HUB_ERRORS

    try:
        cached = try_to_load_from_cache(model_id, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        HfApi().model_info(model_id, timeout=20)  # without a network this says so at once; the download waits
        return Path(hf_hub_download(model_id, "tokenizer.json"))
    except HUB_ERRORS as error:
        reason = type(error).__name__
        raise InputError(
            f"tokenizer {model_id!r} is no folder here and cannot be fetched from the hub ({reason}): "
            "give --tokenizer-model-id a folder that holds tokenizer.json"
        ) from error


def fingerprint(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_counter(file: Path) -> Callable[[list[str]], list[int]]:
    """A function from captions to their numbers of tokens, special tokens left out. Raises InputError."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core; threads of threads only cost
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise InputError(f"tokenizer {file} cannot be loaded: fetch it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(captions: list[str]) -> list[int]:
        return [len(encoding) for encoding in tokenizer.encode_batch_fast(captions, add_special_tokens=False)]

    return count
