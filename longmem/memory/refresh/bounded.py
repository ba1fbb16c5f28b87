"""Bounded: nothing is read that is further behind than a limit, on the clock of your choice (AReaL's and AsyncFlow's bound)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from longmem.errors import StaleMemoryError
from longmem.memory.index import Ranked
from longmem.memory.refresh.lags import CLOCKS, Lags
from longmem.memory.refresh.policy import RefreshPolicy, Search
from longmem.memory.refresh.refresher import Refresher
from longmem.plugins import Setting, register

UNBOUNDED = "bounded:max_lag=1e12"  # everything is read as it is, however old, as in Memorizing Transformers


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
