"""Which rows of a bank may be read now, with which weights: the content clock, the selection and the encoder in one place.

The content clock has nothing to do with the encoder: a text can be out of date though its keys are as good as new, and the
other way round. Hidden documents are kept, and no search finds them.
"""

import contextlib
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longmem.memory.age_prior import AgePrior
from longmem.memory.freshness import Freshness
from longmem.memory.index import Ranked
from longmem.memory.protocols import EncodingModel, Found
from longmem.memory.refresh.policy import readable_rows
from longmem.memory.rows.documents import Document
from longmem.memory.rows.ledger import Ledger
from longmem.memory.rows.table import Table


@dataclass(frozen=True)
class Standing:
    """Which rows of one version of a table may be read; good until the moment `ends`, when the next text expires.

    Rows are None where there is nothing to leave out.
    """

    version: int
    ends: float
    hidden: frozenset[int]  # serials of the documents that no search finds
    is_visible: Bool[Tensor, " rows"] | None
    visible_rows: Int[Tensor, " visible"] | None

    def among(self, rows: Int[Tensor, " rows"] | None) -> Int[Tensor, " visible"] | None:
        """Return those of some live rows (None: of all) that a search may find; None for all that live."""
        if self.is_visible is None:
            return rows
        return self.visible_rows if rows is None else rows[self.is_visible[rows]]


def position_of(memory_layers: Sequence[int], layer: int) -> int:
    """Return where a layer stands among the memory layers. Raises ValueError if it is none of them."""
    if layer not in memory_layers:
        raise ValueError(f"`layer` must be one of the memory layers {tuple(memory_layers)}, got {layer!r}.")
    return memory_layers.index(layer)


class Selection:
    """Some documents of a bank: those named, and those with one of the tags."""

    def __init__(self, document_ids: Iterable[str], tags: Iterable[str]) -> None:
        self.document_ids, self.tags = tuple(document_ids), tuple(tags)
        self._rows: tuple[int, Tensor] | None = None  # found last, and the version of the ledger that they are from

    def documents(self, ledger: Ledger) -> list[Document]:
        """Return the documents that are there now."""
        names, tags = set(self.document_ids), set(self.tags)
        return [each for name, each in ledger.documents.items() if name in names or not tags.isdisjoint(each.tags)]

    def rows(self, ledger: Ledger) -> Int[Tensor, " rows"]:
        """Return the live rows of these documents, sorted."""
        if self._rows is None or self._rows[0] != ledger.version:
            self._rows = ledger.version, ledger.rows_of(self.documents(ledger))
        return self._rows[1]


class Visibility:
    """Which rows of a table may be read now, and what they weigh by their age.

    Two things decide here: whether a text still holds (superseded, expired), and which documents were selected. What was
    found out is kept until the table changes or time hides a text. Whoever asks holds the table's lock.
    """

    def __init__(self, table: Table, prior: AgePrior | None) -> None:
        self._table, self.prior = table, prior
        self._moment: float | None = None
        self._standing: Standing | None = None
        self._weights: tuple[int, float, Tensor | None] | None = None

    @property
    def moment(self) -> float:
        """Return the time that the bank is read at, in seconds since 1970."""
        return time.time() if self._moment is None else self._moment

    def use(self, prior: AgePrior | None) -> None:
        """Weigh by another prior from now on."""
        self.prior, self._weights = prior, None

    def stop_at(self, moment: float | None) -> None:
        """Read at this moment from now on, whatever the time; None: at the time that it is."""
        self._moment, self._standing, self._weights = moment, None, None

    def now(self) -> Standing:
        """Return which rows may be read now."""
        known, ledger = self._standing, self._table.ledger
        moment = self.moment
        if known is not None and known.version == ledger.version and moment < known.ends:
            return known
        if known is not None and known.version == ledger.version:
            ledger.note_change()  # time alone has hidden something: who keeps what was read before has to hear of it
        marked = [ledger.by_serial[serial] for serial in ledger.marked]
        gone = [each for each in marked if each.is_superseded or has_expired(each, moment)]
        hidden = frozenset(each.serial for each in gone)
        ends = (each.valid_until for each in marked if each.serial not in hidden and each.valid_until is not None)
        is_visible = visible_rows = None
        if gone:
            is_visible = torch.ones(ledger.num_rows, dtype=torch.bool)
            is_visible[ledger.rows_of(gone)] = False
            visible_rows = is_visible.nonzero().flatten()
        ending = min(ends, default=math.inf)
        self._standing = Standing(ledger.version, ending, hidden, is_visible, visible_rows)
        return self._standing

    def newest(self, selection: Selection | None = None) -> float:
        """Return the date of the newest visible text of a selection (None: of all); -inf if there is none."""
        hidden, ledger = self.now().hidden, self._table.ledger
        chosen = ledger.documents.values() if selection is None else selection.documents(ledger)
        return max((each.date for each in chosen if len(each.rows) and each.serial not in hidden), default=-math.inf)

    def log_weights(self, newest: float) -> Float[Tensor, " rows"] | None:
        """Return the log weight of every live row, its age counted back from `newest`; None if it is 0 for all."""
        if self.prior is None:
            return None
        standing, ledger = self.now(), self._table.ledger
        if self._weights is None or self._weights[:2] != (standing.version, newest):
            weights = torch.zeros(ledger.num_rows)
            for document in ledger.documents.values():
                if document.serial not in standing.hidden:
                    age = max(0.0, newest - document.date) / self.prior.unit
                    weights[document.rows.values] = self.prior.log_weight(age)
            self._weights = standing.version, newest, weights if weights.any() else None
        return self._weights[2]


