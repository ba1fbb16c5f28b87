"""What an eviction policy is: the order in which chunks go when a bank is full."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from longmem.memory.rows.documents import Run
from longmem.plugins import Setting


class EvictionPolicy:
    """What a full bank forgets; a new policy is one class in one file.

    A policy is asked for runs: chunks of one document that were written together. Inside a document chunks go from its
    oldest end, whichever of its runs is named, so that what stays of a document is its end, without holes. Runs of
    pinned documents are never offered.
    """

    # Settings that may follow the name, as in "ttl:seconds=3600"; `chosen` holds their values.
    settings: ClassVar[Mapping[str, Setting]] = {}

    def __init__(self, **chosen: Any) -> None:
        self.chosen = {name: setting.default for name, setting in self.settings.items()} | chosen

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        """Return the runs in the order in which they go; `runs` is oldest first, and is read only as far as needed."""
        raise NotImplementedError

    def expired(self, runs: Iterable[Run], now: float) -> Iterator[Run]:
        """Yield the runs that go now (seconds since 1970), full or not; `runs` is oldest first."""
        yield from ()
