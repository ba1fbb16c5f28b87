"""Evaluation: tasks that one runner asks of several systems, and folders that say where their numbers come from."""

import importlib
from typing import Any

from longmem.evaluation.registry import TASKS, run_task

# What needs torch is fetched when it is first used: listing the tasks needs none.
_OF_WINDOWS = ("Cut", "View", "Window", "WindowScores", "loss_difference", "make_views", "score_windows")
_OF_INTERVALS = ("bootstrap_interval", "perplexity_ratio", "ratio_of_means")
_HOMES = dict.fromkeys(_OF_WINDOWS, "perplexity.scoring") | dict.fromkeys(_OF_INTERVALS, "intervals")
__all__ = ["TASKS", "run_task", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longmem.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longmem.evaluation.{_HOMES[name]}"), name)
