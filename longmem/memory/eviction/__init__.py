"""Eviction policies by name; a new one is one class in one file, and one line here."""

from longmem.memory.eviction.fifo import FirstInFirstOut
from longmem.memory.eviction.lru import LeastRecentlyUsed
from longmem.memory.eviction.policy import EvictionPolicy
from longmem.memory.eviction.ttl import TimeToLive

EVICTION_POLICIES: dict[str, type[EvictionPolicy]] = {
    "fifo": FirstInFirstOut,
    "lru": LeastRecentlyUsed,
    "ttl": TimeToLive,
}

__all__ = ["EVICTION_POLICIES", "EvictionPolicy"]
