"""What systems are called, and how numbers are written for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What systems are called in tables and figures; "context-N" is named by `title_of_system`.
TITLES = {
    "backbone": "backbone, same window",
    "bm25": "backbone, passages by BM25",
    "hidden": "backbone, passages by hidden states",
    "off": "LongMem, memory off",
    "on": "LongMem, memory on",
    "wrong": "LongMem, wrong memory",
}


def title_of_system(name: str) -> str:
    """Return what a system is called in tables and figures.

    >>> title_of_system("context-8192")
    'backbone, window 8,192'
    """
    kind, _, size = name.partition("-")
    return f"backbone, window {int(size):,}" if kind == "context" else TITLES[name]


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table; numbers are aligned right.

    >>> print(markdown_table([["", "loss"], ["off", "2.5"]]))
    |  | loss |
    |---|---:|
    | off | 2.5 |
    """
    head, *body = rows
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in body)])


def as_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file for people and programs; what JSON does not know is written as text."""
    return json.dumps(content, indent=2, default=str) + "\n"
