"""Lazy: what a read finds and is stale is encoded again there and then, and a sweep takes the rest, oldest first.

By itself it would leave entries hidden whose old keys no query finds any more, so pair it with a sweep (`sweep_tokens`, or
`bank.sweep` in idle time).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from longmem.memory.index import Found
from longmem.memory.refresh.policy import RefreshPolicy, Search, readable_rows, register_policy
from longmem.memory.settings import Setting

if TYPE_CHECKING:
    from longmem.memory.refresh.refresher import Refresher


@register_policy("lazy")
class Lazy(RefreshPolicy):
    """Encode again the stale segments that a read finds, and search once more among what is fresh.

    While gradients are recorded nothing is encoded again in the middle of a forward pass, whose backward pass will read the
    same chunks: what was found stale is masked there, and encoded again before the next read.
    """

    settings: ClassVar[Mapping[str, Setting]] = {
        "budget_tokens": Setting(0, "the tokens encoded again for one search, 0 for all that it finds", 0, 1e12),
        "sweep_tokens": Setting(0, "the tokens encoded again before each call of the model, oldest first", 0, 1e12),
    }

    def on_open(self, refresher: Refresher) -> None:
        """Encode again what a read with gradients has found stale, then sweep."""
        if rows := refresher.bank.wanted:
            refresher.bank.wanted = set()
            self._reencode(refresher, torch.tensor(sorted(rows)))
        if self.chosen["sweep_tokens"] and (targets := refresher.stale()):
            refresher.reencode(targets, self.chosen["sweep_tokens"])

    def on_read(self, refresher: Refresher | None, search: Search, rows: Tensor | None, readable: Tensor) -> Found:
        """Return what is found after the stale hits were encoded again."""
        if refresher is not None:
            hits = search(rows)[1].unique()
            hits = hits[hits >= 0].cpu()
            stale = hits[~readable[hits]]
            if len(stale) and torch.is_grad_enabled():
                refresher.bank.wanted |= set(stale.tolist())
            elif len(stale):
                self._reencode(refresher, stale)
                readable = refresher.bank.readable_now()
        return search(readable_rows(rows, readable))

    def _reencode(self, refresher: Refresher, rows: Tensor) -> None:
        """Encode again the segments of these rows, as far as they are stale, known and within the budget."""
        rows = rows[rows < refresher.bank.num_chunks]
        stale = {document.serial: {id(each) for each in segments} for document, segments in refresher.stale()}
        targets = []
        for document, chunks in refresher.bank._ledger.owners(rows).items():
            of_hits = refresher.of_chunks(document, chunks.tolist())
            if segments := [each for each in of_hits if id(each) in stale.get(document.serial, ())]:
                targets.append((document, segments))
        if targets:
            refresher.reencode(targets, self.chosen["budget_tokens"] or None)
