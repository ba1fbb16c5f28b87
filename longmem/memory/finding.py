"""Passages of a memory that have to do with a text: what they are, and the search by words."""

import contextlib
import re
import sqlite3
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, Protocol

from longmem.memory.checks import got, validate_count
from longmem.memory.protocols import Memory
from longmem.memory.rows.documents import DocumentInfo

PASSAGE_TOKENS = 32  # a chunk of four tokens is too short to be read by people


class FoundPassage(NamedTuple):
    """Consecutive tokens of a document, from `start` to `stop`, their text, and how well they fit, largest best."""

    document_id: str
    start: int
    stop: int
    score: float
    text: str


class TextBank(Protocol):
    """What is asked of a bank for the text of its documents; as `MemoryBank` has them."""

    def info(self, document_id: str) -> DocumentInfo: ...

    def text(self, document_id: str, start: int | None = None, stop: int | None = None) -> str | None: ...

    def token_ids(self, document_id: str) -> Any: ...


class Findable(Protocol):
    """A memory whose documents can be told."""

    def parts(self) -> list[tuple[TextBank, list[str]]]:
        """Return the banks behind it, each with the names of its documents that a search can find."""
        ...


class FindableMemory(Memory, Findable, Protocol):
    """A memory that attention reads, and whose documents can be told."""

    @property
    def generation(self) -> Hashable:
        """Return what changes when rows found before may hold something else."""
        ...


class FindingModel(Protocol):
    """A model that says what it would read."""

    def find(self, memory: Any, text: str, k: int) -> list[FoundPassage]:
        """Return the passages that its heads read most for a text."""
        ...


def find(memory: Findable, text: str, model: FindingModel | None, k: int) -> list[FoundPassage]:
    """Return the passages of a memory that a model's heads read for a text or, without a model, those with its words."""
    return find_words(memory, text, k) if model is None else model.find(memory, text, k)


def span_around(token: int, num_tokens: int) -> tuple[int, int]:
    """Return the passage of a document that a token is in: documents are cut every `PASSAGE_TOKENS` tokens.

    >>> span_around(70, 80)
    (64, 80)
    """
    first = token - token % PASSAGE_TOKENS
    return first, max(min(first + PASSAGE_TOKENS, num_tokens), token + 1)


def find_words(memory: Findable, text: str, k: int = 10) -> list[FoundPassage]:
    """Return the `k` passages whose words fit a text best by BM25 (SQLite's full-text index), best first.

    Only documents that were memorized as text are searched; a passage has one of the words at least. Raises ValueError for a
    text without words, or `k` below 1.
    """
    words = re.findall(r"\w+", text) if isinstance(text, str) else []
    if not words:
        raise ValueError(f"`text` must have a word to look for, got {got(text)}.")
    validate_count("k", k)
    with sqlite3.connect(":memory:") as connection:
        connection.execute(
            "CREATE VIRTUAL TABLE passages USING fts5"
            "(words, text UNINDEXED, document UNINDEXED, start UNINDEXED, stop UNINDEXED)"
        )
        connection.executemany("INSERT INTO passages VALUES (?, ?, ?, ?, ?)", _passages(memory))
        asked = " OR ".join(f'"{word}"' for word in dict.fromkeys(words))
        rows = connection.execute(
            "SELECT document, start, stop, -bm25(passages), text FROM passages WHERE passages MATCH ? "
            "ORDER BY rank, rowid LIMIT ?",
            (asked, k),
        ).fetchall()
    connection.close()
    return [FoundPassage(*row) for row in rows]


def _passages(memory: Findable) -> Iterator[tuple[str, str, str, int, int]]:
    """Yield what is searched of each passage, all of its last word where that goes on in the next, then its text and place."""
    for bank, names in memory.parts():
        for name in names:
            with contextlib.suppress(ValueError):  # somebody has deleted it
                if bank.text(name, 0, 0) is None:
                    continue
                first, end = (info := bank.info(name)).first_resident_token, info.num_tokens
                places = [
                    (at, min(at + PASSAGE_TOKENS, end))
                    for at in range(first - first % PASSAGE_TOKENS, end, PASSAGE_TOKENS)
                ]
                texts = [bank.text(name, max(start, first), stop) or "" for start, stop in places]
                for text, after, place in zip(texts, [*texts[1:], ""], places, strict=True):
                    rest = re.match(r"\w*", after if re.search(r"\w$", text) else "")
                    yield text + (rest[0] if rest else ""), text, name, *place


def text_of(bank: TextBank | None, document_id: str, start: int, stop: int, decode: Callable[[Any], str]) -> str:
    """Return the text of a document's tokens: as given or, where ids alone were, decoded; empty without either, or document."""
    if bank is None:
        return ""
    try:
        first = bank.info(document_id).first_resident_token
        if (text := bank.text(document_id, max(start, first), stop)) is not None:
            return text
        ids = bank.token_ids(document_id)
    except ValueError:  # somebody has deleted it
        return ""
    return "" if ids is None else decode(ids[max(start - first, 0) : max(stop - first, 0)])
