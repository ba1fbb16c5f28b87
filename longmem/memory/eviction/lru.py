"""Least recently used: the document that was not read for longest goes first."""

from collections.abc import Iterable

from longmem.memory.eviction.policy import EvictionPolicy
from longmem.memory.rows.documents import Run
from longmem.plugins import register


@register("eviction", "lru")
class LeastRecentlyUsed(EvictionPolicy):
    """The policy by which the document goes of which no chunk was found by a search, nor written, for the longest time.

    Sorting the runs makes an eviction cost O(runs).
    """

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        return sorted(runs, key=lambda run: max(run.document.last_read, run.document.written_at))
