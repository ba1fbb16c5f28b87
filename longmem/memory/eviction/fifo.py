"""First in, first out: what was written first goes first (the released code of the paper)."""

from collections.abc import Iterable

from longmem.memory.eviction.policy import EvictionPolicy
from longmem.memory.rows.documents import Run
from longmem.plugins import register


@register("eviction", "fifo")
class FirstInFirstOut(EvictionPolicy):
    """The policy by which the chunks go that were written first, whichever document owns them."""

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        return runs
