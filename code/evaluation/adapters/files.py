"""What the commands share: checks of the files that they write, and their words."""

from pathlib import Path

from qwen_vl_streaming.common.errors import InputError
from results import check_writable


def check_output(output: Path, *inputs: Path) -> None:
    """Raise InputError if `output` cannot be written or is one of `inputs`."""
    check_writable(output)
    for path in inputs:
        if output.exists() and output.samefile(path):
            raise InputError(f"--output {output} would overwrite what is read: give another name")


def count(number: int, what: str) -> str:
    """Such as 1 video or 2 videos."""
    return f"{number} {what}{'s' * (number != 1)}"
