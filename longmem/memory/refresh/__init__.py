"""Refresh policies by name: what a bank does when its encoder changes. A new one is one class in one file.

frozen    the encoder never changes, and that is proved (the default)
eager     everything is encoded again when it changes
bounded   entries may be so far behind and no further
lazy      what is read is encoded again, and a sweep takes the rest
"""

from longmem.memory.refresh.bounded import UNBOUNDED, Bounded
from longmem.memory.refresh.eager import Eager
from longmem.memory.refresh.frozen import Frozen
from longmem.memory.refresh.lags import CLOCKS, Lags
from longmem.memory.refresh.lazy import Lazy
from longmem.memory.refresh.policy import RefreshPolicy, make_policy, refresh_name
from longmem.memory.refresh.refresher import Refresher, RefreshReport, RefreshState
from longmem.memory.refresh.report import DocumentStaleness, StalenessReport, VersionStaleness, report_staleness

__all__ = [
    "CLOCKS",
    "UNBOUNDED",
    "Bounded",
    "DocumentStaleness",
    "Eager",
    "Frozen",
    "Lags",
    "Lazy",
    "RefreshPolicy",
    "RefreshReport",
    "RefreshState",
    "Refresher",
    "StalenessReport",
    "VersionStaleness",
    "make_policy",
    "refresh_name",
    "report_staleness",
]
