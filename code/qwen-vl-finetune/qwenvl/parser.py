"""The parser of sft.sh's flags. `--help` lists all supported flags in groups, this program's own first."""

import dataclasses
import enum
import textwrap

from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.launch.signals import is_local_main_process
from transformers import HfArgumentParser, TrainingArguments

from .argument_checks import REFUSED
from .arguments import DataArguments, ModelArguments
from .training_arguments import SftArguments


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


GROUPS = {
    "model": _names(ModelArguments),
    "data": _names(DataArguments),
    "recipe and output": [name for name in _names(SftArguments) if name in SftArguments.__annotations__],
    "run": ["max_steps", "seed", "deepspeed", "use_cpu", "optim", "per_device_eval_batch_size"],
    "the other flags of transformers' TrainingArguments": _names(SftArguments),
}
"""Titles, each with the names of its flags. A flag is shown under the first title that has it."""
INDENT, COLUMN, WIDTH = 2, 34, 120
"""Columns of flags and their help, and the width of a line, in characters."""
HEAD = """\
usage: bash scripts/sft.sh [--FLAG VALUE ...]

{description}

--plan prints what the planner chooses for the GPUs of this machine and ends; --gpus 8xH100-80GB does so for others.
--no_plan plans and checks nothing: the flags that are not given have the defaults shown here, under ZeRO-3.

Boolean flags take True or False. Environment variables are in docs/training.md. Flags of transformers that are not
supported here are not shown.
"""


class FlagParser(HfArgumentParser):
    """Flags from the three dataclasses. Raises InputError for what cannot be parsed."""

    def __init__(self, description: str | None = None):
        groups = (ModelArguments, DataArguments, SftArguments)
        # sft.sh would not see abbreviated flags.
        super().__init__(groups, prog="sft.sh", description=description, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message} (see --help)")

    def _print_message(self, message, file=None):
        if is_local_main_process():
            super()._print_message(message, file)

    def format_help(self) -> str:
        # A flag with a --no_ form has two actions; the first is the flag itself.
        shown = {action.dest: action for action in reversed(self._actions) if action.dest not in REFUSED}
        lines = [HEAD.format(description=self.description)]
        for title, names in GROUPS.items():
            entries = [_entry(shown.pop(name)) for name in names if name in shown]
            lines += [f"{title}:", *entries, ""]
        return "\n".join(lines)


def _entry(action) -> str:
    """The lines of one flag: its name, its help and its default."""
    text, default = action.help, action.default
    if text is None:  # a field that only overrides the default
        known = {field.name: field.metadata.get("help") for field in dataclasses.fields(TrainingArguments)}
        text = known.get(action.dest) or ""
    text = " ".join((text % {**vars(action), "prog": "sft.sh"}).split())
    if isinstance(default, enum.Enum):
        default = default.value
    if default not in (None, "", []):
        text += f" (default: {' '.join(default) if isinstance(default, list) else default})"
    name = f"{' ' * INDENT}--{action.dest}"
    first = f"{name:<{COLUMN - 1}} " if len(name) < COLUMN else f"{name}\n{' ' * COLUMN}"
    return first + textwrap.fill(text, WIDTH - COLUMN).replace("\n", f"\n{' ' * COLUMN}")
