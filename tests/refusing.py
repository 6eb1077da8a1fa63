"""Programs that refuse their input."""

from collections.abc import Callable

import pytest


def refused(program: Callable, capsys, *arguments) -> str:
    """Call a program; returns the single error line with which it exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        program(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]
