"""What a memory bank holds: ledger, storage and indexes, which change together here and nowhere else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from longmem.encoder.history import Encoders
from longmem.memory.checks import refuse_search
from longmem.memory.eviction import EvictionPolicy, make_policy
from longmem.memory.index import ChunkIndex, Ranked, SavedIndex, TokenIndex, make_index
from longmem.memory.rows.documents import Document, IntQueue, Run, Runs, Source, SourcePart, Tail
from longmem.memory.rows.ledger import Ledger
from longmem.memory.rows.segments import Joins
from longmem.memory.rows.storage import (
    Chunks,
    KeysValues,
    LayerRows,
    LayerShape,
    MemoryStorage,
    Storage,
    bytes_of_chunk,
    cut_into_chunks,
)

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
# What stays when the text of a document is replaced.
SAID_OF_A_DOCUMENT = ("tags", "is_pinned", "dated", "valid_until", "is_superseded", "superseded_by")


class Journal(Protocol):
    """What makes changes of a table durable."""

    def transaction(self) -> contextlib.AbstractContextManager[None]: ...
    def refuse_reader(self) -> None: ...


class Broken:
    """What stands in the place of something that can no longer be trusted."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __getattr__(self, name: str) -> Any:
        raise ValueError(self._message)


class Table:
    """The rows of a bank: ledger, storage and indexes, which change together; layers are counted by position here.

    Arguments are those of the bank, which has checked them; without a `storage` rows are kept in memory. A write allocates all
    it needs before it changes anything. Who reads more than one thing of the table holds its `lock`, and who changes it does so
    inside `change`; where it lives in a folder, one thread at a time has the `turn` to change it.
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
        # A thread may take them again while it holds them. The turn is taken first, or not waited for.
        self.lock, self.turn = threading.RLock(), threading.RLock()
        self._editions: weakref.WeakSet[Edition] = weakref.WeakSet()  # that somebody reads
        self.chunk_size = chunk_size
        self.capacity_tokens, self.capacity_bytes = capacity_tokens, capacity_bytes
        self.index, self.eviction = index, eviction
        self.storage_dtype = storage_dtype
        self.device = device
        self.by_token = by_token
        self.ledger = Ledger(chunk_size, make_policy(eviction))
        # Whether anything goes by itself; then the policy is asked before every read and write.
        self.forgets_by_itself = type(self.ledger.policy).expired is not EvictionPolicy.expired
        self.encoders = Encoders()
        self.journal: Journal | None = None  # of a bank on disk
        # Indexes that were needed so far, by the position of their layer; and how to find what is saved of one.
        self.indexes: dict[int, ChunkIndex] = {}
        self.find_saved: Callable[[int], SavedIndex | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickled table takes along: neither locks nor readers, which are another's."""
        return {name: value for name, value in self.__dict__.items() if name not in ("lock", "turn", "_editions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock(), turn=threading.RLock(), _editions=weakref.WeakSet())

    def empty(self, storage: Storage | None = None) -> Table:
        """Return an empty table with the same settings, over a storage of its own."""
        return Table(storage, **{name: getattr(self, name) for name in SETTINGS})

    def become(self, other: Table) -> None:
        """Hold what another table holds, in place of what was there; who reads that reads on."""
        with self.lock:
            if self._editions:
                before = copy.copy(self)
                before.lock = self.lock  # a reader may be waiting for it
                for edition in self._editions:
                    edition.table = before
                before._editions, self._editions = self._editions, weakref.WeakSet()
            self.storage, self.ledger, self.encoders = other.storage, other.ledger, other.encoders
            self.indexes, self.find_saved, self.index = other.indexes, other.find_saved, other.index

    def refuse(self, message: str) -> None:
        """Hold nothing that could be trusted: whatever is asked from now on raises ValueError with this message."""
        with self.lock:
            self.storage = self.ledger = Broken(message)  # type: ignore[assignment]
            self.indexes, self.find_saved = {}, None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the block durable together at its end or, if it raises, none; in memory, do nothing."""
        if self.journal is None:
            yield
            return
        with self.turn, self.journal.transaction():
            yield

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Change the table inside the block: for readers at one stroke, and durably at its end if it is no part of another."""
        # Whatever the caller's mode: what is made in inference mode can never be written to again.
        with self.transaction(), self.lock, torch.inference_mode(False):
            yield

    def refuse_reader(self) -> None:
        if self.journal is not None:
            self.journal.refuse_reader()

    @property
    def shapes(self) -> list[LayerShape] | None:
        return self.storage.shapes or None

    @property
    def nbytes(self) -> int:
        tails = (tensor for document in self.ledger.documents.values() for pair in document.waiting for tensor in pair)
        return self.storage.nbytes + sum(tensor.nbytes for tensor in tails)

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
        version: int,
    ) -> None:
        """Write tokens of an encoder version to the end of a document, new or known, with the tail that waited there."""
        tokens = [
            (key.detach().to(self.device), value.detach().to(self.device))
            for key, value in zip(keys, values, strict=True)
        ]
        new_tokens = tokens[0][0].shape[1]
        if document.waiting:
            tokens = [
                (torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1))
                for (old_key, old_value), (key, value) in zip(document.waiting, tokens, strict=True)
            ]
        num_chunks = tokens[0][0].shape[1] // self.chunk_size
        if self.capacity_bytes is not None and self.shapes is None:  # how many chunks that is depends on their sizes
            self.fix_sizes(tokens)
        skipped = self._chunks_without_room(document, num_chunks)
        start, stop = skipped * self.chunk_size, num_chunks * self.chunk_size
        chunks = self._chunks_of(tokens, slice(start, stop))
        # Tails stay in float32, so that a chunk is the same however its tokens arrive; `copy` lets go of the rest.
        tails = [
            (key[:, stop:].to(torch.float32, copy=True), value[:, stop:].to(torch.float32, copy=True))
            for key, value in tokens
        ]
        self._reserve(chunks)

        document.num_tokens += new_tokens
        document.segments.push(new_tokens, joins, version)
        document.waiting = tails if tails[0][0].shape[1] else []
        self._write_with_source(document, chunks, source, skipped)

    def fix_sizes(self, tokens: Sequence[Tail]) -> None:
        """Take over the sizes of heads from the keys and values of each layer, without writing any."""
        self.storage.reserve(self._chunks_of(tokens, slice(0)), 0)

    def extend_with_chunks(
        self, document: Document, chunks: list[Chunks], source: SourcePart | None, version: int
    ) -> None:
        """Write whole chunks, as they are stored, to the end of a document without a tail: a segment of an encoder version."""
        assert not document.waiting
        skipped = self._chunks_without_room(document, chunks[0].keys.shape[1])
        document.num_tokens += chunks[0].keys.shape[1] * self.chunk_size
        document.segments.push(chunks[0].keys.shape[1] * self.chunk_size, "new", version)
        chunks = [Chunks(*(tensor[:, skipped:].to(self.device) for tensor in layer)) for layer in chunks]
        self._reserve(chunks)
        self._write_with_source(document, chunks, source, skipped)

    def replace(self, old: Document, draft: Table, new: Document) -> None:
        """Put a document of `draft`, whose chunks are as they are stored here, in place of `old`."""
        chunks = draft.storage.select(new.rows.values)
        room = None if self.capacity is None else self.capacity - self.ledger.num_pinned_rows
        if room is not None and len(new.rows) > room + len(old.rows) * old.is_pinned:
            raise self._too_full(new.document_id, len(new.rows))
        self._reserve(chunks)
        self.drop(old)
        # What was said of the document stays; the other fields are of the new text.
        said = {name: getattr(old, name) for name in SAID_OF_A_DOCUMENT}
        twin = dataclasses.replace(new, serial=-1, rows=IntQueue(), runs=Runs(), **said)
        self._write(twin, chunks)

    def overwrite(self, document: Document, start: int, tokens: Sequence[Tail]) -> None:
        """Put other keys and values in the place of those from token `start` on: in chunks that they fill, and what waits.

        Rows, order of eviction and source stay. On disk a run is written anew as a whole: its places are consecutive.
        """
        stop = start + tokens[0][0].shape[1]
        whole = document.num_whole_chunks(self.chunk_size)
        resident = document.first_chunk(self.chunk_size)
        first, last = max(-(-start // self.chunk_size), resident), min(stop // self.chunk_size, whole)
        if last > first:
            cut = slice(first * self.chunk_size - start, last * self.chunk_size - start)
            self.overwrite_chunks(document, first, self._chunks_of(tokens, cut))
        if document.waiting and stop > whole * self.chunk_size:
            place = max(start - whole * self.chunk_size, 0)
            source = whole * self.chunk_size + place - start
            document.waiting = [
                tuple(
                    torch.cat([old[:, :place], new[:, source:].to(old)], dim=1)
                    for old, new in zip(pair, fresh, strict=True)
                )  # type: ignore[misc]
                for pair, fresh in zip(document.waiting, tokens, strict=True)
            ]

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
                self._keep(rows[place])
                for index in self.indexes.values():
                    index.rows_dropped(rows[place])
                    index.note_reencoded(high - low)
                self.storage.drop(rows[place])
                run.slot = self.storage.write(rows[place], part)
                self._tell_indexes_of(rows[place])
            done += run.num_chunks

    def drop(self, document: Document) -> None:
        """Forget a document, and move the last live rows into the holes it leaves."""
        self._remove(*self.ledger.close(document))

    def drop_expired(self) -> None:
        """Forget what has outlived the policy's time; most policies know none."""
        if self.forgets_by_itself:
            with self.lock:
                if expired := self.ledger.expired():
                    self._remove(*self.ledger.release(expired))

    def copy_to(self, target: Table) -> None:
        """Write every document to the empty `target`, chunk by chunk as it is stored, in the order of writing."""
        self.storage.recheck()
        if (tails := next((each.waiting for each in self.ledger.documents.values() if each.waiting), None)) is not None:
            # There may be no chunk that would; and where they are, chunks of a bank in memory will be.
            target.fix_sizes([(key.to(target.device), value.to(target.device)) for key, value in tails])
        target.encoders = self.encoders.copy()
        twins: dict[int, Document] = {}
        for document in self.ledger.documents.values():
            twin = dataclasses.replace(document, serial=-1, rows=IntQueue(), runs=Runs(), source_or_reader=None)
            twin.segments = document.segments.copy()
            twin.waiting = [(key.to(target.device), value.to(target.device)) for key, value in document.waiting]
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
            index = self.new_index(self.index, self.storage.layer(position))
            saved = None if self.find_saved is None else self.find_saved(position)
            if saved is None or not index.adopt(saved):
                index.rows_written(torch.arange(self.ledger.num_rows))
            self.indexes[position] = index
        return self.indexes[position]

    def new_index(self, index: str, store: LayerRows) -> ChunkIndex:
        """Return an index over the rows of one layer, which it is not told of yet."""
        return TokenIndex(index, store, self.chunk_size) if self.by_token else make_index(index, store)

    def edition(self) -> Edition:
        """Return the rows as they are now, to be read whatever becomes of the table; the caller holds the lock."""
        for edition in self._editions:
            if edition.generation == self.ledger.generation and edition.is_kept is None:
                edition.num_rows = self.ledger.num_rows
                return edition
        edition = Edition(self)
        self._editions.add(edition)
        return edition

    def _keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep rows that are about to be given up for those who still read them."""
        for edition in self._editions:
            edition.keep(rows)

    def _chunks_of(self, tokens: Sequence[Tail], part: slice) -> list[Chunks]:
        """Return some tokens of each layer as chunks; there are whole chunks of them."""
        cut = ((key[:, part].to(self.device), value[:, part].to(self.device)) for key, value in tokens)
        return [cut_into_chunks(*pair, self.chunk_size, self.storage_dtype, self.by_token) for pair in cut]

    def _chunks_without_room(self, document: Document, num_chunks: int) -> int:
        """Return how many of so many new chunks can't be kept even if all that is not pinned is evicted.

        Raises ValueError where pinned documents leave no room at all, or a pinned one would lose a part of itself.
        """
        if self.capacity is None:
            return 0
        room = self.capacity - self.ledger.num_pinned_rows
        if num_chunks <= room:
            return 0
        if document.is_pinned or not room:
            raise self._too_full(document.document_id, num_chunks)
        warnings.warn(
            f"document {document.document_id!r}: {num_chunks} chunks were written at once to a bank with room for {room}, "
            f"so its first {(num_chunks - room) * self.chunk_size} tokens are dropped; raise `capacity_tokens` by "
            f"{(num_chunks - room) * self.chunk_size} to keep them.",
            stacklevel=5,
        )
        return num_chunks - room

    def _too_full(self, document_id: str, num_chunks: int) -> ValueError:
        assert self.capacity is not None
        return ValueError(
            f"the bank has room for {self.capacity * self.chunk_size} tokens, and "
            f"{self.ledger.num_pinned_rows * self.chunk_size} are pinned, so {num_chunks * self.chunk_size} for "
            f"{document_id!r} do not fit; unpin or delete documents, or make a bank with a larger `capacity_tokens` or "
            "`capacity_bytes`."
        )

    def _reserve(self, chunks: list[Chunks]) -> None:
        num_rows = self.ledger.num_rows + chunks[0].keys.shape[1]
        self.storage.reserve(chunks, num_rows if self.capacity is None else min(self.capacity, num_rows))

    def _write(self, document: Document, chunks: list[Chunks]) -> None:
        """Write chunks, at most as many as there is room for, over those that the policy chooses where the bank is full."""
        num_rows, num_new = self.ledger.num_rows, chunks[0].keys.shape[1]
        if document.serial < 0:
            self.ledger.open(document)
        excess = 0 if self.capacity is None else max(0, num_rows + num_new - self.capacity)
        evicted = self.ledger.evict(excess, keep=document)
        rows = torch.cat([evicted, torch.arange(num_rows, num_rows + num_new - len(evicted))])
        if len(evicted):
            self._keep(evicted)
            for index in self.indexes.values():
                index.rows_dropped(evicted)
            self.storage.drop(evicted)
        slot = self.storage.write(rows, chunks) if num_new else -1
        self._tell_indexes_of(rows)
        self.ledger.record(document, rows, slot)

    def _write_with_source(
        self, document: Document, chunks: list[Chunks], source: SourcePart | None, skipped: int
    ) -> None:
        """Write the newest chunks, behind `skipped` ones that there is no room for, and the source of all of them."""
        if source is not None:
            document.push_source(source)
        self._write(document, chunks)
        if skipped:
            document.segments.drop(document.first_chunk(self.chunk_size) * self.chunk_size)
        if skipped and document.source is not None:
            document.source.drop(skipped * self.chunk_size)

    def _tell_indexes_of(self, rows: Int[Tensor, " rows"]) -> None:
        for index in self.indexes.values():
            index.rows_written(rows)

    def _remove(
        self, dropped: Int[Tensor, " rows"], sources: Int[Tensor, " moved"], destinations: Int[Tensor, " moved"]
    ) -> None:
        self._keep(torch.cat([dropped, sources]))
        for index in self.indexes.values():
            index.rows_dropped(dropped)
        self.storage.drop(dropped)
        self.storage.move(sources, destinations)
        self.storage.truncate(self.ledger.num_rows)
        for index in self.indexes.values():
            index.rows_moved(sources, destinations)


class Edition:
    """The rows of a table in one generation, for those who read them while the table goes on.

    Rows that the table has dropped, moved or overwritten since are kept here, as they were; the others are read where they
    are. So a reader alone costs nothing, and a writer beside readers pays for the rows that it gives up. Whoever asks holds the
    table's lock. `num_rows`: live rows at the latest moment of this generation at which somebody has begun to read.
    """

    def __init__(self, table: Table) -> None:
        self.table, self.generation, self.num_rows = table, table.ledger.generation, table.ledger.num_rows
        self._kept: list[tuple[Tensor, Storage]] = []  # rows, and what they held
        self.is_kept: Bool[Tensor, " rows"] | None = None  # which rows these are; None: none yet

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep rows that the table is about to give up."""
        if self.is_kept is None:
            self.is_kept = torch.zeros(self.num_rows, dtype=torch.bool)
        rows = rows[rows < self.num_rows]
        rows = rows[~self.is_kept[rows]].sort().values
        if len(rows):
            self.is_kept[rows] = True
            self._kept.append((rows, self.table.storage.keep(rows)))

    def is_there(self, rows: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Return for each row, -1 for none, whether the table still has it under this number."""
        return rows >= 0 if self.is_kept is None else (rows >= 0) & ~self.is_kept[rows.clamp(min=0)]

    def search(
        self,
        position: int,
        queries: Tensor,
        num_chunks: int,
        num_rows: int,
        rows: Int[Tensor, " some"] | None,
        bonus: Float[Tensor, " rows"] | None,
    ) -> Ranked:
        """Return scores and rows of the best chunks of one layer among its first `num_rows` rows, or some of these (sorted)."""
        live = self.table.ledger.num_rows
        if self.is_kept is None and live == num_rows:
            return self.table.search(position, queries, num_chunks, rows, bonus)
        rows = torch.arange(num_rows) if rows is None else rows
        bonus_of_live = None if bonus is None else functional.pad(bonus, (0, live - len(bonus)))
        found = [self.table.search(position, queries, num_chunks, rows[self.is_there(rows)], bonus_of_live)]
        for kept, storage in self._kept:
            wanted = torch.isin(kept, rows).nonzero().flatten()
            if len(wanted):
                index = self.table.new_index("exact", storage.layer(position))
                added = None if bonus is None else bonus[kept]
                scores, places = index.search(queries, num_chunks, wanted, added)
                own = kept.to(places.device)[places.clamp(min=0)]
                found.append((scores, torch.where(places < 0, -1, own)))
        if len(found) == 1:
            return found[0]
        scores, order = torch.cat([each for each, _ in found], dim=2).sort(dim=2, descending=True, stable=True)
        best = torch.cat([each for _, each in found], dim=2).gather(2, order[..., :num_chunks])
        return scores[..., :num_chunks], best

    def gather(self, position: int, rows: Int[Tensor, "kv_heads chunks"]) -> KeysValues:
        """Return copies of the keys and values of these rows; those of row -1 are any."""
        if self.is_kept is None:
            return self.table.storage.gather(position, rows)
        wanted = rows.detach().cpu()
        sources = [(self.is_there(wanted), wanted, self.table.storage)]
        for kept, storage in self._kept:
            places = torch.searchsorted(kept, wanted.contiguous()).clamp(max=len(kept) - 1)
            sources.append((kept[places] == wanted, places, storage))
        parts: list[tuple[Tensor, KeysValues]] = []
        for is_here, places, storage in sources:
            if is_here.any():  # what is elsewhere is read from some place that is here
                read = storage.gather(position, torch.where(is_here, places, places[is_here][0]).to(rows.device))
                parts.append((is_here, read))
        if not parts:  # nothing but missing rows
            storage = self._kept[0][1] if self._kept else self.table.storage
            return storage.gather(position, torch.zeros_like(rows))
        keys, values = parts[0][1]
        for is_here, part in parts[1:]:
            mask = is_here.to(keys.device)[..., None, None]
            keys, values = (torch.where(mask, new, old) for new, old in zip(part, (keys, values), strict=True))
        return keys, values
