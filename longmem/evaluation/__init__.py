"""Evaluation: tasks that one runner asks of several systems, and folders that say where their numbers come from."""

from __future__ import annotations

import importlib
from typing import Any

from longmem.evaluation.registry import TASKS, run_task

# What needs torch is fetched when it is first used: listing the tasks needs none.
_HOMES = {
    "Cut": "perplexity.scoring",
    "View": "perplexity.scoring",
    "Window": "perplexity.scoring",
    "WindowScores": "perplexity.scoring",
    "bootstrap_interval": "intervals",
    "loss_difference": "perplexity.scoring",
    "make_views": "perplexity.scoring",
    "perplexity_ratio": "intervals",
    "ratio_of_means": "intervals",
    "score_windows": "perplexity.scoring",
}
__all__ = ["TASKS", "run_task", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longmem.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longmem.evaluation.{_HOMES[name]}"), name)
