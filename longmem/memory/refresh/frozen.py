"""Frozen: the encoder never changes, and that is proved instead of assumed (the paper)."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from longmem.encoder.checks import refuse_stale
from longmem.encoder.stamp import EncoderStamp
from longmem.memory.refresh.lags import Lags
from longmem.memory.refresh.policy import RefreshPolicy
from longmem.memory.refresh.refresher import Refresher
from longmem.plugins import register


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
