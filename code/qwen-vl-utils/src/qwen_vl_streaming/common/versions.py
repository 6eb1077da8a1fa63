"""Versions of Python and of installed packages, for what a result is recorded with."""

import platform
from collections.abc import Iterable
from importlib import metadata

RUNNING = ("torch", "transformers", "qwen-vl-streaming")
"""What tokens are written by."""


def versions(packages: Iterable[str] = RUNNING) -> dict[str, str | None]:
    """Of Python and of `packages`; None for one that is not installed, such as a package that is read from a folder."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