class Snapshot:
    """What a forward pass reads of a bank, or of some of its documents: rows, index and visibility of one state.

    Whatever is written to the bank meanwhile, nothing of it is read here, and nothing that was there is missed. One thing can
    move it: where the refresh policy encodes again what a read finds, the first search may do so, and the snapshot then is of
    the state behind that. As the `generation` of what was found it goes with the rows, also to the backward pass.
    """

    def __init__(
        self,
        memory_layers: Sequence[int],
        table: Table,
        visibility: Visibility,
        freshness: Freshness,
        selection: Selection | None,
        newest: float | None,
        model: EncodingModel | None,
        is_held: bool,
    ) -> None:
        self._memory_layers, self._table, self._visibility = memory_layers, table, visibility
        self._is_held = is_held  # by a pass, to which alone it is of use as a generation
        self._freshness, self._selection, self._newest, self._model = freshness, selection, newest, model
        self._was_read = False
        self._found: list[Tensor] = []  # whose reads are to be counted
        if table.forgets_by_itself:
            table.drop_expired()
        self._take()

    def _take(self) -> None:
        """Take the state of this moment."""
        ledger, standing = self._table.ledger, self._visibility.now()
        self.num_rows, self._has_short = ledger.num_rows, ledger.num_missing > 0
        self._rows = standing.among(None if self._selection is None else self._selection.rows(ledger))
        self._reader, self._readable = self._freshness.read_by(self._model)
        self._has_prior, self._weights = self._visibility.prior is not None, None
        if self._has_prior:
            self._newest = self._visibility.newest(self._selection) if self._newest is None else self._newest
            self._weights = self._visibility.log_weights(self._newest)
        self.edition = self._table.edition()

    def search(
        self, layer: int, queries: Tensor, num_chunks: int, scaling: float | None, by_distance: bool = False
    ) -> Found:
        """Return the best chunks; arguments as for `MemoryBank.search`, or `nearest`. The caller holds the table's lock."""
        position, bonus, table = position_of(self._memory_layers, layer), None, self._table
        weights = None if scaling is None else self._weights
        if scaling is not None and self._has_prior:
            bonus = None if weights is None else weights / scaling

        def search(rows: Tensor | None) -> Ranked:
            return self.edition.search(position, queries, num_chunks, self.num_rows, rows, bonus, by_distance)

        if self._readable is None or by_distance:  # what is like a token is no reason to encode it again
            rows = self._rows if self._readable is None else readable_rows(self._rows, self._readable)
            scores, found = search(rows)
        # Who changes a folder meanwhile is not waited for.
        elif self._may_encode() and table.turn.acquire(blocking=False):
            del self.edition  # or stale rows would be kept for it
            try:
                scores, found = self._freshness.search(
                    lambda rows: table.search(position, queries, num_chunks, rows, bonus, by_distance),
                    *(self._rows, self._readable, self._reader, None),
                )
            finally:
                self._take()
                table.turn.release()
        else:
            scores, found = self._freshness.search(search, self._rows, self._readable, self._reader, self.edition)
        self._was_read = True
        if not by_distance:  # nor to keep it
            self._found.append(found)
        if not self._is_held:
            self.count_reads()
        if weights is not None and weights.device != found.device:  # moved once in a pass: a GPU is waited for
            weights = self._weights = weights.to(found.device)
        ages = None if weights is None else weights[found.clamp(min=0)]
        generation: Hashable = self if self._is_held else table.ledger.generation
        sizes = self.edition.sizes(found) if self._has_short else None
        return Found(found, scores, ages, generation if self.num_rows else None, sizes)

    def sample(self, num_chunks: int) -> Found:
        """Return chunks spread evenly over what may be read; the caller holds the table's lock."""
        rows = torch.arange(self.num_rows) if self._rows is None else self._rows
        if self._readable is not None:
            rows = readable_rows(rows, self._readable)
        count = min(num_chunks, len(rows))
        chosen = rows[torch.arange(count) * (len(rows) - 1) // max(count - 1, 1)][None, None].to(self._table.device)
        self._was_read = True
        sizes = self.edition.sizes(chosen) if self._has_short else None
        generation: Hashable = self if self._is_held else self._table.ledger.generation
        return Found(
            chosen, torch.zeros_like(chosen, dtype=torch.float32), None, generation if len(rows) else None, sizes
        )

    def count_reads(self) -> None:
        """Count what was found since the last call, at one stroke, because a GPU is waited for."""
        found, self._found = self._found, []
        if found:
            rows = torch.cat([each.flatten() for each in found]).cpu()
            with self._table.lock:  # of what the bank has given up since, nobody counts reads
                there = rows if self.edition.is_kept is None else rows[self.edition.is_there(rows)]
                self.edition.table.ledger.count_reads(there)

    def _may_encode(self) -> bool:
        """Return whether what is found may be encoded again: nothing was read yet, and nothing has changed."""
        ledger = self._table.ledger
        is_now = self.edition.generation == ledger.generation and self.num_rows == ledger.num_rows
        # Not while a backward pass is to come.
        may_encode = self._freshness.policy.encodes_on_read and not torch.is_grad_enabled()
        return is_now and not self._was_read and may_encode


# Of the forward pass that runs in this context: the model that reads, for which banks were made ready (None: the last for which
# this thread has done so), and what has been read so far. While it is set, one state of each bank is read, that of its first
# search, up to the last gather of what was found.
READING: ContextVar[tuple[EncodingModel | None, dict[Any, Snapshot]] | None] = ContextVar("READING", default=None)


@contextlib.contextmanager
def reading_as(model: EncodingModel | None, taken: dict[Any, Any]) -> Iterator[None]:
    """Run a forward pass, or a part of one, that reads as a model; `taken` is what its parts before have read."""
    token = READING.set((model, taken))
    try:
        yield
    finally:
        end_pass(token, taken)


def end_pass(token: Token[Any], taken: dict[Any, Any]) -> None:
    """Read as before `READING` was set, which returned `token`, and count the reads of what was taken since."""
    READING.reset(token)
    for each in taken.values():
        if isinstance(each, Snapshot):
            each.count_reads()


def take(
    memory_layers: Sequence[int],
    table: Table,
    visibility: Visibility,
    freshness: Freshness,
    selection: Selection | None,
    newest: float | None,
) -> Snapshot:
    """Return what the forward pass that runs here reads of a bank or, outside of one, a snapshot for one search."""
    reading = READING.get()
    model, taken = reading or (None, {})
    key = table, selection
    if key not in taken:
        is_held = reading is not None
        taken[key] = Snapshot(memory_layers, table, visibility, freshness, selection, newest, model, is_held)
    return taken[key]


def has_expired(document: Document, moment: float) -> bool:
    """Return whether a document's time was over at a moment."""
    return document.valid_until is not None and document.valid_until <= moment
