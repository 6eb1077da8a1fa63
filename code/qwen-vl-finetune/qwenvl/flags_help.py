"""The output of `sft.sh --help`: all supported flags in groups, this program's own first."""

import dataclasses
import enum
import textwrap
from collections.abc import Iterable, Iterator

from transformers import HfArgumentParser, TrainingArguments

from .argument_checks import REFUSED

FIRST = ("max_steps", "seed", "deepspeed", "use_cpu", "optim", "eval_steps", "per_device_eval_batch_size")
"""The most used flags of transformers."""
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


class HelpfulParser(HfArgumentParser):
    """A parser of dataclasses, the last of which inherits from transformers' TrainingArguments."""

    def format_help(self) -> str:
        # A flag with a --no_ form has two actions; the first is the flag itself.
        shown = {action.dest: action for action in reversed(self._actions) if action.dest not in REFUSED}
        lines = [HEAD.format(description=self.description)]
        for title, names in self.groups():
            entries = [_entry(shown.pop(name)) for name in names if name in shown]
            lines += [f"{title}:", *entries, ""]
        return "\n".join(lines)

    def groups(self) -> Iterator[tuple[str, Iterable[str]]]:
        """Titles, each with the names of its flags."""
        model, data, training = self.dataclass_types
        own = [field.name for field in dataclasses.fields(training) if field.name in training.__annotations__]
        yield "model", [field.name for field in dataclasses.fields(model)]
        yield "data", [field.name for field in dataclasses.fields(data)]
        yield "recipe and output", own
        yield "run", FIRST
        yield "the other flags of transformers' TrainingArguments", [f.name for f in dataclasses.fields(training)]


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
