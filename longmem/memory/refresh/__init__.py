"""Refresh policies by name: what a bank does when its encoder changes."""

from longmem.memory.refresh.kinds import UNBOUNDED
from longmem.memory.refresh.policy import RefreshPolicy, make_policy, refresh_name
from longmem.memory.refresh.refresher import Lags, Refresher, RefreshReport, RefreshState
from longmem.memory.refresh.report import StalenessReport, VersionStaleness, report_staleness

__all__ = [
    "UNBOUNDED",
    "Lags",
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
