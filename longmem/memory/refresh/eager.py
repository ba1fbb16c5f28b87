"""Eager: when the encoder changes, everything is encoded again before it is read (REALM, with a period)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from longmem.memory.refresh.lags import Lags
from longmem.memory.refresh.policy import RefreshPolicy
from longmem.memory.refresh.refresher import Refresher
from longmem.plugins import Setting, register


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
