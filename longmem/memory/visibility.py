"""Which rows of a bank may be read now, with which weights: the content clock, the selection and the encoder in one place.

The content clock has nothing to do with the encoder: a text can be out of date though its keys are as good as new, and the
other way round. Hidden documents are kept, and no search finds them.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longmem.memory.age_prior import AgePrior
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
    # Which of all live rows the refresh policy lets be read as they are; None: all of them.
    readable: Bool[Tensor, " rows"] | None

    def among(self, rows: Int[Tensor, " rows"] | None) -> Int[Tensor, " visible"] | None:
        """Return those of some live rows (None: of all) that a search may find; None for all that live."""
        if self.is_visible is None:
            return rows
        return self.visible_rows if rows is None else rows[self.is_visible[rows]]


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

    Three things decide: whether a text still holds (superseded, expired), which documents were selected, and whether the
    refresh policy lets a row be read as it is (`readable`; None for all rows). What was found out is kept until the table
    changes or time hides a text. Whoever asks holds the table's lock.
    """

    def __init__(
        self, table: Table, prior: AgePrior | None, readable: Callable[[], Bool[Tensor, " rows"] | None]
    ) -> None:
        self._table, self._readable = table, readable
        self.prior = prior
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
        self._standing = Standing(ledger.version, ending, hidden, is_visible, visible_rows, self._readable())
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


def has_expired(document: Document, moment: float) -> bool:
    """Return whether a document's time was over at a moment."""
    return document.valid_until is not None and document.valid_until <= moment
