"""Time to live: what was written too long ago goes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from longmem.memory.eviction.policy import EvictionPolicy
from longmem.memory.rows.documents import Run
from longmem.plugins import Setting, register


@register("eviction", "ttl")
class TimeToLive(EvictionPolicy):
    """The policy by which chunks go `seconds` after they were written; when the bank is full before, the oldest first.

    Time passes for a bank when it is searched, listed or written to.
    """

    settings: ClassVar[Mapping[str, Setting]] = {"seconds": Setting(86_400.0, "how long a chunk lives", 0.001, 1e10)}

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        return runs

    def expired(self, runs: Iterable[Run], now: float) -> Iterator[Run]:
        """Yield the runs whose time is over; runs stand in the order of writing, so the first that lives ends it."""
        return itertools.takewhile(lambda run: run.written_at + self.chosen["seconds"] <= now, runs)
