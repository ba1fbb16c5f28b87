"""Which values of a parametrized test the default suite tries: the others are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast(count: int, values: Iterable[Any]) -> list[Any]:
    """Return values for `parametrize`; those after the first so many are slow. Tuples are the values of several names."""
    values = list(values)
    rest = (each if isinstance(each, tuple) else (each,) for each in values[count:])
    return [*values[:count], *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]
