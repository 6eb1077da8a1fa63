"""Types for torch.compile."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

CompileOptions = dict[str, str | int | bool | Callable[..., Any]]
"""The `options` of torch.compile."""

Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """Decorator: `torch.compiler.disable`, which does not declare that it keeps the type of the function."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
