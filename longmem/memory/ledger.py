"""The book-keeping of the memory bank: which document owns which row, and in which order rows were written.

Nothing here touches keys or values (but the tails that wait for a full chunk), so every promise about rows and
documents can be read, and tested, in this file alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Keys and values of one memory layer; layers may differ in heads and widths, so sizes have no names (underscore).
Tail = tuple[Float[Tensor, "_kv_heads _waiting _key_dim"], Float[Tensor, "_kv_heads _waiting _value_dim"]]

# Numbers that no two states of any ledgers share, also when a bank is cleared and gets a new ledger.
_STAMPS = itertools.count()


@dataclass(frozen=True)
class DocumentInfo:
    """Return what a bank knows about one document; lengths and offsets in tokens of the document.

    `num_tokens`: written so far, also those since evicted. `num_chunks`: resident, so found by search.
    `num_waiting_tokens`: the tail that is shorter than a chunk and waits for more. `first_resident_token`: where the
    first resident chunk starts (where the next chunk will start, if none is resident).
    """

    document_id: str
    num_tokens: int
    num_chunks: int
    num_waiting_tokens: int
    first_resident_token: int


class IntQueue:
    """Return a queue of integers in one tensor; pushing and popping cost O(what is pushed or popped), amortised.

    >>> queue = IntQueue()
    >>> queue.push(torch.tensor([1, 2, 3])); queue.pop(2), queue.values
    (tensor([1, 2]), tensor([3]))
    """

    def __init__(self, values: Int[Tensor, " values"] | None = None) -> None:
        self._data = torch.empty(0, dtype=torch.int64) if values is None else values
        self._start, self._stop = 0, len(self._data)

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def values(self) -> Int[Tensor, " values"]:
        """Return a view of the values, oldest first; it is valid until the next push."""
        return self._data[self._start : self._stop]

    def push(self, values: Int[Tensor, " values"]) -> None:
        """Add values at the end."""
        if self._stop + len(values) > len(self._data):
            data = torch.empty(2 * (len(self) + len(values)), dtype=torch.int64)
            data[: len(self)] = self.values
            self._data, self._start, self._stop = data, 0, len(self)
        self._data[self._stop : self._stop + len(values)] = values
        self._stop += len(values)

    def pop(self, count: int) -> Int[Tensor, " count"]:
        """Return the oldest `count` values and drop them."""
        values = self.values[:count].clone()
        self._start += count
        return values


@dataclass(eq=False)
class Document:
    """Return the record of one document.

    `serial` is its number in the ledger, -1 before it is entered; it is never used again, so that a document that
    replaces another of the same name cannot inherit rows.
    """

    document_id: str
    serial: int = -1
    num_tokens: int = 0
    rows: IntQueue = field(default_factory=IntQueue)
    # Ids of the resident and the waiting tokens; None where the writer gave none.
    token_ids: IntQueue | None = None
    # For each memory layer the float32 keys and values of the tokens that wait; empty if none do.
    waiting: list[Tail] = field(default_factory=list)

    @property
    def num_waiting_tokens(self) -> int:
        """Return the length of the tail that is shorter than a chunk."""
        return self.waiting[0][0].shape[1] if self.waiting else 0

    def first_chunk(self, chunk_size: int) -> int:
        """Return the position in the document, in chunks, of its first resident chunk."""
        return (self.num_tokens - self.num_waiting_tokens) // chunk_size - len(self.rows)

    def push_token_ids(self, token_ids: Int[Tensor, " tokens"]) -> None:
        """Add the ids of new tokens."""
        if self.token_ids is None:
            self.token_ids = IntQueue()
        self.token_ids.push(token_ids)

    def info(self, chunk_size: int) -> DocumentInfo:
        """Return the public summary."""
        return DocumentInfo(
            document_id=self.document_id,
            num_tokens=self.num_tokens,
            num_chunks=len(self.rows),
            num_waiting_tokens=self.num_waiting_tokens,
            first_resident_token=self.first_chunk(chunk_size) * chunk_size,
        )


class Ledger:
    """Return an empty ledger; live rows are always `[0, num_rows)`, each owned by one chunk of one document."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.documents: dict[str, Document] = {}
        self.num_rows = 0
        # `version` changes with every change, so that a view knows when to look again; `generation` only when a row
        # that was live may hold something else, so that a reader knows whether rows found before are still good.
        self.version = self.generation = next(_STAMPS)
        self._by_serial: dict[int, Document] = {}
        self._next_serial = 0
        # Runs of chunks in the order of writing: [serial, number of chunks], oldest first.
        self._runs: deque[list[int]] = deque()
        # For each row the serial of its document and its position there, in chunks; never without a column, so that
        # row -1 can be looked up, too.
        self._table = torch.zeros(2, 1, dtype=torch.int64)

    def runs(self) -> list[tuple[str, int]]:
        """Return (document id, number of chunks) in the order of writing: what fifo eviction takes first."""
        return [(self._by_serial[serial].document_id, count) for serial, count in self._runs]

    def open(self, document: Document) -> None:
        """Enter a document; it stays until it is closed, or evicted to the last chunk with no tail waiting."""
        document.serial, self._next_serial = self._next_serial, self._next_serial + 1
        self.documents[document.document_id] = document
        self._by_serial[document.serial] = document

    def record(self, document: Document, rows: Int[Tensor, " chunks"]) -> None:
        """Enter the rows of the newest chunks of `document`, whose length and tail are already up to date."""
        self.version = next(_STAMPS)
        if not len(rows):
            return
        document.rows.push(rows)
        self.num_rows = max(self.num_rows, int(rows.max()) + 1)
        if self.num_rows > self._table.shape[1]:
            table = torch.empty(2, 2 * self.num_rows, dtype=torch.int64)
            table[:, : self._table.shape[1]] = self._table
            self._table = table
        stop = document.first_chunk(self.chunk_size) + len(document.rows)
        self._table[0, rows] = document.serial
        self._table[1, rows] = torch.arange(stop - len(rows), stop)
        if self._runs and self._runs[-1][0] == document.serial:
            self._runs[-1][1] += len(rows)
        else:
            self._runs.append([document.serial, len(rows)])

    def restore(self, documents: Iterable[Document], runs: Iterable[tuple[str, int]]) -> None:
        """Enter saved documents, whose `rows` are filled, and the order in which their chunks were written."""
        for document in documents:
            rows = document.rows.values
            document.rows = IntQueue()
            self.open(document)
            self.record(document, rows)
        self._runs = deque([self.documents[document_id].serial, count] for document_id, count in runs)

    def evict(self, num_chunks: int, keep: Document) -> Int[Tensor, " chunks"]:
        """Return the rows of the oldest `num_chunks` chunks, taken from their documents for the caller to overwrite.

        A document with nothing left is forgotten, except `keep`, which is about to get more.
        """
        if num_chunks:
            self.version = self.generation = next(_STAMPS)
        evicted = [torch.empty(0, dtype=torch.int64)]
        while num_chunks:
            run = self._runs[0]
            document, count = self._by_serial[run[0]], min(run[1], num_chunks)
            evicted.append(document.rows.pop(count))
            if document.token_ids is not None:
                document.token_ids.pop(count * self.chunk_size)
            if not len(document.rows) and not document.waiting and document is not keep:
                self._forget(document)
            run[1] -= count
            num_chunks -= count
            if not run[1]:
                self._runs.popleft()
        return torch.cat(evicted)

    def close(self, document: Document) -> tuple[Int[Tensor, " rows"], Int[Tensor, " moved"], Int[Tensor, " moved"]]:
        """Forget a document; return its rows, and the live rows to move (from, to) so that rows stay dense."""
        self.version = next(_STAMPS)
        if len(document.rows):
            self.generation = self.version
        dropped = document.rows.values.sort().values
        num_rows = self.num_rows - len(dropped)
        stays = torch.ones(len(dropped), dtype=torch.bool)
        stays[dropped[dropped >= num_rows] - num_rows] = False
        sources = torch.arange(num_rows, self.num_rows)[stays]
        destinations = dropped[dropped < num_rows]

        self._table[:, destinations] = self._table[:, sources]
        serials, positions = self._table[:, sources]
        for serial in serials.unique().tolist():
            owner, mine = self._by_serial[serial], serials == serial
            owner.rows.values[positions[mine] - owner.first_chunk(self.chunk_size)] = destinations[mine]
        self.num_rows = num_rows
        self._forget(document)
        self._runs = deque(run for run in self._runs if run[0] != document.serial)
        return dropped, sources, destinations

    def rename(self, old: str, new: str) -> None:
        """Give a document another id; its place in the order of documents stays."""
        self.version = next(_STAMPS)
        self.documents[old].document_id = new
        self.documents = {document.document_id: document for document in self.documents.values()}

    def rows_of(self, document_ids: Iterable[str]) -> Int[Tensor, " rows"]:
        """Return the live rows of these documents, sorted; ids without a document add none."""
        documents = (self.documents.get(document_id) for document_id in document_ids)
        rows = [document.rows.values for document in documents if document is not None]
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows]).sort().values

    def locate(self, rows: Int[Tensor, " rows"]) -> list[tuple[str, int, int] | None]:
        """Return (document id, first token, token after the last) for each row; None for row -1."""
        serials, positions = self._table[:, rows.clamp(min=0)].tolist()
        starts = (position * self.chunk_size for position in positions)
        return [
            (self._by_serial[serial].document_id, start, start + self.chunk_size) if row >= 0 else None
            for row, serial, start in zip(rows.tolist(), serials, starts, strict=True)
        ]

    def _forget(self, document: Document) -> None:
        del self.documents[document.document_id], self._by_serial[document.serial]
