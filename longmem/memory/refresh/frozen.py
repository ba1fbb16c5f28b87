"""Frozen: the encoder never changes, and that is proved instead of assumed (the paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from longmem.backbone.stamp import EncoderStamp
from longmem.errors import StaleMemoryError
from longmem.memory.encoder_checks import refuse_stale
from longmem.memory.refresh.lags import Lags
from longmem.memory.refresh.policy import RefreshPolicy, register_policy

if TYPE_CHECKING:
    from longmem.memory.refresh.refresher import Refresher


@register_policy("frozen")
class Frozen(RefreshPolicy):
    """Refuse a bank whose entries another encoder wrote; nothing is ever encoded again, and nothing masked."""

    def admit(self, known: EncoderStamp, stamp: EncoderStamp) -> None:
        """Raise StaleMemoryError, with what differs and the ways out."""
        refuse_stale(known, stamp)

    def on_open(self, refresher: Refresher) -> None:
        """Raise StaleMemoryError if an earlier policy has left entries of another encoder."""
        if refresher.bank.has_stale:
            raise StaleMemoryError(
                'the bank holds entries of earlier encoders, which the policy "frozen" never reads; encode them again, by '
                "`bank.reencode(model)`, or go back to another policy by `bank.use_refresh`."
            )

    def on_idle(self, refresher: Refresher, budget_tokens: int | None) -> None:
        """Do nothing: nothing changes."""

    def readable(self, lags: Lags) -> Bool[Tensor, " versions"]:
        """Return what the current encoder wrote, and what its owner has said to read although nobody knows who wrote it."""
        unknown = torch.zeros_like(lags.is_fresh)
        unknown[-1] = True
        return lags.is_fresh | unknown
