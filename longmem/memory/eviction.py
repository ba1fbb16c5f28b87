"""Eviction policies: the order in which chunks go when a bank is full. A new one is one class, registered by its name."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from longmem.memory.rows.documents import Run
from longmem.plugins import Setting, parse_name, register


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


@register("eviction", "fifo")
class FirstInFirstOut(EvictionPolicy):
    """The policy by which the chunks go that were written first, whichever document owns them."""

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        return runs


@register("eviction", "lru")
class LeastRecentlyUsed(EvictionPolicy):
    """The policy by which the document goes of which no chunk was found by a search, nor written, for the longest time.

    Sorting the runs makes an eviction cost O(runs).
    """

    def order(self, runs: Iterable[Run]) -> Iterable[Run]:
        return sorted(runs, key=lambda run: max(run.document.last_read, run.document.written_at))


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


def make_policy(eviction: object) -> EvictionPolicy:
    """Return the policy that `eviction` names, with the settings it gives. Raises ValueError for what is not known.

    >>> make_policy("ttl:seconds=60").chosen
    {'seconds': 60.0}
    """
    kind, chosen = parse_name("eviction", eviction)
    return kind(**chosen)
