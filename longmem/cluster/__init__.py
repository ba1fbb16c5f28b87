"""One bank on several machines: shards as Ray actors, read, filled and refreshed over the network (extra `[cluster]`).

Ray is imported when a cluster is first joined, and not before.
"""

from longmem.cluster.bank import ClusterBank
from longmem.cluster.workers import Encoders, Feed

__all__ = ["ClusterBank", "Encoders", "Feed"]
