"""Records by what they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def groups_of(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return records by the value that each has under `name`, in the order of their first appearance."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(str(record[name]), []).append(record)
    return found
