"""demo.sh and test.sh check Python and the environment before they install anything."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "code/setup.sh"


def fake_python(path, *version, without=""):
    """A fake Python that reports this version, and has no module `without`; without a version it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f"import sys; sys.version_info = {version}; sys.modules['{without}'] = None"
    run = f'exec {sys.executable} -c "{start}\n$2"' if version else "exit 1"
    path.write_text(f"#!/bin/sh\n{run}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("requested", "existing", "message"),
    [
        ((3, 10), None, "/another/python is Python 3.10: install 3.11 or newer, or give another Python with PYTHON="),
        ((3, 9), (3, 12), "/another/python is Python 3.9: install 3.11 or newer"),
        ((), None, "/another/python does not run: install Python 3.11 or newer"),
        ("/no/python", None, "error: /no/python is missing: install Python 3.11 or newer, or give another"),
        (
            "ensurepip",
            None,
            "/another/python (Python 3.12) lacks venv: install it, on Debian and Ubuntu as python3.12-ve",
        ),
        (None, (3, 10), "is not a complete environment of Python 3.11 or newer: delete it"),
        ((3, 12), (), "is not a complete environment of Python 3.11 or newer: delete it"),
        ((3, 13), (3, 12), "has Python 3.12, "),
        ((3, 12), (3, 12), None),
        (None, (3, 12), None),
    ],
)
def test_unsuitable_pythons_are_refused_in_one_line(tmp_path, requested, existing, message):
    for name in ("requirements.txt", "code/qwen-vl-utils/pyproject.toml", "code/data/pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pins\n")
    setup = shutil.copy(SETUP, tmp_path / "code")
    if existing is not None:
        fake_python(tmp_path / ".venv/bin/python", *existing)
        (tmp_path / ".venv/installed").write_text("pins\npins\npins")
    named = requested or ""
    if isinstance(requested, tuple):
        named = fake_python(tmp_path / "another/python", *requested)
    elif requested == "ensurepip":
        named = fake_python(tmp_path / "another/python", 3, 12, without="ensurepip")
    command = ["bash", "-euc", '. "$0"; echo "$python"', setup]
    ended = subprocess.run(command, env={**os.environ, "PYTHON": named}, capture_output=True, text=True, check=False)
    if message is None:
        assert (ended.returncode, ended.stdout) == (0, f"{tmp_path}/.venv/bin/python\n"), ended.stderr
    else:
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 2 and not ended.stdout and line.startswith("error: ") and message in line


def test_the_pins_are_within_the_bounds_of_the_library():
    """pip installs versions that the library works with, also if it is installed alone."""
    root = SETUP.parents[1]
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / "requirements.txt").read_text(), re.MULTILINE))
    needed = tomllib.loads((root / "code/qwen-vl-utils/pyproject.toml").read_text())["project"]["dependencies"]
    for name in ("av", "transformers"):  # the library calls what other versions lack
        (bounds,) = (word for word in needed if word.startswith(name))
        versions = *re.fullmatch(rf"{name}>=([\d.]+),<([\d.]+)", bounds).groups(), pins[name]
        least, below, pin = ([*map(int, version.split("."))] for version in versions)
        assert least <= pin < below
