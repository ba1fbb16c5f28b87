"""What a memory bank holds: ledger, storage and indexes, which change together here and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.encoder.history import Encoders
from longmem.memory.checks import refuse_search
from longmem.memory.eviction import EvictionPolicy, make_policy
from longmem.memory.index import ChunkIndex, Ranked, SavedIndex, TokenIndex, make_index
from longmem.memory.rows.documents import Document, IntQueue, LayerTokens, Run, Source, SourcePart
from longmem.memory.rows.ledger import Ledger
from longmem.memory.rows.segments import Joins
from longmem.memory.rows.storage import Chunks, LayerShape, MemoryStorage, Storage, bytes_of_chunk, cut_into_chunks

# Arguments of a table, beside its storage.
SETTINGS = (
    "eviction",
    "chunk_size",
    "capacity_tokens",
    "capacity_bytes",
    "index",
    "storage_dtype",
    "device",
    "by_token",
)
DEFAULT_CAPACITY = 65_536  # tokens that a bank can hold if nobody says how many: the paper's
# What stays when the text of a document is replaced.
SAID_OF_A_DOCUMENT = ("tags", "is_pinned", "dated", "valid_until", "is_superseded", "superseded_by")


class Journal(Protocol):
    """What makes changes of a table durable."""

    def transaction(self) -> contextlib.AbstractContextManager[None]: ...
    def refuse_reader(self) -> None: ...


class Table:
    """The rows of a bank: ledger, storage and indexes, which change together; layers are counted by position here.

    Arguments are those of the bank, which has checked them; without a `storage` rows are kept in memory. A write allocates all
    it needs before it changes anything. Who changes the table, or reads more than one thing of it, holds its `lock`.
    """

    def __init__(
        self,
        storage: Storage | None = None,
        *,
        eviction: str,
        chunk_size: int,
        capacity_tokens: int | None,
        capacity_bytes: int | None,
        index: str,
        storage_dtype: torch.dtype,
        device: torch.device,
        by_token: bool = False,
    ) -> None:
        if storage is None:
            storage = MemoryStorage(None if capacity_tokens is None else capacity_tokens // chunk_size)
        self.storage = storage
        self.lock = threading.RLock()  # a thread may take it again while it holds it
        self.chunk_size = chunk_size
        self.capacity_tokens, self.capacity_bytes = capacity_tokens, capacity_bytes
        self.index, self.eviction = index, eviction
        self.storage_dtype = storage_dtype
        self.device = device
        self.by_token = by_token
        self.ledger = Ledger(chunk_size, make_policy(eviction))
        # Whether anything goes by itself; then the policy is asked before every read and write.
        self._has_time = type(self.ledger.policy).expired is not EvictionPolicy.expired
        self._has_told = False  # that it forgets
        self.encoders = Encoders()
        self.journal: Journal | None = None  # of a bank on disk
        # Indexes that were needed so far, by the position of their layer; and how to find what is saved of one.
        self.indexes: dict[int, ChunkIndex] = {}
        self.find_saved: Callable[[int], SavedIndex | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickled table takes along: not the lock, which is another's."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def empty(self, storage: Storage | None = None) -> Table:
        """Return an empty table with the same settings, over a storage of its own."""
        return Table(storage, **{name: getattr(self, name) for name in SETTINGS})

    def become(self, other: Table) -> None:
        """Hold what another table holds, in place of what was there."""
        self.storage, self.ledger, self.encoders = other.storage, other.ledger, other.encoders
        self.indexes, self.find_saved, self.index = other.indexes, other.find_saved, other.index

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Make all changes inside the block durable together at its end or, if it raises, none; in memory, do nothing."""
        return contextlib.nullcontext() if self.journal is None else self.journal.transaction()

    def refuse_reader(self) -> None:
        if self.journal is not None:
            self.journal.refuse_reader()

    @property
    def shapes(self) -> list[LayerShape] | None:
        return self.storage.shapes or None

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @property
    def capacity(self) -> int | None:
        """Return how many chunks there is room for, None for no limit; bytes count once the sizes of heads are known."""
        limits = [] if self.capacity_tokens is None else [self.capacity_tokens // self.chunk_size]
        if self.capacity_bytes is not None and self.shapes is not None:
            limits.append(self.capacity_bytes // bytes_of_chunk(self.shapes, self.chunk_size, self.storage_dtype))
        return min(limits, default=None)

    # Writing.

    def extend(
        self,
        document: Document,
        keys: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        values: Sequence[Float[Tensor, "_kv_heads _tokens _dim"]],
        source: SourcePart | None,
        joins: Joins,
    ) -> None:
        """Write tokens to the end of a document, new or known, together with those of its last chunk that is not full."""
        tokens = [(key.detach(), value.detach()) for key, value in zip(keys, values, strict=True)]
        new_tokens, begun = tokens[0][0].shape[1], document.num_tokens % self.chunk_size
        if self.capacity_bytes is not None and self.shapes is None:  # how many chunks that is depends on their sizes
            self.storage.reserve(self._chunks_of(tokens, slice(0)), 0)
        skipped = self._chunks_without_room(document, -(-(begun + new_tokens) // self.chunk_size))
        if skipped or not begun:
            chunks = self._chunks_of(tokens, slice(max(0, skipped * self.chunk_size - begun), None))
        else:
            ends = self.storage.select(document.rows.values[-1:])
            ends = [Chunks(*(tensor.to(self.device) for tensor in layer)) for layer in ends]
            chunks = self._chunks_of(tokens, slice(None), [(end, begun) for end in ends])
        self._write_after(document, chunks, new_tokens, joins, source, skipped)

    def extend_with_chunks(self, document: Document, chunks: list[Chunks], source: SourcePart | None) -> None:
        """Write whole chunks, as they are stored, to the end of a document of whole chunks: a segment of this encoder."""
        assert not document.num_tokens % self.chunk_size
        num_chunks = chunks[0].keys.shape[1]
        skipped = self._chunks_without_room(document, num_chunks)
        chunks = [Chunks(*(tensor[:, skipped:].to(self.device) for tensor in layer)) for layer in chunks]
        self._write_after(document, chunks, num_chunks * self.chunk_size, "new", source, skipped)

    def replace(self, old: Document, draft: Table, new: Document) -> None:
        """Put a document of `draft`, whose chunks are as they are stored here, in place of `old`."""
        chunks = draft.storage.select(new.rows.values)
        room = None if self.capacity is None else self.capacity - self.ledger.num_pinned_rows
        if room is not None and len(new.rows) > room + len(old.rows) * old.is_pinned:
            raise self._too_full(new.document_id, len(new.rows))
        self._tell_if_it_forgets(len(new.rows) - len(old.rows))
        self._reserve(chunks, len(new.rows))
        self._remove(*self.ledger.close(old))
        # What was said of the document stays; the other fields are of the new text.
        said = {name: getattr(old, name) for name in SAID_OF_A_DOCUMENT}
        twin = dataclasses.replace(new, serial=-1, rows=IntQueue(), runs=deque(), **said)
        self._write(twin, chunks, torch.empty(0, dtype=torch.int64))

    def overwrite(self, document: Document, start: int, tokens: Sequence[LayerTokens]) -> None:
        """Put other keys and values in the place of those from token `start` on, in chunks all of whose tokens are given.

        Rows, order of eviction and source stay. On disk a run is written anew as a whole: its places are consecutive.
        """
        size, stop = self.chunk_size, start + tokens[0][0].shape[1]
        first = max(-(-start // size), document.first_chunk(size))
        stop -= stop % size if stop < document.num_tokens else 0
        if stop > first * size:
            self.overwrite_chunks(document, first, self._chunks_of(tokens, slice(first * size - start, stop - start)))

    def overwrite_chunks(self, document: Document, first: int, chunks: list[Chunks]) -> None:
        """Put other chunks in the place of a document's resident ones from the `first` on, counted in the document."""
        rows, done = document.rows.values, 0
        begin = first - document.first_chunk(self.chunk_size)
        end = begin + chunks[0].keys.shape[1]
        for run in document.runs:
            low, high = max(done, begin), min(done + run.num_chunks, end)
            if low < high:
                place = slice(low, high)
                part = [Chunks(*(each[:, low - begin : high - begin] for each in layer)) for layer in chunks]
                if run.slot >= 0 and high - low < run.num_chunks:
                    place = slice(done, done + run.num_chunks)
                    before = self.storage.select(rows[place])
                    for layer, fresh in zip(before, part, strict=True):
                        for old, new in zip(layer, fresh, strict=True):
                            old[:, low - done : high - done] = new.to(old.device)
                    part = before
                for index in self.indexes.values():
                    index.rows_dropped(rows[place])
                    index.note_reencoded(high - low)
                self.storage.drop(rows[place])
                run.slot = self.storage.write(rows[place], part)
                self._tell_indexes_of(rows[place])
            done += run.num_chunks

    def drop(self, document: Document) -> None:
        """Forget a document, also its name, and move the last live rows into the holes it leaves."""
        self._remove(*self.ledger.close(document))
        self.ledger.forget_names({document.document_id})

    def drop_expired(self) -> None:
        """Forget what has outlived the policy's time; most policies know none."""
        if self._has_time:
            with self.lock:
                if expired := self.ledger.expired():
                    self._remove(*self.ledger.release(expired))

    def copy_to(self, target: Table) -> None:
        """Write every document to the empty `target`, chunk by chunk as it is stored, in the order of writing."""
        target.encoders = self.encoders.copy()
        twins: dict[int, Document] = {}
        for document in self.ledger.documents.values():
            twin = dataclasses.replace(document, serial=-1, rows=IntQueue(), runs=deque(), source_or_reader=None)
            twin.segments = document.segments.copy()
            if document.source is not None:  # characters go on to be counted from the start of the document
                twin.source_or_reader = Source(document.source.has_text, document.source.first_char)
                twin.push_source(document.source.part(0, len(document.source.token_ids)))
            target.ledger.open(twin)
            twins[document.serial] = twin
        for run in self.ledger.runs.values():
            document, twin = run.document, twins[run.document.serial]
            done = len(twin.rows)
            chunks = self.storage.select(document.rows.values[done : done + run.num_chunks])
            chunks = [Chunks(*(tensor.to(target.device) for tensor in layer)) for layer in chunks]
            rows = target.ledger.num_rows + torch.arange(run.num_chunks)
            target.storage.reserve(chunks, target.ledger.num_rows + run.num_chunks)
            slot = target.storage.write(rows, chunks)
            target.ledger.enter_run(Run(twin, run.num_chunks, run.written_at, run.order, slot))
            target.ledger.place(twin, rows, document.first_chunk(self.chunk_size) + done)
            target._tell_indexes_of(rows)

    def put_ends(self, ends: Sequence[tuple[Document, Sequence[LayerTokens]]]) -> None:
        """Give rows to the ends of documents that were saved before these had any: fewer tokens than a chunk for each.

        They are in no file yet, so their documents count as changed. Where the bank gets too full, its policy chooses.
        """
        if not ends:
            return
        parts = zip(*(self._chunks_of(tokens, slice(None)) for _, tokens in ends), strict=True)
        layers = [Chunks(*(torch.cat(each, dim=1) for each in zip(*part, strict=True))) for part in parts]
        num_rows = self.ledger.num_rows
        slot = self.storage.write(num_rows + torch.arange(len(ends)), layers)
        for number, (document, _) in enumerate(ends):
            last = next(reversed(self.ledger.runs.values()), None)
            written_at = document.written_at if last is None else max(last.written_at, document.written_at)
            self.ledger.enter_run(Run(document, 1, written_at, self.ledger.next_order, slot + number))
            place = document.num_chunks(self.chunk_size) - 1
            self.ledger.place(document, torch.tensor([num_rows + number]), place)
        room = self.ledger.num_rows - self.ledger.num_pinned_rows
        excess = 0 if self.capacity is None else self.ledger.num_rows - self.capacity
        if excess > 0:
            self._remove(*self.ledger.release(self.ledger.choose(min(excess, room))))
        self.ledger.changed |= {document.serial for document, _ in ends}

    def use_index(self, index: str) -> None:
        """Search with indexes of another kind or with other settings; those that were built are let go."""
        self.index = index
        self.indexes.clear()
        self.ledger.note_change()

    # Reading.

    def search(
        self, position: int, queries: Tensor, num_chunks: int, rows: Tensor | None, bonus: Tensor | None = None
    ) -> Ranked:
        """Return scores and rows of the best chunks of one layer; only missing slots, if nothing was ever written."""
        shape = self.storage.shapes[position] if self.storage.shapes else None
        fits = queries.ndim == 3 and (shape is None or (queries.shape[0], queries.shape[2]) == shape[:2])
        if not fits or type(num_chunks) is not int or num_chunks < 1:
            refuse_search(queries, num_chunks, shape)
        if self.storage.shapes:
            return self.index_of(position).search(queries, num_chunks, rows, bonus)
        missing = torch.full((*queries.shape[:2], num_chunks), -1, device=queries.device)
        return torch.full_like(missing, -torch.inf, dtype=torch.float32), missing

    def index_of(self, position: int) -> ChunkIndex:
        """Return the index of one layer, made when it is first needed."""
        if position not in self.indexes:
            store = self.storage.layer(position)
            index = (
                make_index(self.index, store) if not self.by_token else TokenIndex(self.index, store, self.chunk_size)
            )
            saved = None if self.find_saved is None else self.find_saved(position)
            if saved is None or not index.adopt(saved):
                index.rows_written(torch.arange(self.ledger.num_rows))
            self.indexes[position] = index
        return self.indexes[position]

    def _chunks_of(
        self, tokens: Sequence[LayerTokens], part: slice, begun: Sequence[tuple[Chunks, int]] | None = None
    ) -> list[Chunks]:
        """Return some tokens of each layer as chunks, the first of which may have begun with others."""
        cut = ((key[:, part].to(self.device), value[:, part].to(self.device)) for key, value in tokens)
        ends = [None] * len(tokens) if begun is None else begun
        return [
            cut_into_chunks(*pair, self.chunk_size, self.storage_dtype, self.by_token, end)
            for pair, end in zip(cut, ends, strict=True)
        ]

    def _chunks_without_room(self, document: Document, num_chunks: int) -> int:
        """Return how many of so many new chunks can't be kept even if all that is not pinned is evicted.

        Raises ValueError where pinned documents leave no room at all, or a pinned one would lose a part of itself.
        """
        if self.capacity is None:
            return 0
        # What is appended takes over the row of a last chunk that is not full.
        is_begun = document.num_tokens % self.chunk_size > 0
        room = self.capacity - self.ledger.num_pinned_rows + (document.is_pinned and is_begun)
        self._tell_if_it_forgets(num_chunks - is_begun)
        if num_chunks <= room:
            return 0
        if document.is_pinned or room <= 0:
            raise self._too_full(document.document_id, num_chunks)
        warnings.warn(
            f"document {document.document_id!r}: {num_chunks} chunks were written at once to a bank with room for {room}, "
            f"so its first {(num_chunks - room) * self.chunk_size} tokens are dropped; raise `capacity_tokens` by "
            f"{(num_chunks - room) * self.chunk_size} to keep them.",
            stacklevel=5,
        )
        return num_chunks - room

    def _tell_if_it_forgets(self, num_new: int) -> None:
        """Warn, once, where a bank of whose capacity nobody has thought is about to let go of chunks for so many new ones."""
        is_full = self.capacity is not None and self.ledger.num_rows + num_new > self.capacity
        if is_full and self.capacity_tokens == DEFAULT_CAPACITY and not self._has_told:
            self._has_told = True
            warnings.warn(
                f"a bank with the default `capacity_tokens` of {DEFAULT_CAPACITY} is full, so from now on it forgets by "
                f"`eviction={self.eviction!r}`; give it a larger one, or None for no limit, to keep all.",
                stacklevel=6,
            )

    def _too_full(self, document_id: str, num_chunks: int) -> ValueError:
        assert self.capacity is not None
        return ValueError(
            f"the bank has room for {self.capacity * self.chunk_size} tokens, and "
            f"{self.ledger.num_pinned_rows * self.chunk_size} are pinned, so {num_chunks * self.chunk_size} for "
            f"{document_id!r} do not fit; unpin or delete documents, or make a bank with a larger `capacity_tokens` or "
            "`capacity_bytes`."
        )

    def _reserve(self, chunks: list[Chunks], num_new: int) -> None:
        num_rows = self.ledger.num_rows + num_new
        if self.capacity is not None:
            num_rows = max(self.ledger.num_rows, min(self.capacity, num_rows))
        self.storage.reserve(chunks, num_rows)

    def _write(self, document: Document, chunks: list[Chunks], taken: Int[Tensor, " rows"]) -> None:
        """Write chunks, at most as many as there is room for, into rows `taken` from the document, then into new ones.

        Where the bank is full these are the rows of chunks that the policy chooses.
        """
        num_rows, num_new = self.ledger.num_rows, chunks[0].keys.shape[1] - len(taken)
        if document.serial < 0:
            self.ledger.open(document)
        excess = 0 if self.capacity is None else min(num_new, max(0, num_rows + num_new - self.capacity))
        taken = torch.cat([taken, self.ledger.evict(excess, keep=document)])
        rows = torch.cat([taken, torch.arange(num_rows, num_rows + num_new - excess)])
        if len(taken):
            for index in self.indexes.values():
                index.rows_dropped(taken)
            self.storage.drop(taken)
        slot = self.storage.write(rows, chunks)
        self._tell_indexes_of(rows)
        self.ledger.record(document, rows, slot)

    def _write_after(
        self,
        document: Document,
        chunks: list[Chunks],
        num_tokens: int,
        joins: Joins,
        source: SourcePart | None,
        skipped: int,
    ) -> None:
        """Write the newest chunks behind what a document has, without `skipped` ones that there is no room for.

        `source`: of all `num_tokens` new tokens.
        """
        self._reserve(chunks, chunks[0].keys.shape[1])
        taken = self.ledger.take_end(document)
        document.num_tokens += num_tokens
        document.segments.push(num_tokens, joins, self.encoders.current)
        if source is not None:
            document.push_source(source)
        self._write(document, chunks, taken)
        if skipped:
            self.ledger.skip(document, skipped)

    def _tell_indexes_of(self, rows: Int[Tensor, " rows"]) -> None:
        for index in self.indexes.values():
            index.rows_written(rows)

    def _remove(
        self, dropped: Int[Tensor, " rows"], sources: Int[Tensor, " moved"], destinations: Int[Tensor, " moved"]
    ) -> None:
        for index in self.indexes.values():
            index.rows_dropped(dropped)
        self.storage.drop(dropped)
        self.storage.move(sources, destinations)
        self.storage.truncate(self.ledger.num_rows)
        for index in self.indexes.values():
            index.rows_moved(sources, destinations)
