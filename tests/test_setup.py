"""What demo.sh and test.sh find of Pythons and environments before they install anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "code/setup.sh"


def stand_in(path, *version):
    """A Python that says that it is of this version; one of none cannot run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = f'exec {sys.executable} -c "import sys; sys.version_info = {version}\n$2"' if version else "exit 1"
    path.write_text(f"#!/bin/sh\n{run}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("asked", "made", "says"),
    [
        ((3, 10), None, "older than 3.11"),
        ((3, 10), (3, 12), "older than 3.11"),
        ((), None, "is missing"),
        (None, (3, 10), "is no whole environment of Python 3.11 or newer: delete it"),
        ((3, 12), (), "is no whole environment of Python 3.11 or newer: delete it"),
        ((3, 13), (3, 12), "is of Python 3.12, "),
        ((3, 12), (3, 12), None),
        (None, (3, 12), None),
    ],
)
def test_what_will_not_do_is_refused_in_one_line(tmp_path, asked, made, says):
    for name in ("requirements.txt", "code/qwen-vl-utils/pyproject.toml", "code/data/pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pins\n")
    setup = shutil.copy(SETUP, tmp_path / "code")
    if made is not None:
        stand_in(tmp_path / ".venv/bin/python", *made)
        (tmp_path / ".venv/installed").write_text("pins\npins\npins")
    named = "" if asked is None else stand_in(tmp_path / "another/python", *asked)
    command = ["bash", "-euc", '. "$0"; echo "$python"', setup]
    ended = subprocess.run(command, env={**os.environ, "PYTHON": named}, capture_output=True, text=True, check=False)
    if says is None:
        assert (ended.returncode, ended.stdout) == (0, f"{tmp_path}/.venv/bin/python\n"), ended.stderr
    else:
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 2 and not ended.stdout and line.startswith("error: ") and says in line
