"""Nested mappings, such as configurations, as flat ones."""

from collections.abc import Iterator
from typing import Any


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for everything in nested dictionaries; an empty one is a value.

    >>> dict(leaves({"data": {"lanes": 4, "window": 512}, "seed": 0}))
    {'data.lanes': 4, 'data.window': 512, 'seed': 0}
    """
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from leaves(value, f"{name}.{key}" if name else key)
    else:
        yield name, content
