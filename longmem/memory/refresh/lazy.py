"""Lazy: what a read finds and is stale is encoded again there and then, and a sweep takes the rest, oldest first.

By itself it would leave entries hidden whose old keys no query finds any more, so pair it with a sweep (`sweep_tokens`, or
`bank.freshness.sweep` in idle time).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longmem.memory.index import Ranked
from longmem.memory.refresh.policy import RefreshPolicy, Search, readable_rows
from longmem.memory.refresh.refresher import Refresher
from longmem.memory.refresh.samples import Targets
from longmem.memory.rows.documents import Document
from longmem.memory.rows.segments import Segment
from longmem.memory.rows.table import Table
from longmem.plugins import Setting, register


@register("refresh", "lazy")
class Lazy(RefreshPolicy):
    """The policy that encodes again the stale segments that a read finds, and then searches among what is fresh.

    Every token of a window searches, so a window finds something in most segments of a small bank, though it attends to few.
    What is encoded again is what some query attends to most (estimated from scores of search keys, scaled by the root of their
    width), up to `budget_tokens`. Stale chunks that are not encoded again are masked.

    While gradients are recorded nothing is encoded again in the middle of a forward pass, whose backward pass will read the
    same chunks: what was found stale is masked there, and encoded again before the next read.
    """

    encodes_on_read: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Setting]] = {
        "budget_tokens": Setting(0, "the tokens encoded again for one search, 0 for all that it finds", 0, 1e12),
        "sweep_tokens": Setting(0, "the tokens encoded again before each call of the model, oldest first", 0, 1e12),
    }

    def on_open(self, refresher: Refresher) -> None:
        """Encode again what a read with gradients has found stale, then sweep."""
        state = refresher.state
        if not state.may_write:
            return
        if rows := state.wanted:
            state.wanted = set()
            chosen = torch.tensor(sorted(rows))
            self._reencode(refresher, chosen, torch.ones(len(chosen)))
        if self.chosen["sweep_tokens"] and self.mask(state) is not None and (targets := refresher.stale()):
            refresher.reencode(targets, self.chosen["sweep_tokens"])

    def on_read(self, refresher: Refresher | None, search: Search, rows: Tensor | None, readable: Tensor) -> Ranked:
        """Return what is found after the stale hits were encoded again."""
        if refresher is not None:
            hits, weights = strongest(*search(rows), refresher.table)
            is_stale = ~readable[hits]
            stale, weights = hits[is_stale], weights[is_stale]
            if len(stale) and torch.is_grad_enabled():
                refresher.state.wanted |= set(stale.tolist())
            elif len(stale):
                self._reencode(refresher, stale, weights)
                readable = self.readable_as_is(refresher.state.lags(), refresher.table.ledger.versions)
        return search(readable_rows(rows, readable))

    def _reencode(self, refresher: Refresher, rows: Int[Tensor, " hits"], weights: Float[Tensor, " hits"]) -> None:
        """Encode again the segments of these rows, those of most weight first, as far as the budget goes.

        Rows that are not stale, or whose segments are not known, are left out.
        """
        ledger, size = refresher.table.ledger, refresher.table.chunk_size
        alive = rows < ledger.num_rows
        weights = weights[alive]
        serials, positions = ledger.positions(rows[alive])
        stale = {id(each) for _, segments in refresher.stale() for each in segments}
        found: list[tuple[float, Document, Segment]] = []
        for serial in serials.unique().tolist():
            document, chunks = ledger.by_serial[serial], positions[serials == serial]
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
