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
from longmem.memory.checks import MOST_CHUNKS, refuse_search
from longmem.memory.eviction import EvictionPolicy, make_policy
from longmem.memory.index import ChunkIndex, Ranked, SavedIndex, TokenIndex, make_index
from longmem.memory.rows.documents import Document, IntQueue, LayerTokens, Run, Source, SourcePart
from longmem.memory.rows.ledger import Chosen, Ledger
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
    default_budget,
)

# Arguments of a table, beside its storage.
SETTINGS = (
    "chunk_size",
    "capacity_tokens",
    "capacity_bytes",
    "by_token",
    "index",
    "eviction",
    "storage_dtype",
    "device",
)
# What it holds, of one state.
HELD = ("storage", "ledger", "encoders", "indexes", "find_saved", "index")
TURN_SECONDS = 120.0  # that a thread waits for another that changes the bank
DEFAULT_CAPACITY = 65_536  # tokens that a bank can hold if nobody says how many: the paper's
# What stays when the text of a document is replaced.
SAID_OF_A_DOCUMENT = ("tags", "is_pinned", "dated", "valid_until", "is_superseded", "superseded_by")


class Journal(Protocol):
    """What makes changes of a table durable."""

    def transaction(self) -> contextlib.AbstractContextManager[None]: ...
    def refuse_reader(self) -> None: ...
    def undo(self) -> None: ...  # what was changed since the last commit, now or when the transaction ends


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
        self._begin()
        self.chunk_size = chunk_size
        self.capacity_tokens, self.capacity_bytes = capacity_tokens, capacity_bytes
        self.index, self.eviction = index, eviction
        self.storage_dtype = storage_dtype
        self.device = device
        self.device_budget = default_budget(device)
        self.storage.place(device, self.device_budget)
        self.by_token = by_token
        self.ledger = Ledger(chunk_size, make_policy(eviction))
        # Whether anything goes by itself; then the policy is asked before every read and write.
        self.forgets_by_itself = type(self.ledger.policy).expired is not EvictionPolicy.expired
        self._has_told = False  # that it forgets
        self.encoders = Encoders()
        self.journal: Journal | None = None  # of a bank on disk
        # Indexes that were needed so far, by the position of their layer; and how to find what is saved of one.
        self.indexes: dict[int, ChunkIndex] = {}
        self.find_saved: Callable[[int], SavedIndex | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickled table takes along: neither locks nor readers, which are another's."""
        return {name: value for name, value in self.__dict__.items() if name not in ("lock", "turn", "_editions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        # A thread may take them again while it holds them. The turn is taken first, or not waited for.
        self.lock, self.turn = threading.RLock(), threading.RLock()
        self._editions: weakref.WeakSet[Edition] = weakref.WeakSet()  # that somebody reads
        tables.add(self)

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
            self.__dict__.update({name: getattr(other, name) for name in HELD})  # at one stroke, also for Ctrl-C
            self.storage.place(self.device, self.device_budget)

    def place(self, device: torch.device, budget: int | None) -> None:
        """Keep the rows on a device from now on, as `Storage.place` does."""
        with self.lock, torch.inference_mode(False):
            self.storage.place(device, budget)
            self.device, self.device_budget = device, budget
            self.indexes.clear()

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
        self.journal.refuse_reader()  # a forked copy of the process would wait for a thread that it does not have
        with self.taking_turn(), self.journal.transaction():
            yield

    @contextlib.contextmanager
    def taking_turn(self) -> Iterator[None]:
        """Let no other thread change the table inside the block; raise ValueError where another does not come to its end."""
        if not self.turn.acquire(timeout=TURN_SECONDS):
            raise ValueError(
                f"a bank must be changed by one thread at a time, and another has been at it for {TURN_SECONDS:g} seconds; if "
                "that one waits for this one inside `bank.transaction()`, let it wait behind the block; else try again."
            )
        try:
            yield
        finally:
            self.turn.release()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Change the table inside the block: for readers at one stroke, and durably at its end if it is no part of another."""
        # Whatever the caller's mode: what is made in inference mode can never be written to again.
        with self.transaction(), self.lock, torch.inference_mode(False):
            yield

    @contextlib.contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """Change rows inside the block; after an error undo it or, in memory, where nothing can, refuse everything.

        So Ctrl-C, or memory that runs out, never lets one document answer with the text of another: also where a mere read
        lets go of what has outlived its time, and where somebody goes on with a transaction in which a change has failed.
        """
        try:
            yield
        except BaseException as error:
            if self.journal is not None:
                self.journal.undo()
            else:
                self.refuse(
                    f"a change of a bank in memory was cut short ({type(error).__name__}), and what it holds is not to be "
                    "trusted; make it again, or load the one that was saved."
                )
            raise

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
        version: int,
    ) -> None:
        """Write tokens of an encoder version to the end of a document, with those of its last chunk that is not full."""
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
        self._write_after(document, chunks, new_tokens, joins, source, version, skipped)

    def extend_with_chunks(
        self, document: Document, chunks: list[Chunks], source: SourcePart | None, version: int
    ) -> None:
        """Write whole chunks, as they are stored, to the end of a document of whole chunks: a segment of an encoder version."""
        assert not document.num_tokens % self.chunk_size
        num_chunks = chunks[0].keys.shape[1]
        skipped = self._chunks_without_room(document, num_chunks)
        chunks = [Chunks(*(tensor[:, skipped:].to(self.device) for tensor in layer)) for layer in chunks]
        self._write_after(document, chunks, num_chunks * self.chunk_size, "new", source, version, skipped)

    def replace(self, old: Document, draft: Table, new: Document) -> None:
        """Put a document of `draft`, whose chunks are as they are stored here, in place of `old`."""
        chunks = draft.storage.select(new.rows.values)
        room = None if self.capacity is None else self.capacity - self.ledger.num_pinned_rows
        if room is not None and len(new.rows) > room + len(old.rows) * old.is_pinned:
            raise self._too_full(new.document_id, len(new.rows))
        self._tell_if_it_forgets(len(new.rows) - len(old.rows))
        self._reserve(chunks, len(new.rows))
        self._hold_sizes()
        # What was said of the document stays; the other fields are of the new text.
        said = {name: getattr(old, name) for name in SAID_OF_A_DOCUMENT}
        twin = dataclasses.replace(new, serial=-1, rows=IntQueue(), runs=[], **said)
        chosen = self.ledger.choose(self._excess(len(new.rows), len(old.rows)), leaving=old)
        with self._as_a_whole():
            self._remove(*self.ledger.close(old))
            self._write(twin, chunks, torch.empty(0, dtype=torch.int64), chosen)

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
                self._keep(rows[place])
                with self._as_a_whole():
                    for index in self.indexes.values():
                        index.rows_dropped(rows[place])
                        index.note_reencoded(high - low)
                    self.storage.drop(rows[place])
                    run.slot = self.storage.write(rows[place], part)
                    self._tell_indexes_of(rows[place])
            done += run.num_chunks

    def drop(self, document: Document) -> None:
        """Forget a document, also its name, and move the last live rows into the holes it leaves."""
        self._hold_sizes()
        with self._as_a_whole():
            self._remove(*self.ledger.close(document))
            self.ledger.forget_names({document.document_id})

    def drop_expired(self) -> None:
        """Forget what has outlived the policy's time; most policies know none."""
        if self.forgets_by_itself:
            with self.lock:
                if expired := self.ledger.expired():
                    self._hold_sizes()
                    with self._as_a_whole():
                        self._remove(*self.ledger.release(expired))

    def copy_to(self, target: Table) -> None:
        """Write every document to the empty `target`, chunk by chunk as it is stored, in the order of writing."""
        self.drop_expired()
        self.storage.recheck()
        target.encoders = self.encoders.copy()
        twins: dict[int, Document] = {}
        for document in self.ledger.documents.values():
            twin = dataclasses.replace(document, serial=-1, rows=IntQueue(), runs=[], source_or_stored=None)
            twin.segments = document.segments.copy()
            if document.source is not None:  # characters go on to be counted from the start of the document
                twin.source_or_stored = Source(document.source.has_text, document.source.first_char)
                twin.push_source(document.source.part(0, document.source.num_tokens))
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
        self,
        position: int,
        queries: Tensor,
        num_chunks: int,
        rows: Tensor | None,
        bonus: Tensor | None = None,
        by_distance: bool = False,
    ) -> Ranked:
        """Return scores and rows of the best chunks of one layer; only missing slots, if nothing was ever written."""
        shape = self.storage.shapes[position] if self.storage.shapes else None
        fits = isinstance(queries, Tensor) and queries.is_floating_point() and queries.ndim == 3 and not queries.is_meta
        fits = fits and (shape is None or (queries.shape[0], queries.shape[2]) == shape[:2])
        if not fits or type(num_chunks) is not int or not 0 < num_chunks <= MOST_CHUNKS:
            refuse_search(queries, num_chunks, shape)
        if self.storage.shapes:
            return self.index_of(position).search(queries, num_chunks, rows, bonus, by_distance=by_distance)
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

    def _hold_sizes(self) -> None:
        """Keep how many tokens rows have, which the ledger is about to forget, for those who still read them."""
        for edition in self._editions:
            edition.hold_sizes()

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

    def _excess(self, num_new: int, num_leaving: int = 0) -> int:
        """Return how many chunks have to go before so many new ones are written, once others have left."""
        room = num_new if self.capacity is None else self.capacity - self.ledger.num_rows + num_leaving
        return num_new - max(0, min(num_new, room))

    def _write(self, document: Document, chunks: list[Chunks], taken: Int[Tensor, " rows"], chosen: Chosen) -> None:
        """Write chunks into rows `taken` from the document, into those of the `chosen` chunks, which go, and into new ones."""
        num_rows = self.ledger.num_rows
        num_new = chunks[0].keys.shape[1] - len(taken) - sum(count for _, count in chosen)
        if document.serial < 0:
            self.ledger.open(document)
        taken = torch.cat([taken, self.ledger.evict(chosen, keep=document)])
        rows = torch.cat([taken, torch.arange(num_rows, num_rows + num_new)])
        if len(taken):
            self._keep(taken)
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
        version: int,
        skipped: int,
    ) -> None:
        """Write the newest chunks behind what a document has, without `skipped` ones that there is no room for.

        `source`: of all `num_tokens` new tokens.
        """
        num_chunks = chunks[0].keys.shape[1]
        self._reserve(chunks, num_chunks)
        is_begun = document.num_tokens % self.chunk_size > 0
        chosen = self.ledger.choose(self._excess(num_chunks - is_begun), growing=document)
        with self._as_a_whole():
            taken = self.ledger.take_end(document)
            document.num_tokens += num_tokens
            document.segments.push(num_tokens, joins, version)
            if source is not None:
                document.push_source(source)
            self._write(document, chunks, taken, chosen)
            if skipped:
                self.ledger.skip(document, skipped)

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


tables: weakref.WeakSet[Table] = weakref.WeakSet()  # of this process


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
        self._sizes: Int[Tensor, " rows"] | None = None  # tokens of each row, before the ledger has changed any
        # The same, where they are asked for: a GPU would be waited for in each layer.
        self._sizes_there: dict[torch.device, Tensor] = {}

    def keep(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep rows that the table is about to give up."""
        self.hold_sizes()
        if self.is_kept is None:
            self.is_kept = torch.zeros(self.num_rows, dtype=torch.bool)
        rows = rows[rows < self.num_rows]
        rows = rows[~self.is_kept[rows]].sort().values
        if len(rows):
            self.is_kept[rows] = True
            self._kept.append((rows, self.table.storage.keep(rows)))

    def hold_sizes(self) -> None:
        """Keep how many tokens each row has."""
        if self._sizes is None:
            self._sizes = self.table.ledger.sizes(torch.arange(self.num_rows))

    def sizes(self, rows: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return how many tokens the chunks in these rows have; of row -1, those of row 0."""
        if self._sizes is None and rows.device.type == "cpu":
            return self.table.ledger.sizes(rows)
        there = self._sizes_there.get(rows.device)
        if there is None or len(there) < self.num_rows:  # rows that were added since are of this generation too
            known = self.table.ledger.sizes(torch.arange(self.num_rows)) if self._sizes is None else self._sizes
            there = self._sizes_there[rows.device] = known.to(rows.device)
        return there[rows.clamp(min=0)]

    def is_there(self, rows: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Return for each row, -1 for none, whether the table still has it under this number."""
        return rows >= 0 if self.is_kept is None else (rows >= 0) & ~self.is_kept[rows.clamp(min=0)]

    def next_ids(self, rows: Int[Tensor, "*shape"], num_rows: int) -> Int[Tensor, "*shape chunk_size"]:
        """Return which token follows each token of these rows, in the first `num_rows` rows; -1 where that is not known.

        Of what the table has given up since, it is not: documents that are gone take their ids along.
        """
        asked = rows.detach().cpu()
        is_there = self.is_there(asked)
        found = torch.full((*rows.shape, self.table.chunk_size), -1)
        ids, following = self.table.ledger.next_ids(asked[is_there])
        goes_on = (following >= 0) & (following < num_rows)
        goes_on &= self.is_there(following.clamp(max=self.num_rows - 1))  # else it was written since
        ids[:, -1].masked_fill_(~goes_on, -1)
        found[is_there] = ids
        return found.to(rows.device)

    def search(
        self,
        position: int,
        queries: Tensor,
        num_chunks: int,
        num_rows: int,
        rows: Int[Tensor, " some"] | None,
        bonus: Float[Tensor, " rows"] | None,
        by_distance: bool = False,
    ) -> Ranked:
        """Return scores and rows of the best chunks of one layer among its first `num_rows` rows, or some of these (sorted)."""
        live = self.table.ledger.num_rows
        if self.is_kept is None and live == num_rows:
            return self.table.search(position, queries, num_chunks, rows, bonus, by_distance)
        rows = torch.arange(num_rows) if rows is None else rows
        bonus_of_live = None if bonus is None else functional.pad(bonus, (0, live - len(bonus)))
        there = rows[self.is_there(rows)]
        found = [self.table.search(position, queries, num_chunks, there, bonus_of_live, by_distance)]
        for kept, storage in self._kept:
            wanted = torch.isin(kept, rows).nonzero().flatten()
            if len(wanted):
                index = self.table.new_index("exact", storage.layer(position))
                added = None if bonus is None else bonus[kept]
                scores, places = index.search(queries, num_chunks, wanted, added, by_distance=by_distance)
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
