"""Copies the files next to a model's weights from the base checkpoint, unchanged except for config.json, which gets
additional keys and the data type of the weights. Independent of the model code.

transformers writes these files in a format that depends on its version, and older versions and tools built on them may
not read it. Any program that loads the base checkpoint can read the copies.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import InputError
from .checkpoint import like_other_files, tensor_types

CONFIG, GENERATION = "config.json", "generation_config.json"
PATTERNS = (
    CONFIG,
    GENERATION,
    "*processor_config.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Maps data type names in safetensors files to those in config.json."""


@dataclass(frozen=True)
class BaseFiles:
    """Config, generation config, processor and tokenizer files of a checkpoint, by their paths in its folder."""

    files: dict[str, bytes]

    @classmethod
    def of(cls, folder: str | Path) -> "BaseFiles":
        """Reads the files in `folder` into memory, so that the folder may be changed or deleted afterwards.

        Raises InputError if they cannot be read.
        """
        folder = Path(folder)
        try:
            paths = sorted(path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file())
            files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
            config = json.loads(files[CONFIG])
        except (OSError, ValueError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error!s:.200}"
            raise InputError(
                f"{folder / CONFIG}, or a file beside it, cannot be read ({reason}): copy the checkpoint again"
            ) from error
        if not isinstance(config, dict):
            raise InputError(f"{folder / CONFIG} is not a JSON object: copy the checkpoint again")
        return cls(files)

    def write(self, folder: Path, added: dict) -> None:
        """Writes the files next to the weights in `folder`, over existing ones, and adds the keys `added` to
        config.json.

        If all weights have one data type, config.json is set to it, because it determines the data type they are loaded
        in. The weight files get the permissions of newly created files.
        """
        (folder / GENERATION).unlink(missing_ok=True)  # transformers writes one even if the base has none
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        config = json.loads(self.files[CONFIG])
        types = {DTYPES.get(name) for path in folder.glob("model*.safetensors") for name in tensor_types(path)}
        dtype = types.pop() if len(types) == 1 else None
        if dtype is not None:
            set_dtype(config, dtype)
        text = json.dumps({**config, **added}, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        for path in folder.glob("*.safetensors"):
            like_other_files(path)


def set_dtype(config: dict, dtype: str) -> None:
    """Sets the data type to `dtype` wherever a config.json or its sub-configs have one, and always at the top level."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in named:
        part[key] = dtype
    if not any(part is config for part, _ in named):
        config["torch_dtype"] = dtype
