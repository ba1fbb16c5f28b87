"""The type checker behind pytest's --jaxtyping-packages option: beartype, for shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with checks of those annotations that give a shape.

    All others go: mypy reads them, and beartype refuses some that are sound (`Self`, a `Protocol`, a name that is
    imported for type checkers only) as well as the stand-ins that tests pass.
    """
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if gives_shape(hint)}
    return beartype(function) if function.__annotations__ else function


def gives_shape(hint: object) -> bool:
    """Return whether an annotation is, or contains, a shape such as `Float[Tensor, "lanes tokens"]`."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(gives_shape, get_args(hint)))
