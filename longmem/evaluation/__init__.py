"""Evaluation: tasks that one runner asks of several systems, and folders that say where their numbers come from."""

from __future__ import annotations

import importlib
from typing import Any

from longmem.evaluation.registry import TASKS, run_task

__all__ = [
    "SYSTEMS",
    "TASKS",
    "WindowScores",
    "bootstrap_interval",
    "compare_systems",
    "loss_difference",
    "perplexity_ratio",
    "pooled",
    "ratio_of_means",
    "run_task",
    "score_windows",
]

_INTERVALS = ("bootstrap_interval", "perplexity_ratio", "ratio_of_means")


def __getattr__(name: str) -> Any:
    """Fetch what needs torch when it is first used: listing the tasks needs none."""
    if name not in __all__:
        raise AttributeError(f"module 'longmem.evaluation' has no attribute {name!r}")
    return getattr(
        importlib.import_module(f"longmem.evaluation.{'intervals' if name in _INTERVALS else 'perplexity'}"), name
    )
