"""Documents and what is asked about them, whatever file they came from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.runs import spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A question about a document."""

    item_id: str
    """Unique in a file."""

    question: str

    answer: str
    """The right answer; of a multiple choice, one of the options."""

    options: tuple[str, ...] = ()
    """To choose from; none: the answer is written."""

    category: str = ""
    """Of questions that are reported by themselves."""

    trap: str = ""
    """A wrong answer that the document suggests, where the right one is that it does not tell."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A long text in the pieces in which it is fed, and the questions about it."""

    document_id: str
    passages: tuple[str, ...]
    items: tuple[Item, ...]


def choose_items(documents: Sequence[Document], limit: int | None) -> list[tuple[Document, list[Item]]]:
    """Return the documents with those of their questions that are asked: `limit` in all, evenly spread.

    Documents without a question are left out.
    """
    pairs = [(number, item) for number, document in enumerate(documents) for item in document.items]
    chosen: dict[int, list[Item]] = {}
    for place in spread(len(pairs), limit):
        number, item = pairs[place]
        chosen.setdefault(number, []).append(item)
    return [(documents[number], items) for number, items in chosen.items()]


def read_json_lines(path: Path) -> list[Any]:
    """Return what stands on the lines of a file.

    Raises:
        ValueError: it is missing, empty or not JSON.
    """
    try:
        return [json.loads(line) for line in read_file(path).split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"`data` must hold JSON on each line, {path} does not: {error}.") from error


def read_file(path: Path) -> str:
    """Return the text of a file that is not empty.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"`data` must be the file of the benchmark, got {str(path)!r}, which is none.")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"`data` must hold documents, {path} is empty.")
    return text
