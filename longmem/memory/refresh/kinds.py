"""The refresh policies that a bank knows by name; one of yours is a class like these, in your own program.

frozen    the encoder never changes, and that is proved instead of assumed (the paper; the default)
eager     when it changes, everything is encoded again before it is read (REALM, with a period)
bounded   nothing is read that is further behind than a limit, on the clock of your choice (AReaL's and AsyncFlow's bound)
lazy      what a read finds and is stale is encoded again there and then, and a sweep takes the rest, oldest first
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longmem.encoder.stamp import EncoderStamp, refuse_stale
from longmem.errors import StaleMemoryError
from longmem.memory.index import Ranked
from longmem.memory.refresh.policy import RefreshPolicy, Search, readable_rows
from longmem.memory.refresh.refresher import CLOCKS, Lags, Refresher, Targets
from longmem.memory.rows.documents import Document
from longmem.memory.rows.segments import Segment
from longmem.memory.rows.table import Table
from longmem.plugins import Setting, register

UNBOUNDED = "bounded:max_lag=1e12"  # everything is read as it is, however old, as in Memorizing Transformers


@register("refresh", "frozen")
class Frozen(RefreshPolicy):
    """The policy that refuses a bank whose entries another encoder wrote; nothing is ever encoded again.

    Where `bank.freshness.reencode` has brought a part of a bank up to date, for a budget's sake or because the rest can't
    be encoded again, the rest is masked.
    """

    def admit(self, known: EncoderStamp, stamp: EncoderStamp) -> None:
        refuse_stale(known, stamp)

    def on_idle(self, refresher: Refresher, budget_tokens: int | None) -> None:
        """Do nothing: nothing changes."""

    def readable(self, lags: Lags) -> Bool[Tensor, " versions"]:
        """Return that what this encoder wrote is, and what nobody knows of: its owner has said to read it all the same."""
        readable = lags.is_fresh
        readable[-1] = True
        return readable


@register("refresh", "eager")
class Eager(RefreshPolicy):
    """The policy that encodes all again after every `every`-th change of the encoder; in between, it is read as it is."""

    settings: ClassVar[Mapping[str, Setting]] = {
        "every": Setting(1, "the number of encoder changes from one refresh to the next", 1, 1e9)
    }

    def on_encoder_change(self, refresher: Refresher) -> None:
        """Encode again what is stale, all of it, if some entry has reached the period."""
        if refresher.stale(self.readable(Lags(refresher.table.encoders)).tolist()):
            refresher.reencode(refresher.stale())

    def on_open(self, refresher: Refresher) -> None:
        """Go on with what an interruption has left."""
        if refresher.state.may_write:
            self.on_encoder_change(refresher)

    def readable(self, lags: Lags) -> Bool[Tensor, " versions"]:
        """Return whether a version is less than a period behind."""
        counts = Lags(lags.encoders).values  # by the number of changes, whatever the clock
        return lags.is_fresh | (counts < self.chosen["every"])


@register("refresh", "bounded")
class Bounded(RefreshPolicy):
    """The policy that allows a lag of `max_lag`, by `clock`; what exceeds it is encoded again, masked, or not read.

    `budget_tokens`: encode so many tokens again before a read, oldest entries first, and mask what is left; 0: all. A lag of 4
    encoder changes is AReaL's documented bound; on the clock "gap" 0.001 cost SmolLM2 about 8 % of recall@16
    (`experiments/staleness/calibration.py` finds the number for a model and a wanted recall).
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "max_lag": Setting(4.0, "the largest lag that may be read", 0.0, 1e12),
        "clock": Setting("version", "what lag is measured by", words=CLOCKS),
        "on_violation": Setting("refresh", "what is done with older entries", words=("refresh", "mask", "raise")),
        "budget_tokens": Setting(0, "the tokens encoded again before a read, 0 for all", 0, 1e12),
    }

    @property
    def needs_sketch(self) -> bool:  # type: ignore[override]
        return self.chosen["clock"] == "gap"

    def on_encoder_change(self, refresher: Refresher) -> None:
        """Measure on the clock "probe", which nobody else does."""
        if self.chosen["clock"] == "probe":
            refresher.state.probed = refresher.probe_versions()
            refresher.table.ledger.note_change()

    def on_open(self, refresher: Refresher) -> None:
        """Encode again what is too old, as far as the budget goes, or refuse."""
        state = refresher.state
        targets = refresher.stale(self.readable(state.lags(self.chosen["clock"])).tolist())
        if self.chosen["on_violation"] == "raise":
            name = f"document {targets[0][0].document_id!r}" if targets else "what can't be encoded again"
            raise StaleMemoryError(
                f"{name} was encoded further back than the bound max_lag={self.chosen['max_lag']:g} on the clock "
                f'"{self.chosen["clock"]}" allows; `bank.freshness.reencode(model)` brings the bank up to date.'
            )
        if self.chosen["on_violation"] == "refresh" and targets and state.may_write:
            refresher.reencode(targets, self.chosen["budget_tokens"] or None)
            if self.chosen["budget_tokens"] and self.mask(state) is not None:
                state.warn_once(
                    "budget",
                    f"`budget_tokens={self.chosen['budget_tokens']:g}` of the refresh policy left entries beyond its bound, "
                    "which are not read until later calls have encoded them; raise it, or call `bank.freshness.sweep(model)`.",
                )

    def readable(self, lags: Lags) -> Bool[Tensor, " versions"]:
        """Return whether a version is within the bound."""
        if lags.clock != self.chosen["clock"]:
            lags = dataclasses.replace(lags, clock=self.chosen["clock"])
        return lags.is_fresh | (lags.values <= self.chosen["max_lag"])

    def on_read(self, refresher: Refresher | None, search: Search, rows: Tensor | None, readable: Tensor) -> Ranked:
        """Return what is found within the bound; where an excess is an error and nothing could be done, raise it."""
        if self.chosen["on_violation"] == "raise" and refresher is None:
            raise StaleMemoryError(
                "the bank holds entries beyond the bound of its refresh policy; read it with a model, or encode them again "
                "by `bank.freshness.reencode(model)`."
            )
        return super().on_read(refresher, search, rows, readable)


