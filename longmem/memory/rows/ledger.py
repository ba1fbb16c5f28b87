"""The book-keeping of the memory bank: which document owns which row, and in which order rows were written.

A document's last chunk may be shorter than the others. It has a row like them, and so it is found, evicted and forgotten like
them; what is appended takes its row over.

Nothing here touches keys or values, so every promise about rows and documents can be read, and tested, in this file and
`documents.py` alone.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from longmem.memory.eviction import EvictionPolicy
from longmem.memory.rows.documents import Document, Run

# Numbers that no two states of any ledgers share, also when a bank is cleared and gets a new ledger.
_STAMPS = itertools.count()

Chosen = Sequence[tuple[Document, int]]  # documents, and how many of their oldest chunks go
# Chunks of one document that are written one after the other within this time make one run.
SECONDS_OF_A_RUN = 1.0


class ChunkPlace(NamedTuple):
    """Where a chunk is from: tokens (fewer than `chunk_size` at a document's end) and characters of its document, its text.

    Characters and text are None where the writer gave no text.
    """

    document_id: str
    start: int
    stop: int
    char_start: int | None = None
    char_stop: int | None = None
    text: str | None = None


class Ledger:
    """The ledger of a bank; live rows are always `[0, num_rows)`, each owned by one chunk of one document."""

    def __init__(self, chunk_size: int, policy: EvictionPolicy) -> None:
        self.chunk_size = chunk_size
        self.policy = policy
        self.documents: dict[str, Document] = {}
        self.num_rows = 0
        self.num_pinned_rows = 0
        # What rows of shorter chunks lack, in tokens; and how many tokens were evicted so far because the bank was full.
        self.num_missing = 0
        self.num_evicted = 0
        # `version` changes with every change, so that a selection knows when to look again; `generation` only when a row
        # that was live may hold something else, or other numbers of the same chunk, so that a reader knows whether rows
        # found before are still good.
        self.version = self.generation = next(_STAMPS)
        # Serials of the documents that changed or ceased to be since somebody last emptied the set: what a bank on disk
        # has to write. Serials of documents that were only read stand in the second one.
        self.changed: set[int] = set()
        self.read: set[int] = set()
        self.by_serial: dict[int, Document] = {}
        # Serials of the documents that are hidden from searches, or will be.
        self.marked: set[int] = set()
        self.next_serial = 0
        # Runs of chunks in the order of writing, oldest first.
        self.runs: OrderedDict[int, Run] = OrderedDict()
        self.next_order = 0
        # For each row the serial of its document, its position there, in chunks, its tokens, the version of its encoder and
        # the one that a map has moved it to; never without a column, so that row -1 can be looked up, too.
        self._table = torch.zeros(5, 1, dtype=torch.int64)

    # Writing.

    def open(self, document: Document) -> None:
        """Enter a document; it stays until it is closed, or evicted to the last chunk."""
        if document.serial < 0:
            document.serial = self.next_serial
        self.next_serial = max(self.next_serial, document.serial + 1)
        self.documents[document.document_id] = document
        self.by_serial[document.serial] = document
        self.changed.add(document.serial)
        self._mark(document)

    def record(self, document: Document, rows: Int[Tensor, " chunks"], slot: int = -1) -> None:
        """Enter the rows of the newest chunks of `document`, whose length is already up to date.

        `slot`: where the first of them is on disk, the others behind it.
        """
        self._touch(document)
        document.written_at = now = time.time()
        if not len(rows):
            return
        last = next(reversed(self.runs.values()), None)
        follows = slot < 0 or (last is not None and slot == last.slot + last.num_chunks)
        is_late = last is None or not 0 <= now - last.written_at <= SECONDS_OF_A_RUN
        if last is None or last.document is not document or is_late or not follows:
            last = self.enter_run(Run(document, 0, now, self.next_order, slot))
        last.num_chunks += len(rows)
        self.place(document, rows, document.num_chunks(self.chunk_size) - len(rows))

    def take_end(self, document: Document) -> Int[Tensor, " rows"]:
        """Return the row of a document's last chunk if it is not full, else none; what is written next takes it over.

        Who has found the row may go on to read it: its tokens are the first of what it will hold.
        """
        if not document.num_tokens % self.chunk_size:
            return torch.empty(0, dtype=torch.int64)
        row = document.rows.values[-1:].clone()
        self._let_go(document, row)
        document.rows.cut(len(document.rows) - 1)
        document.runs[-1].num_chunks -= 1
        if not document.runs[-1].num_chunks:
            del self.runs[document.runs.pop().order]
        return row

    def enter_run(self, run: Run) -> Run:
        """Return `run`, which now is the newest of all, whatever the clock said before."""
        self.not_after(run.written_at)
        self.runs[run.order] = run
        self.next_order = run.order + 1
        run.document.runs.append(run)
        return run

    def place(self, document: Document, rows: Int[Tensor, " chunks"], start: int) -> None:
        """Give rows to the chunks of a document that follow those which have one; the first stands at `start`, in chunks."""
        document.rows.push(rows)
        self.num_pinned_rows += len(rows) * document.is_pinned
        self.num_rows = max(self.num_rows, int(rows.max()) + 1)
        if self.num_rows > self._table.shape[1]:
            table = torch.empty(5, 2 * self.num_rows, dtype=torch.int64)  # what is not used yet takes no memory
            table[:, : self._table.shape[1]] = self._table
            self._table = table
        positions = torch.arange(start, start + len(rows))
        self._table[0, rows], self._table[1, rows] = document.serial, positions
        sizes = (document.num_tokens - positions * self.chunk_size).clamp(max=self.chunk_size)
        self._table[2, rows] = sizes
        self.num_missing += len(rows) * self.chunk_size - int(sizes.sum())
        self._table[3:, rows] = document.segments.of_chunks(start, len(rows), self.chunk_size)

    def fill(self, documents: Iterable[Document], runs: Sequence[Run], rows: Int[Tensor, "5 rows"]) -> None:
        """Enter all that a bank holds into an empty ledger, with its rows: for each what the table of this class has of it."""
        for document in documents:
            self.documents[document.document_id] = self.by_serial[document.serial] = document
            if document.is_superseded or document.valid_until is not None:
                self.marked.add(document.serial)
        self.runs = OrderedDict((run.order, run) for run in runs)
        self.num_rows, self.num_pinned_rows = rows.shape[1], sum(r.num_chunks for r in runs if r.document.is_pinned)
        if self.num_rows:
            self._table = rows
            self.num_missing = self.num_rows * self.chunk_size - int(rows[2].sum())

    def note_encoding(self, document: Document) -> None:
        """Take over the versions of a document's segments, some of which were encoded again."""
        self._touch(document)
        self.generation = next(_STAMPS)
        self.read_versions(document)

    def read_versions(self, document: Document) -> None:
        """Note for each row of a document of which encoder it is."""
        rows = document.rows.values
        first = document.first_chunk(self.chunk_size)
        self._table[3:, rows] = document.segments.of_chunks(first, len(rows), self.chunk_size)

    def rename(self, old: str, new: str) -> None:
        self._touch(self.documents[old])
        self.documents[old].document_id = new
        for document in self.documents.values():
            if document.superseded_by == old:
                self._touch(document)
                document.superseded_by = new
        self.documents = {document.document_id: document for document in self.documents.values()}

    def label(self, document: Document, tags: tuple[str, ...]) -> None:
        self._touch(document)
        document.tags = tags

    def pin(self, document: Document, is_pinned: bool) -> None:
        """Keep a document from eviction, or no longer."""
        if document.is_pinned != is_pinned:
            self._touch(document)
            document.is_pinned = is_pinned
            self.num_pinned_rows += len(document.rows) * (1 if is_pinned else -1)

    def supersede(self, document: Document, is_superseded: bool, by: str | None, valid_until: float | None) -> None:
        """Hide a document from searches or show it again, and say until when it is valid."""
        self._touch(document)
        document.is_superseded, document.superseded_by, document.valid_until = is_superseded, by, valid_until
        self._mark(document)

    def note_change(self) -> None:
        """Count a change of the bank that is none of its documents'."""
        self.version = next(_STAMPS)

    # Forgetting.

    def evict(self, chosen: Chosen, keep: Document) -> Int[Tensor, " chunks"]:
        """Return the rows of so many of the oldest chunks of documents, as `choose` gives them, for the caller to overwrite.

        A document with nothing left is forgotten, except `keep`, which is about to get more.
        """
        if not chosen:
            return torch.empty(0, dtype=torch.int64)
        missing = self.num_missing
        rows = self._take(chosen, keep)
        self.num_evicted += len(rows) * self.chunk_size - missing + self.num_missing
        return rows

    def choose(self, num_chunks: int, growing: Document | None = None, leaving: Document | None = None) -> Chosen:
        """Return documents and how many of their oldest chunks the policy would let go of, `num_chunks` in all.

        There are so many that are not pinned, without the end of `growing`, whose row is taken over if it is not full, and
        without those of `leaving`. Nothing changes, so a policy that fails leaves all as it was.
        """
        if not num_chunks:
            return []
        taken: list[tuple[Document, int]] = []
        end = growing.runs[-1] if growing and growing.runs and growing.num_tokens % self.chunk_size else None
        runs = (run for run in self._unpinned_runs() if run.document is not leaving)
        for run in self._offered(self.policy.order(run for run in runs if run is not end or run.num_chunks > 1)):
            taken.append((run.document, min(run.num_chunks - (run is end), num_chunks)))
            num_chunks -= taken[-1][1]
            if not num_chunks:
                return taken
        raise self._wrong_policy("some of them")

    def _wrong_policy(self, got: str) -> ValueError:
        name = type(self.policy).__name__
        return ValueError(f"the eviction policy {name} must offer the runs that it is given, each once, got {got}.")

    def _offered(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yield what a policy offers. Raises ValueError for what is pinned, gone or no run, or was offered before."""
        seen: set[int] = set()
        for run in runs:
            is_there = isinstance(run, Run) and self.runs.get(run.order) is run and not run.document.is_pinned
            if not is_there or run.order in seen:
                raise self._wrong_policy("one again" if is_there else repr(run)[:80])
            seen.add(run.order)
            yield run

    def skip(self, document: Document, num_chunks: int) -> None:
        """Note that of what was just written the first chunks, for which there was no room, were never stored."""
        self.generation = next(_STAMPS)
        self.num_evicted += num_chunks * self.chunk_size
        document.segments.drop(document.first_chunk(self.chunk_size) * self.chunk_size)
        if document.source is not None:
            document.source.drop(num_chunks * self.chunk_size)

    def expired(self) -> list[tuple[Document, int]]:
        """Return documents and how many of their oldest chunks have outlived the policy's time."""
        now = time.time()
        self.not_after(now)
        gone = self._offered(self.policy.expired(self._unpinned_runs(), now))
        return [(run.document, run.num_chunks) for run in gone]

    def not_after(self, moment: float) -> None:
        """Count all runs as written by this moment: a clock that was set back has dated some of them after it.

        So runs are in the order of their times, and none outlives those that were written after it.
        """
        for run in reversed(self.runs.values()):
            if run.written_at <= moment:
                return
            run.written_at, run.stored = moment, None
            self.changed.add(run.document.serial)

    def release(
        self, taken: Iterable[tuple[Document, int]]
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, " moved"], Int[Tensor, " moved"]]:
        """Take the oldest chunks of documents; return their rows, and rows to move (from, to), as `close` does."""
        return self._fill_holes(self._take(taken, None))

    def close(self, document: Document) -> tuple[Int[Tensor, " rows"], Int[Tensor, " moved"], Int[Tensor, " moved"]]:
        """Forget a document; return its rows, and the live rows to move (from, to) so that rows stay dense."""
        self._touch(document)
        rows = document.rows.values.clone()
        self._let_go(document, rows)
        self._forget(document)
        for run in document.runs:
            del self.runs[run.order]
        return self._fill_holes(rows)

    def _take(self, taken: Iterable[tuple[Document, int]], keep: Document | None) -> Int[Tensor, " chunks"]:
        """Take so many of the oldest chunks from each document; return their rows."""
        self.generation = next(_STAMPS)
        rows, forgotten = [torch.empty(0, dtype=torch.int64)], set()
        for document, count in taken:
            self._touch(document)
            rows.append(document.rows.pop(count))
            self._let_go(document, rows[-1])
            if len(document.rows) or document is keep:
                document.segments.drop((int(self._table[1, rows[-1][-1]]) + 1) * self.chunk_size)
                if document.source is not None:
                    document.source.drop(count * self.chunk_size)
            else:
                self._forget(document)
                forgotten.add(document.document_id)
            while count:
                run = document.runs[0]
                gone = min(count, run.num_chunks)
                run.num_chunks -= gone
                run.slot += gone * (run.slot >= 0)
                count -= gone
                if not run.num_chunks:
                    del self.runs[document.runs.pop(0).order]
        self.forget_names(forgotten)
        return torch.cat(rows)

    def _fill_holes(
        self, dropped: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, " rows"], Int[Tensor, " moved"], Int[Tensor, " moved"]]:
        if len(dropped):
            self.generation = next(_STAMPS)
        dropped = dropped.sort().values
        num_rows = self.num_rows - len(dropped)
        stays = torch.ones(len(dropped), dtype=torch.bool)
        stays[dropped[dropped >= num_rows] - num_rows] = False
        sources = torch.arange(num_rows, self.num_rows)[stays]
        destinations = dropped[dropped < num_rows]

        self._table[:, destinations] = self._table[:, sources]
        serials, positions = self._table[:2, sources]
        for serial in serials.unique().tolist():
            owner, mine = self.by_serial[serial], serials == serial
            owner.rows.values[positions[mine] - owner.first_chunk(self.chunk_size)] = destinations[mine]
        self.num_rows = num_rows
        return dropped, sources, destinations

    def forget_names(self, names: Collection[str]) -> None:
        """Name these documents, which are gone for good, no longer as what superseded another."""
        for serial in self.marked if names else ():
            if (document := self.by_serial[serial]).superseded_by in names:
                self._touch(document)
                document.superseded_by = None

    def _let_go(self, document: Document, rows: Int[Tensor, " rows"]) -> None:
        """Count rows no longer as those of a document."""
        self.num_pinned_rows -= len(rows) * document.is_pinned
        self.num_missing -= len(rows) * self.chunk_size - int(self._table[2, rows].sum())

    def _forget(self, document: Document) -> None:
        del self.documents[document.document_id], self.by_serial[document.serial]
        self.marked.discard(document.serial)

    def _mark(self, document: Document) -> None:
        if document.is_superseded or document.valid_until is not None:
            self.marked.add(document.serial)
        else:
            self.marked.discard(document.serial)

    def _touch(self, document: Document) -> None:
        self.version = next(_STAMPS)
        self.changed.add(document.serial)

    def _unpinned_runs(self) -> Iterator[Run]:
        return (run for run in self.runs.values() if not run.document.is_pinned)

    # Reading.

    @property
    def versions(self) -> Int[Tensor, "2 rows"]:
        """Return for each live row the version of its encoder, and the version that a map has moved it to or -1."""
        return self._table[3:, : self.num_rows]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens in live rows."""
        return self.num_rows * self.chunk_size - self.num_missing

    def sizes(self, rows: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return how many tokens the chunks in these rows have; of row -1, those of row 0."""
        return self._table[2][rows.clamp(min=0).cpu()].to(rows.device)

    def positions(self, rows: Int[Tensor, " _rows"]) -> tuple[Int[Tensor, " _rows"], Int[Tensor, " _rows"]]:
        """Return the serial of each live row's document, and its position there, in chunks."""
        serials, positions = self._table[:2, rows]
        return serials, positions

    def rows_of(self, documents: Iterable[Document]) -> Int[Tensor, " rows"]:
        """Return the live rows of these documents, sorted."""
        rows = [document.rows.values for document in documents]
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows]).sort().values

    def count_reads(self, rows: Int[Tensor, "..."]) -> None:
        """Note that a search returned these rows, where they are not -1."""
        rows = rows.detach().flatten().cpu()
        serials, counts = self._table[0, rows[rows >= 0]].unique(return_counts=True)
        now = time.time()
        for serial, count in zip(serials.tolist(), counts.tolist(), strict=True):
            document = self.by_serial[serial]
            document.num_reads += count
            document.last_read = now
            self.read.add(serial)

    def next_ids(self, rows: Int[Tensor, " rows"]) -> tuple[Int[Tensor, "rows chunk_size"], Int[Tensor, " rows"]]:
        """Return which token follows each token of live rows, -1 where none is known, and the row of the last of these.

        That row is -1 where the document ends with a chunk. Documents may be many, and short: each costs some calls of NumPy.
        """
        size, asked = self.chunk_size, rows.numpy()
        ids, following = np.full((len(asked), size), -1), np.full(len(asked), -1)
        serials, chunks = self._table[:2].numpy()[:, asked]
        order = serials.argsort(kind="stable")
        bounds = np.flatnonzero(np.diff(serials[order], prepend=-1, append=-1))
        for start, stop in itertools.pairwise(bounds.tolist()):
            own = order[start:stop]
            document = self.by_serial[int(serials[own[0]])]
            if (source := document.source) is None:
                continue
            here, count = chunks[own] - document.first_chunk(size), len(document.rows)
            after = document.rows.values.numpy()[np.minimum(here + 1, count - 1)]
            following[own] = np.where(here + 1 < count, after, -1)
            places = here[:, None] * size + np.arange(1, size + 1)
            known = source.ids_at(torch.from_numpy(np.minimum(places, source.num_tokens - 1))).numpy()
            ids[own] = np.where(places < source.num_tokens, known, -1)
        return torch.from_numpy(ids), torch.from_numpy(following)

    def locate(self, rows: Int[Tensor, " rows"]) -> list[ChunkPlace | None]:
        """Return the place of each row; None for row -1."""
        serials, positions = self._table[:2, rows.clamp(min=0)].tolist()
        return [
            self._place_of(self.by_serial[serial], position) if row >= 0 else None
            for row, serial, position in zip(rows.tolist(), serials, positions, strict=True)
        ]

    def _place_of(self, document: Document, chunk: int) -> ChunkPlace:
        start = chunk * self.chunk_size
        stop = min(start + self.chunk_size, document.num_tokens)
        place = ChunkPlace(document.document_id, start, stop)
        source = document.source
        if source is None or not source.has_text:
            return place
        first = (chunk - document.first_chunk(self.chunk_size)) * self.chunk_size
        return ChunkPlace(*place[:3], *source.characters(first, first + stop - start))
