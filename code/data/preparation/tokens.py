"""Counts caption tokens. Uses `tokenizers` directly, because importing transformers takes each worker seconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.common.paths import places

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_CACHED_WORDS = 1 << 18
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regular expression in Qwen2.5's tokenizer.json."""


def find_tokenizer(model_id: str, root: Path) -> Path:
    """Return the tokenizer.json of a folder, looked up as in `places`, or of a model on the hub.

    Raises InputError if it is not found.
    """
    for folder in places(model_id, root):
        if folder.is_dir():
            if (folder / "tokenizer.json").is_file():
                return folder / "tokenizer.json"
            raise InputError(f"tokenizer folder {folder} has no tokenizer.json: save it with save_pretrained")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from qwen_vl_streaming.model.hub import HUB_ERRORS, ask

    try:
        cached = try_to_load_from_cache(model_id, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        ask(lambda: HfApi().model_info(model_id))  # fails fast without a network; the download would retry for long
        return Path(hf_hub_download(model_id, "tokenizer.json"))
    except HUB_ERRORS as error:
        reason = type(error).__name__
        raise InputError(
            f"tokenizer {model_id!r} is not a folder and cannot be downloaded from the hub ({reason}): "
            "give --tokenizer-model-id a folder with tokenizer.json"
        ) from error


def fingerprint(file: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_counter(file: Path) -> Callable[[list[str]], list[int]]:
    """Return a function from captions to their numbers of tokens.

    Counts as training does: no tokens are added, and text that looks like a special token is encoded as plain text.
    Raises InputError if the tokenizer cannot be loaded.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core; more threads only add overhead
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise InputError(f"tokenizer {file} cannot be loaded: download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # split_special_tokens of transformers, as in `answer_ids`

    def count(captions: list[str]) -> list[int]:
        return [len(encoding) for encoding in tokenizer.encode_batch_fast(captions, add_special_tokens=False)]

    return WordCounter(count, tokenizer) if splits_as_qwen(json.loads(tokenizer.to_str())) else count


def splits_as_qwen(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json pre-tokenizes text as Qwen2.5's does."""
    steps = (tokenizer["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
    return (
        steps[0].get("type") == "Split"
        and steps[0]["pattern"] == {"Regex": QWEN_SPLIT}
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and [(s["type"], s.get("add_prefix_space"), s.get("use_regex")) for s in steps[1:]]
        == [("ByteLevel", False, False)]
        and (tokenizer["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and tokenizer["model"]["type"] == "BPE"
        and not tokenizer["model"].get("dropout")
    )


class WordCounter:
    """Counts the tokens of captions word by word with a cache; eight times as fast as encoding whole captions.

    The counts are exact: Qwen's pre-tokenizer always splits before a single space between two words, and merges never
    cross a split. Captions with non-ASCII characters, with other whitespace, or with a character that begins an added
    token are encoded whole.
    """

    def __init__(self, count: Callable[[list[str]], list[int]], tokenizer: Tokenizer):
        self.count = count
        self.starts = {token.content[0] for token in tokenizer.get_added_tokens_decoder().values() if token.content}
        self.first: dict[str, int] = {}
        """Word at the start of a caption -> tokens."""
        self.later: dict[str, int] = {}
        """Word elsewhere -> tokens of the word and the space before it."""

    def __call__(self, captions: list[str]) -> list[int]:
        """The number of tokens in each of `captions`."""
        counts = [self._count_by_word(caption) for caption in captions]
        others = [index for index, count in enumerate(counts) if count is None]
        for index, count in zip(others, self.count([captions[index] for index in others]), strict=True):
            counts[index] = count
        return counts

    def _count_by_word(self, caption: str) -> int | None:
        """The number of tokens of a caption, or None if it must be encoded whole."""
        words = caption.split(" ")
        if not caption.isascii() or words != caption.split() or any(start in caption for start in self.starts):
            return None
        if len(self.later) > MAX_CACHED_WORDS:
            self.later.clear()
            self.first.clear()
        try:
            return self.first[words[0]] + sum(map(self.later.__getitem__, words[1:]))
        except KeyError:
            self._add_to_cache(self.first, words[:1], "")
            self._add_to_cache(self.later, words[1:], " ")
            return self.first[words[0]] + sum(map(self.later.__getitem__, words[1:]))

    def _add_to_cache(self, known: dict[str, int], words: list[str], before: str) -> None:
        new = [word for word in dict.fromkeys(words) if word not in known]
        known.update(zip(new, self.count([before + word for word in new]), strict=True))
