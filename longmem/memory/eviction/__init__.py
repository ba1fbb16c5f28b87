"""Eviction policies by name; a new one is one class in one file, registered by its name."""

from longmem.memory.eviction.fifo import FirstInFirstOut
from longmem.memory.eviction.lru import LeastRecentlyUsed
from longmem.memory.eviction.policy import EvictionPolicy
from longmem.memory.eviction.ttl import TimeToLive
from longmem.plugins import parse_name


def make_policy(eviction: object) -> EvictionPolicy:
    """Return the policy that `eviction` names, with the settings it gives. Raises ValueError for what is not known.

    >>> make_policy("ttl:seconds=60").chosen
    {'seconds': 60.0}
    """
    kind, chosen = parse_name("eviction", eviction)
    return kind(**chosen)


__all__ = ["EvictionPolicy", "FirstInFirstOut", "LeastRecentlyUsed", "TimeToLive", "make_policy"]
