"""Time to live: what was written too long ago goes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longmem.memory.documents import Run
from longmem.memory.eviction.policy import EvictionPolicy


@dataclass(frozen=True)
class TimeToLive(EvictionPolicy):
    """Forget chunks `seconds` after they were written; when the bank is full before, the oldest first."""

    seconds: float

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds must be more than 0, got {self.seconds:g}.")

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        """Return the runs as they were written."""
        return runs

    def expired(self, runs: Iterable[Run], now: float) -> Iterator[Run]:
        """Yield the runs whose time is over; runs stand in the order of writing, so the first that lives ends it."""
        return itertools.takewhile(lambda run: run.written_at + self.seconds <= now, runs)
