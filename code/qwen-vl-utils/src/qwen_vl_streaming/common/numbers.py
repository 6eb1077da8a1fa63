"""Checks numbers: arguments of the library's public functions, and values in files and messages. Knows nothing of what
they are for.
"""

import math
from typing import Any, TypeGuard

from .errors import InputError

MOST = 10**9
"""The largest count that an argument may be, if nothing else is said: tensors of larger sizes cannot exist."""
LARGEST = 1e12
"""The largest number that an argument may be: with larger ones, positions and times overflow."""


def check_count(name: str, value: object, least: int = 1, most: int = MOST) -> None:
    """Raises InputError if the argument `name` is not an int from `least` to `most`. True and False are refused."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} {shown(value)} must be a whole number, an int")
    if not least <= value <= most:
        limit = f"at least {least}" if value < least else f"at most {most}"
        raise InputError(f"{name} {shown(value)} must be {limit}")


def check_number(name: str, value: object, above: float = 0.0) -> None:
    """Raises InputError if the argument `name` is not an int or float above `above` and at most LARGEST. True and False
    are refused."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name} {shown(value)} must be a number, an int or a float")
    if not above < value <= LARGEST:
        raise InputError(f"{name} {shown(value)} must be above {above:g} and at most {LARGEST:g}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite int or float. True, False, and ints that are too large for a float are not."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """The first characters of a value, on one line."""
    try:
        return " ".join(f"{value!r:.60}".split())
    except ValueError:  # an int with more digits than Python converts to a string
        return "with thousands of digits"