@register("refresh", "lazy")
class Lazy(RefreshPolicy):
    """The policy that encodes again the stale segments that a read finds, and then searches among what is fresh.

    By itself it would leave entries hidden whose old keys no query finds any more, so pair it with a sweep (`sweep_tokens`, or
    `bank.freshness.sweep` in idle time).

    Every token of a window searches, so a window finds something in most segments of a small bank, though it attends to few.
    What is encoded again is what some query attends to most (estimated from scores of search keys, scaled by the root of their
    width), up to `budget_tokens`. Stale chunks that are not encoded again are masked.

    A forward pass reads one state of the bank, so only its first search encodes again, and none while gradients are recorded.
    What the others find stale is masked there, and encoded again before the next read.
    """

    encodes_on_read: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Setting]] = {
        "budget_tokens": Setting(0, "the tokens encoded again for one search, 0 for all that it finds", 0, 1e12),
        "sweep_tokens": Setting(0, "the tokens encoded again before each call of the model, oldest first", 0, 1e12),
    }

    def on_open(self, refresher: Refresher) -> None:
        """Encode again what an earlier read has found stale and left, then sweep."""
        state = refresher.state
        if not state.may_write:
            return
        current = refresher.table.encoders.stamp
        if wanted := {each for each in state.wanted if current is not None and each[0] == current.digest}:
            state.wanted -= wanted
            serials, positions = torch.tensor(sorted(each[1:] for each in wanted)).T
            self._reencode(refresher, serials, positions, torch.ones(len(serials)))
        if self.chosen["sweep_tokens"] and self.mask(state) is not None and (targets := refresher.stale()):
            refresher.reencode(targets, self.chosen["sweep_tokens"])

    def on_read(self, refresher: Refresher | None, search: Search, rows: Tensor | None, readable: Tensor) -> Ranked:
        """Return what is found after the stale hits were encoded again."""
        if refresher is not None:
            hits, weights = strongest(*search(rows), refresher.table)
            is_stale = ~readable[hits]
            if is_stale.any():
                self._reencode(refresher, *refresher.table.ledger.positions(hits[is_stale]), weights[is_stale])
                readable = self.readable_as_is(refresher.state.lags(), refresher.table.ledger.versions)
        return search(readable_rows(rows, readable))

    def _reencode(
        self,
        refresher: Refresher,
        serials: Int[Tensor, " hits"],
        positions: Int[Tensor, " hits"],
        weights: Float[Tensor, " hits"],
    ) -> None:
        """Encode again the segments of these chunks of documents, those of most weight first, as far as the budget goes.

        Chunks that are not stale, or whose document or segments are not known, are left out.
        """
        ledger, size = refresher.table.ledger, refresher.table.chunk_size
        stale = {id(each) for _, segments in refresher.stale() for each in segments}
        found: list[tuple[float, Document, Segment]] = []
        for serial in serials.unique().tolist():
            if (document := ledger.by_serial.get(serial)) is None:
                continue
            chunks = positions[serials == serial]
            for segment in refresher.of_chunks(document, chunks.tolist()):
                if id(segment) in stale:
                    inside = (chunks * size < segment.stop) & (chunks * size + size > segment.start)
                    found.append((float(weights[serials == serial][inside].max()), document, segment))
        budget = self.chosen["budget_tokens"] or None
        if targets := most_wanted(found, budget):
            refresher.reencode(targets, budget)


def strongest(
    scores: Float[Tensor, "_heads _queries _chunks"], rows: Int[Tensor, "_heads _queries _chunks"], table: Table
) -> tuple[Int[Tensor, " hits"], Float[Tensor, " hits"]]:
    """Return the rows that a search has found, each once, and the largest weight that a query gives each.

    The weight is an estimate of attention among what the query has found: the search knows mean keys, and not the scaling of a
    model whose scores are not divided by the root of their width.
    """
    shapes = table.shapes
    scaling = 1.0 if shapes is None else shapes[0][1] ** -0.5
    weights = (scores.float() * scaling).softmax(dim=-1).flatten().cpu()
    hits, place = rows.flatten().cpu().unique(return_inverse=True)
    largest = torch.zeros(len(hits)).scatter_reduce_(0, place, weights.nan_to_num(), "amax")
    return hits[hits >= 0], largest[hits >= 0]


def most_wanted(found: list[tuple[float, Document, Segment]], budget_tokens: int | None) -> Targets:
    """Return the segments of largest weight, as many as fit in the budget but one at least, by document."""
    chosen: dict[int, tuple[Document, list[Segment]]] = {}
    left = float("inf") if budget_tokens is None else budget_tokens
    for _, document, segment in sorted(found, key=lambda each: -each[0]):
        if chosen and segment.stop - segment.start > left:
            break
        left -= segment.stop - segment.start
        chosen.setdefault(document.serial, (document, []))[1].append(segment)
    return [(document, sorted(each, key=lambda segment: segment.start)) for document, each in chosen.values()]
