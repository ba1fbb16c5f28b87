"""The type checker behind pytest's --jaxtyping-packages option: beartype, for shapes alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
import torch
from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped


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


def has_shapes(target: Any) -> bool:
    """Return whether an annotation of a function, or of a dataclass, gives a shape; True where that can't be told."""
    function = target.__init__ if isinstance(target, type) else target
    if not hasattr(function, "__globals__"):
        return True
    return any(gives_shape(_evaluated(hint, function.__globals__)) for hint in function.__annotations__.values())


def _evaluated(hint: object, names: dict[str, Any]) -> object:
    try:
        return eval(hint, names) if isinstance(hint, str) else hint
    except Exception:  # a name for type checkers alone: jaxtyping checks nothing there, either
        return None


FIRST_CALLS, EVERY = 100, 10


def jaxtyped_where_shapes_are(*args: Any, **options: Any) -> Any:
    """Return what `jaxtyped` does, but as a decorator leave functions without shapes as they are.

    The option puts the decorator before every function, and it costs more than many of them. Of a function that is called often
    the first calls of a process are checked, and every tenth after them: an annotation that is wrong is wrong for most calls.
    """
    decorate = jaxtyped(*args, **options)

    def checked(target: Any) -> Any:
        if not has_shapes(target):
            return target
        checks = decorate(target)
        return checks if isinstance(target, type) else at_times(checks, target)

    return decorate if args else checked


def at_times(checks: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which in its first calls and in every tenth later one is `checks`."""
    numbers = itertools.count()

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or (number := next(numbers)) < FIRST_CALLS or not number % EVERY:
            return checks(*args, **options)
        return function(*args, **options)

    return call


# What the option writes before functions is `jaxtyping.jaxtyped`; it asks for this module at the first of them.
jaxtyping.jaxtyped = jaxtyped_where_shapes_are  # type: ignore[assignment]
