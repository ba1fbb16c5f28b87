"""Evaluation: the same tokens under several systems, and result folders that say where their numbers come from."""

from longmem.evaluation.intervals import bootstrap_interval, perplexity_ratio, ratio_of_means
from longmem.evaluation.perplexity import (
    SYSTEMS,
    WindowScores,
    compare_systems,
    loss_difference,
    pooled,
    score_windows,
)

__all__ = [
    "SYSTEMS",
    "WindowScores",
    "bootstrap_interval",
    "compare_systems",
    "loss_difference",
    "perplexity_ratio",
    "pooled",
    "ratio_of_means",
    "score_windows",
]
