"""Which documents of a bank still hold, and from when they are: hidden ones are kept, and no search finds them.

The content clock has nothing to do with the encoder: a text can be out of date though its keys are as good as new, and the
other way round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longmem.memory.age_prior import AgePrior
from longmem.memory.checks import validate_tags
from longmem.memory.rows.documents import Document
from longmem.memory.rows.ledger import Ledger

FIRST_DATE, LAST_DATE = -62_135_596_800, 253_402_300_799  # those that a calendar shows


@dataclass(frozen=True)
class _Standing:
    """What was found out about one version of a ledger; it is good until the moment `ends`, when the next text expires."""

    version: int
    ends: float
    # Documents that no search finds, by serial; and by row whether one does. Without hidden documents there is no mask.
    hidden: frozenset[int]
    is_visible: Bool[Tensor, " rows"] | None
    visible_rows: Int[Tensor, " visible"] | None


class ContentClock:
    """Return what says which rows of a bank are visible, and what they weigh by their age.

    Args:
        prior: of the bank; None: age does not count.
    """

    def __init__(self, prior: AgePrior | None) -> None:
        self.prior = prior
        self._moment: float | None = None
        self._standing: _Standing | None = None
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

    def visible(self, ledger: Ledger, rows: Int[Tensor, " rows"] | None) -> Int[Tensor, " visible"] | None:
        """Return those of the live `rows` (None: of all) that a search may find; None for all that live."""
        standing = self._look(ledger)
        if standing.is_visible is None:
            return rows
        return standing.visible_rows if rows is None else rows[standing.is_visible[rows]]

    def newest(self, ledger: Ledger, documents: Iterable[Document] | None = None) -> float:
        """Return the date of the newest visible text of these documents (None: of all); -inf if there is none."""
        hidden = self._look(ledger).hidden
        chosen = ledger.documents.values() if documents is None else documents
        return max((each.date for each in chosen if len(each.rows) and each.serial not in hidden), default=-math.inf)

    def log_weights(self, ledger: Ledger, newest: float) -> Float[Tensor, " rows"] | None:
        """Return the log weight of every row, its age counted back from `newest`; None if it is 0 for all."""
        if self.prior is None:
            return None
        standing = self._look(ledger)
        if self._weights is None or self._weights[:2] != (standing.version, newest):
            weights = torch.zeros(ledger.num_rows)
            for document in ledger.documents.values():
                if document.serial not in standing.hidden:
                    age = max(0.0, newest - document.date) / self.prior.unit
                    weights[document.rows.values] = self.prior.log_weight(age)
            self._weights = standing.version, newest, weights if weights.any() else None
        return self._weights[2]

    def _look(self, ledger: Ledger) -> _Standing:
        known, moment = self._standing, self.moment
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
        self._standing = _Standing(ledger.version, min(ends, default=math.inf), hidden, is_visible, visible_rows)
        return self._standing


def dated_document(
    document_id: str, tags: Iterable[str] = (), dated: object = None, valid_until: object = None
) -> Document:
    """Return the record of a new document, after a check of what is said of it."""
    start, end = validate_dates(dated, valid_until)
    return Document(document_id, tags=validate_tags(tags), dated=start, valid_until=end)


def has_expired(document: Document, moment: float) -> bool:
    """Return whether a document's time was over at a moment."""
    return document.valid_until is not None and document.valid_until <= moment


def validate_dates(dated: object, valid_until: object) -> tuple[float | None, float | None]:
    """Return both as floats. Raises ValueError unless they are seconds since 1970, the second the later one, or None."""
    start = None if dated is None else validate_date("dated", dated)
    end = None if valid_until is None else validate_date("valid_until", valid_until)
    if start is not None and end is not None and end <= start:
        raise ValueError(
            f"`valid_until` must be later than `dated`, got {end} and {start}; leave out what is not known."
        )
    return start, end


def validate_date(argument: str, date: object) -> float:
    """Return a date as a float. Raises ValueError unless it is a number of seconds since 1970."""
    if not isinstance(date, int | float) or isinstance(date, bool) or not FIRST_DATE <= date <= LAST_DATE:
        raise ValueError(
            f"`{argument}` must be a number of seconds since 1970, in the years 1 to 9999, or None, got {date!r}; a datetime "
            "has `.timestamp()`, and milliseconds are to be divided by 1,000."
        )
    return float(date)
