"""What is compared in the policy table: refresh policies with their settings, their lower and their upper bound."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

import experiments.mapped_refresh  # noqa: F401  registers the policy "mapped"
from longmem.memory import MemoryBank
from longmem.memory.refresh import UNBOUNDED
from longmem.model.modeling import LongMemForCausalLM

SEGMENT = 256  # tokens that are encoded together, the least that a budget buys


@dataclasses.dataclass(frozen=True)
class PolicySystem:
    """One row of the table.

    Args:
        title: in tables and figures.
        refresh: the policy, as a bank takes it; None: what the old encoder wrote is read as it is.
        idle_tokens: encoded again after each window of questions, when nobody waits (`Freshness.sweep`).
        judged: False takes maps without asking held-out segments, which no setting of a policy allows.
        stale_weight: what attention to the bank is multiplied by as long as the bank is stale.
        is_fresh: the reader's own encoder wrote the bank in the first place.
    """

    title: str
    refresh: str | None = None
    idle_tokens: int = 0
    judged: bool = True
    stale_weight: float = 1.0
    is_fresh: bool = False

    def prepare(self, bank: MemoryBank, reader: LongMemForCausalLM) -> None:
        """Set the bank to this system, before its first reading."""
        if self.is_fresh:
            return
        if self.refresh is None:
            bank.freshness.read_as_is(reader)
            return
        bank.freshness.use(self.refresh)
        if not self.judged:
            bank.freshness.policy.chosen.update(min_gain=-math.inf, min_recall=0.0)


def mapped(kind: str, share: float, ending: str = "", **others: Any) -> PolicySystem:
    """Return the system of a map of some kind, fitted on a share of the bank; `others` are fields of `PolicySystem`."""
    return PolicySystem(f"{kind} map, {share:.0%}{ending}", f"mapped:kind={kind},sample_share={share}", **others)


# "never" and "eager" are 0 and 1 of what is recovered; "eager" is also 1 of the cost.
SYSTEMS: dict[str, PolicySystem] = {
    "never": PolicySystem("never"),
    "eager": PolicySystem("eager", "eager"),
    "bounded": PolicySystem("bounded, lag 0", "bounded:max_lag=0"),
    "lazy": PolicySystem("lazy", "lazy"),
    "lazy-sweep": PolicySystem("lazy + sweep", f"lazy:sweep_tokens={SEGMENT}"),
    "lazy-budget": PolicySystem("lazy, budget", f"lazy:budget_tokens={4 * SEGMENT}"),
    "sweep": PolicySystem("sweep only", f"bounded:max_lag=0,budget_tokens={2 * SEGMENT}"),
    # Nothing is masked: what is stale is read as it is, until its turn comes between two windows.
    "swept": PolicySystem("all read, swept", UNBOUNDED, idle_tokens=2 * SEGMENT),
    "affine-5": mapped("affine", 0.05),
    "affine-10": mapped("affine", 0.10),
    "procrustes-5": mapped("procrustes", 0.05),
    "procrustes-10": mapped("procrustes", 0.10),
    "affine-5-sweep": mapped("affine", 0.05, ", then sweep", idle_tokens=SEGMENT),
    "affine-5-unjudged": mapped("affine", 0.05, ", without hold-out", judged=False),
    "procrustes-5-unjudged": mapped("procrustes", 0.05, ", without hold-out", judged=False),
    "mask": PolicySystem("mask", "bounded:max_lag=0,on_violation=mask"),
    # The poly weight of asynchronous learning, (lag + 1) ** -0.5, at a lag of one encoder.
    "stale-weight": PolicySystem("never, weight by lag", stale_weight=2**-0.5),
    "fresh": PolicySystem("bank written anew", is_fresh=True),
}


@contextlib.contextmanager
def weighted(model: LongMemForCausalLM, weight: float) -> Iterator[None]:
    """Multiply attention to memory by a weight, inside the block."""
    layers: list[Any] = list(model.side_network.layers)
    biases = [layer.memory_bias for layer in layers if layer.memory_bias is not None]
    with torch.no_grad():
        before = [bias.clone() for bias in biases]
        for bias in biases:
            bias.add_(math.log(weight))
        try:
            yield
        finally:
            for bias, kept in zip(biases, before, strict=True):
                bias.copy_(kept)
