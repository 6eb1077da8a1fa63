"""The files beside a model's weights, carried over as its makers wrote them. Knows nothing of models.

What transformers would write anew depends on its version, and older versions, and what is built on them, cannot read
it. The base's own files are read by all that read the base.
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
"""Names of the types of weights, in a safetensors file and in config.json."""


@dataclass(frozen=True)
class BaseFiles:
    """Config, generation config, processor and tokenizer of a checkpoint, by their names in its folder."""

    files: dict[str, bytes]

    @classmethod
    def of(cls, folder: str | Path) -> "BaseFiles":
        """Reads them from `folder`, so that it may change or go afterwards. Raises InputError where it cannot be
        read."""
        folder = Path(folder)
        try:
            paths = sorted(path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file())
            files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
            config = json.loads(files[CONFIG])
        except (OSError, ValueError, KeyError, RecursionError) as error:
            told = f"{type(error).__name__}: {error!s:.200}"
            raise InputError(f"{folder / CONFIG}, or a file beside it, cannot be read ({told})") from error
        if not isinstance(config, dict):
            raise InputError(f"{folder / CONFIG} holds no object: copy the checkpoint again")
        return cls(files)

    def write(self, folder: Path, added: dict) -> None:
        """Writes them beside the weights in `folder`, in place of what is there, with `added` in config.json.

        Where the weights have another type than config.json says, it says theirs: it is what they are loaded in. The
        weights get the mode of other new files.
        """
        (folder / GENERATION).unlink(missing_ok=True)  # transformers makes one up where the base has none
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        config = json.loads(self.files[CONFIG])
        types = {DTYPES.get(name) for path in folder.glob("model*.safetensors") for name in tensor_types(path)}
        if len(types) == 1 and None not in types:
            set_dtype(config, *types)
        text = json.dumps({**config, **added}, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        for path in folder.glob("*.safetensors"):
            like_other_files(path)


def set_dtype(config: dict, dtype: str) -> None:
    """Have a config.json, sub-configs included, name `dtype` wherever it names a type; at least at its top."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part, key in named:
        part[key] = dtype
    if not any(part is config for part, _ in named):
        config["torch_dtype"] = dtype
