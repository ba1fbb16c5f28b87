"""Refresh policies by name: what a bank does when its encoder changes."""

from longmem.memory.refresh.kinds import UNBOUNDED, Bounded, Eager, Frozen, Lazy
from longmem.memory.refresh.lags import CLOCKS, Lags
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
