"""Versions of Python and of installed packages, recorded with results."""

import platform
from collections.abc import Iterable
from importlib import metadata

RUNNING = ("torch", "transformers", "qwen-vl-streaming")
"""Packages that generate the tokens."""


def versions(packages: Iterable[str] = RUNNING) -> dict[str, str | None]:
    """Returns the versions of Python and of `packages`. A package that is not installed, such as one imported from a
    folder, has None."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
